//! A running QEMU.

use std::ffi::CString;
use std::path::Path;
use std::time::Duration;

use rustix::mount::mount_bind;
use serde_json::{Value, json};
use tokio::net::UnixStream;
use tokio::net::unix::OwnedWriteHalf;
use tokio::process::{Child, Command};
use tokio::sync::mpsc;
use vimg_agent::protocol::card;
use vimg_lang::model::Forward;

use super::disks::{Disks, Monitor};
use super::hang;
use super::programs::Programs;
use super::qmp::Qmp;
use super::snapshots::{Origin, PendingSnapshot};
use crate::host;
use crate::host::HostError;
use crate::host::child::{self, Tail};
use crate::host::keeper::Keeper;
use crate::host::namespaces::Ids;
use crate::host::network::{self, Access, Inward, Unreachable, WayOut};
use crate::host::sockets::{connect, wait_and_connect};
use crate::provider::{Ended, Launch, Place};

/// How much of the console is remembered, in bytes.
const CONSOLE: usize = 32 << 10;
/// Timeout for QEMU to open its sockets. QEMU does nothing else then, but the
/// host may be busy.
pub(super) const OPENING: Duration = Duration::from_secs(60);
/// Timeout for a monitor to answer.
const FINDING: Duration = Duration::from_secs(10);
const EVENTS: &[&str] = &["SHUTDOWN", "GUEST_PANICKED", "BLOCK_IO_ERROR", "VSERPORT_CHANGE", "RESUME"];

/// A running machine or appliance; killed when dropped, and by the kernel if
/// vimg dies. Servers are not killed.
pub struct QemuInstance {
    pub(super) process: Process,
    pub(super) monitor: Monitor,
    pub(super) events: mpsc::Receiver<Value>,
    pub(super) agent: Option<UnixStream>,
    pub(super) console: Tail,
    /// The other half of the console's stream. QEMU drops the stream when it is
    /// closed.
    pub(super) keys: Option<OwnedWriteHalf>,
    pub(super) log: std::path::PathBuf,
    pub(super) disks: Disks,
    pub(super) panicked: bool,
    /// How much of the console [`Self::hangs`] has seen, in bytes.
    looked: u64,
    pub(super) way: String,
    pub(super) place: Place,
    /// The appliance snapshot that it was forked from.
    pub(super) snapshot: Option<std::path::PathBuf>,
    /// The machine snapshot that it was forked from.
    pub(super) origin: Option<Origin>,
    /// The data to save its memory with, after it has booted.
    pub(super) pending: Option<PendingSnapshot>,
    pub(super) way_out: WayOut,
    /// The companion process, if it is a server.
    pub(super) keeper: Option<Keeper>,
}

/// The QEMU process of a machine.
pub(super) enum Process {
    Own(Child),
    /// Started by another process of vimg, which has ended. Its monitor closes
    /// when it ends.
    Found,
}

impl Process {
    pub(super) async fn wait(&mut self) {
        match self {
            Self::Own(child) => {
                let _ = child.wait().await;
            }
            Self::Found => std::future::pending().await,
        }
    }
}

/// What a start needs besides QEMU's arguments.
pub(super) struct Start<'a> {
    /// QEMU's working directory, where its sockets are.
    pub(super) scratch: &'a Path,
    pub(super) disks: Disks,
    /// Its runner, for records.
    pub(super) way: String,
    pub(super) place: Place,
    /// Whether it runs at idle priority until it is resumed.
    pub(super) yields: bool,
    /// Its way out to the network.
    pub(super) way_out: WayOut,
    /// The companion process, if it is a server.
    pub(super) keeper: Option<Keeper>,
}

/// Starts the companion process of a server; `None` for other launches.
pub(super) async fn keeper(access: &Access, launch: &Launch) -> Result<Option<Keeper>, HostError> {
    let Some(lasting) = &launch.lasting else { return Ok(None) };
    let started = Keeper::start(&launch.scratch, access, &inward(&lasting.forwards)).await;
    started.map(Some).map_err(unkept)
}

/// Converts a network error.
pub(super) fn unkept(why: Unreachable) -> HostError {
    HostError::new(why.message).help(why.help)
}

/// Pairs each forward with a port in the server's namespace. These ports are
/// below those that the kernel gives out (`ip_local_port_range`).
pub(super) fn inside(forwards: &[Forward]) -> impl Iterator<Item = (u16, &Forward)> {
    (20_000..).zip(forwards)
}

/// Maps ports of the host to those ports.
pub(super) fn inward(forwards: &[Forward]) -> Vec<Inward> {
    let way = |(inside, f): (u16, &Forward)| Inward { address: f.address.clone(), host: f.host, inside };
    inside(forwards).map(way).collect()
}

/// Makes the way out of a machine, closed at first. A server gets none here:
/// its companion process has it.
pub(super) async fn way_out(access: &Access, launch: &Launch, networked: bool) -> Result<WayOut, HostError> {
    let gateway = match networked && launch.lasting.is_none() {
        true => access.gateway(Ids::Same).await?,
        false => None,
    };
    Ok(access.way_out(gateway, &nat()))
}

/// The guest's address for the host's loopback, in QEMU's own NAT: the gateway.
fn nat() -> String {
    let [a, b, c, d] = card::GATEWAY;
    format!("{a}.{b}.{c}.{d}")
}

/// Replaces QEMU's `/etc/resolv.conf` with `file`.
fn resolve_by(command: &mut Command, file: &Path) -> std::io::Result<()> {
    let file = CString::new(file.as_os_str().as_encoded_bytes())?;
    // SAFETY: the closure makes system calls only.
    unsafe {
        command.pre_exec(move || {
            host::own_mounts()?;
            match mount_bind(file.as_c_str(), c"/etc/resolv.conf") {
                // A host without one resolves no names either.
                Err(rustix::io::Errno::NOENT) => Ok(()),
                bound => Ok(bound?),
            }
        });
    }
    Ok(())
}

impl QemuInstance {
    /// Starts QEMU with the arguments `all` and connects to it.
    pub(super) async fn start(
        programs: &Programs,
        all: &[String],
        start: Start<'_>,
    ) -> Result<Self, HostError> {
        let Start { scratch, disks, way, place, yields, way_out, keeper } = start;
        for socket in ["qmp", "console", "agent"] {
            let _ = std::fs::remove_file(scratch.join(socket));
        }
        let log = scratch.join("qemu.log");
        let fail = |e| HostError::new(format!("can't run `{}`: {e}", programs.system.display()));
        let mut command = child::daemon(&programs.system, scratch, &log, disks.lasting()).map_err(fail)?;
        if yields {
            child::yields(&mut command);
        }
        if let Some(keeper) = &keeper {
            keeper.ends_with(command.as_std_mut());
        }
        let own = way_out.gateway.as_ref().map(|gateway| &**gateway.namespaces());
        if let Some(namespaces) = own.or_else(|| keeper.as_ref()?.namespaces()) {
            namespaces.enter_network(command.as_std_mut());
            let file = network::resolv_conf(scratch).map_err(fail)?;
            resolve_by(&mut command, &file).map_err(fail)?;
        }
        let mut child = command.args(all).spawn().map_err(fail)?;

        let connected = tokio::time::timeout(OPENING, async {
            let qmp = wait_and_connect(scratch, "qmp", &mut child).await?;
            let console = wait_and_connect(scratch, "console", &mut child).await?;
            let agent = wait_and_connect(scratch, "agent", &mut child).await?;
            Some((qmp, console, agent))
        })
        .await;
        let Ok(Some((qmp, console_stream, agent))) = connected else {
            let words = child::last_words(&log);
            return Err(HostError::new(format!("QEMU does not start: {words}")));
        };
        let (qmp, events) = Qmp::new(qmp, EVENTS).await?;
        let (console, keys) = console_stream.into_split();
        let console = Tail::of(console, CONSOLE);
        Ok(Self {
            process: Process::Own(child),
            monitor: Monitor::new(qmp),
            events,
            agent: Some(agent),
            console,
            keys: Some(keys),
            log,
            disks,
            panicked: false,
            looked: 0,
            way,
            place,
            snapshot: None,
            origin: None,
            pending: None,
            way_out,
            keeper,
        })
    }

    /// Connects to a running server in the directory `scratch`; `None` if it
    /// does not run.
    pub(super) async fn find(
        programs: &Programs,
        scratch: &Path,
        access: &Access,
    ) -> Result<Option<Self>, HostError> {
        let Ok(qmp) = connect(scratch, "qmp").await else { return Ok(None) };
        let connected = tokio::time::timeout(FINDING, async {
            let (mut qmp, events) = Qmp::new(qmp, EVENTS).await?;
            let drives = qmp.execute("query-block", json!({})).await?;
            Ok::<_, HostError>((qmp, events, drives))
        });
        let busy = || HostError::new("the machine's monitor does not answer");
        let (qmp, events, drives) = connected.await.map_err(|_| busy())??;
        let disks = Disks::found(programs, &drives).ok_or_else(busy)?;
        let fail = |e: std::io::Error| HostError::io("can't connect to the machine", &e);
        let (console, keys) = connect(scratch, "console").await.map_err(fail)?.into_split();
        let console = Tail::of(console, CONSOLE);
        let agent = connect(scratch, "agent").await.map_err(fail)?;
        // Without the companion, the machine still answers. Only changes of
        // forwarded ports fail.
        let keeper = Keeper::find(scratch).await.ok();
        Ok(Some(Self {
            process: Process::Found,
            monitor: Monitor::new(qmp),
            events,
            agent: Some(agent),
            console,
            keys: Some(keys),
            log: scratch.join("qemu.log"),
            disks,
            panicked: false,
            looked: 0,
            way: format!("qemu {}", programs.version),
            place: Place::Machine,
            snapshot: None,
            origin: None,
            pending: None,
            // Its companion process has its gateway.
            way_out: access.way_out(None, &nat()),
            keeper,
        }))
    }

    /// Executes a command of the human monitor; returns its output.
    pub(super) async fn tell(&mut self, line: &str) -> Result<String, HostError> {
        let answer = self.execute("human-monitor-command", json!({ "command-line": line })).await?;
        Ok(answer.as_str().unwrap_or_default().to_owned())
    }

    /// Notes the appliance snapshot that it was forked from.
    pub(super) fn forked_from(&mut self, snapshot: &Path) {
        self.snapshot = Some(snapshot.to_owned());
    }

    /// Executes a command of the monitor.
    pub(super) async fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, HostError> {
        self.monitor.execute(command, arguments).await
    }

    /// Waits until the agent has opened its port.
    pub(super) async fn agent_opens(&mut self) -> Result<(), HostError> {
        self.event(|e| e["event"] == "VSERPORT_CHANGE" && e["data"]["open"] == true).await
    }

    /// Waits until a resumed machine runs.
    pub(super) async fn resumed(&mut self) -> Result<(), HostError> {
        self.event(|e| e["event"] == "RESUME").await
    }

    async fn event(&mut self, wanted: impl Fn(&Value) -> bool) -> Result<(), HostError> {
        loop {
            let event = tokio::select! {
                biased;
                event = self.events.recv() => event,
                _ = self.process.wait() => None,
            };
            match event {
                Some(event) if wanted(&event) => return Ok(()),
                Some(event) if self.judge(&event).is_none() => {}
                _ => {
                    let words = child::last_words(&self.log);
                    let console = self.console.text();
                    let console = console.lines().last().unwrap_or_default();
                    return Err(HostError::new(format!("the machine ended: {words} {console}")));
                }
            }
        }
    }

    /// Returns for how many seconds its processors have been stuck, if its
    /// console says since the last call that it hangs.
    pub(super) fn hangs(&mut self) -> Option<u64> {
        let (total, new) = self.console.since(self.looked);
        self.looked = total;
        // Older messages are of a lockup that the machine has recovered from.
        hang::mentioned(&new).then(|| hang::hangs(&self.console.text())).flatten()
    }

    pub(super) fn judge(&mut self, event: &Value) -> Option<Ended> {
        let data = &event["data"];
        match event["event"].as_str()? {
            "GUEST_PANICKED" => {
                self.panicked = true;
                Some(Ended::Panic)
            }
            "SHUTDOWN" if self.panicked || data["reason"] == "guest-panic" => Some(Ended::Panic),
            "SHUTDOWN" => Some(Ended::Off),
            "BLOCK_IO_ERROR" if data["nospace"] == true => Some(Ended::HostDiskFull),
            "BLOCK_IO_ERROR" => {
                Some(Ended::DiskError(data["reason"].as_str().unwrap_or("input/output error").to_owned()))
            }
            "VSERPORT_CHANGE" if data["id"] == "agent" && data["open"] == false => Some(Ended::AgentGone),
            _ => None,
        }
    }
}

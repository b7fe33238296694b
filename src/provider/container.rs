//! Applies layers in a container, with the host's own kernel: native speed
//! where machines are emulated.
//!
//! `qemu-storage-daemon` exports the overlay as a plain file, the kernel mounts
//! its filesystem, and the agent works in namespaces that `bwrap` makes: it has
//! its own processes, names and mounts, no devices, few capabilities, and a
//! seccomp filter. The host's kernel mounts only filesystems that were made
//! here.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use tokio::net::UnixStream;
use tokio::process::Child;
use vimg_agent::protocol::Network;

use super::qemu::{Disks, Monitor, Programs};
use super::{Ended, Instance, Launch, Place};
use crate::disk::layout::Layout;
use crate::host::cgroup::Group;
use crate::host::child::{self, Tail};
use crate::host::namespaces::{Ids, Namespaces};
use crate::host::network::{self, Access, WayOut};
use crate::host::{self, HostError, space};

mod engine;
mod mount;
mod seccomp;
mod process;

pub(super) use engine::Engine;

use process::{Inside, Way};

/// Timeout for exporting the disk.
const OPENING: Duration = Duration::from_secs(20);

/// The log of `qemu-storage-daemon`, in the scratch directory.
const LOG: &str = "daemon.log";
/// How much output of `bwrap` is remembered, in bytes.
const WORDS: usize = 8 << 10;

/// A running container.
pub struct ContainerInstance {
    agent: Option<UnixStream>,
    bwrap: Child,
    mounted: Option<mount::Mounted>,
    daemon: Child,
    monitor: Monitor,
    disks: Disks,
    words: Tail,
    network: Option<Network>,
    way_out: WayOut,
    way: String,
    scratch: PathBuf,
    /// Its control group; must be dropped last.
    _group: Option<Group>,
}

/// Starts a container on a disk.
pub(super) async fn start(
    engine: &Engine,
    programs: &Programs,
    launch: &Launch,
    access: &Access,
) -> Result<ContainerInstance, HostError> {
    let scratch = &launch.scratch;
    let disks = Disks::new(programs, launch).await?;
    let fail = |what: &'static str| {
        move |e: io::Error| HostError::io(format_args!("can't start the container: {what}"), &e)
    };
    let (shown, root) = (scratch.join("shown"), scratch.join("root"));
    File::create(&shown).map_err(fail("its disk"))?;
    std::fs::create_dir(&root).map_err(fail("its root"))?;
    let mut daemon = spawn_daemon(engine, &disks, launch, &shown)?;
    let connected = tokio::time::timeout(OPENING, Monitor::wait(scratch, "qmp", &mut daemon)).await;
    let Ok(Some(monitor)) = connected else {
        let words = child::last_words(&scratch.join(LOG));
        return Err(HostError::new(format!("qemu-storage-daemon does not start: {words}")));
    };
    let monitor = monitor?;
    // The export is visible in the daemon's mount namespace only.
    let pid = daemon.id().ok_or_else(|| HostError::new("qemu-storage-daemon ended"))?;
    let seen = format!("/proc/{pid}/root{}", shown.display());
    let disk = File::options().read(true).write(true).open(&seen).map_err(fail("its disk"))?;
    let (users, mounted, way) = mount_disk(engine, launch, access, disk).await?;
    if mounted.has("boot/efi") {
        mounted.release();
        let _ = daemon.kill().await;
        return Err(HostError::new("the image has a second filesystem, at /boot/efi"));
    }
    let gateway = match (launch.network && !access.reach.all, &users) {
        (false, _) => None,
        (true, Some(users)) => Some(access.gateway_in(users.clone(), &[]).await?),
        (true, None) => access.gateway(Ids::System).await?,
    };
    let group = Group::new(host::memory() / 4 * 3).ok();
    let network = match (launch.network, &gateway) {
        (false, _) => Way::None,
        (true, Some(_)) => Way::Gateway,
        (true, None) => Way::Host,
    };
    let inside =
        Inside { network, users: users.as_deref(), gateway: gateway.as_ref(), group: group.as_ref() };
    let (agent, mut bwrap) = process::spawn(&engine.bwrap, &mounted, &root, &inside)?;
    let err = bwrap.stderr.take().ok_or_else(|| HostError::new("bwrap ended"))?;
    Ok(ContainerInstance {
        agent: Some(agent),
        bwrap,
        mounted: Some(mounted),
        daemon,
        monitor,
        disks,
        words: Tail::of(err, WORDS),
        network: launch.network.then(|| resolver(gateway.is_some())),
        way_out: access.way_out(gateway, "127.0.0.1"),
        way,
        scratch: scratch.clone(),
        _group: group,
    })
}

/// Mounts the filesystem of a disk for a container. Returns the container's
/// user namespace, if it has one, the mount, and the name of this runner.
async fn mount_disk(
    engine: &Engine,
    launch: &Launch,
    access: &Access,
    disk: File,
) -> Result<(Option<Arc<Namespaces>>, mount::Mounted, String), HostError> {
    let fail = |what: &'static str| {
        move |e: io::Error| HostError::io(format_args!("can't start the container: {what}"), &e)
    };
    let root = Layout::of_chain(&launch.chain).map_err(fail("its disk"))?.root;
    let mut users = match engine.mapped {
        true => {
            // If the host's network is used directly, it needs no namespace.
            let shared = launch.network && access.reach.all;
            let made = if shared { Namespaces::of_users } else { Namespaces::new };
            Some(Arc::new(made(Ids::System).map_err(fail("its namespaces"))?))
        }
        false => None,
    };
    let (first, size) = (root.start, root.end - root.start);
    let mount = |users: Option<Arc<Namespaces>>| {
        let disk = disk.try_clone();
        tokio::task::spawn_blocking(move || {
            mount::Mounted::new(&disk?, first, size, users.as_ref().map(|users| users.user()))
        })
    };
    let broken = |e: tokio::task::JoinError| HostError::new(e.to_string());
    let mut mounted = mount(users.clone()).await.map_err(broken)?;
    let mut way = engine.name();
    if mounted.as_ref().is_err_and(|e| e.kind() == io::ErrorKind::Unsupported) && users.is_some() {
        users = None;
        way.push_str(" (the kernel can't map its ids)");
        mounted = mount(None).await.map_err(broken)?;
    }
    Ok((users, mounted.map_err(fail("mount"))?, way))
}

/// Uses the resolver of the gateway, or that of the host.
fn resolver(gateway: bool) -> Network {
    let resolv_conf = match gateway {
        true => format!("nameserver {}\n", network::RESOLVER),
        false => std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default(),
    };
    Network { resolv_conf }
}

/// Starts the daemon that exports the disk, in its own mount namespace, which
/// ends with it. No mount is left, however vimg ends.
fn spawn_daemon(engine: &Engine, disks: &Disks, launch: &Launch, shown: &Path) -> Result<Child, HostError> {
    let fail = |e: io::Error| HostError::io("can't run qemu-storage-daemon", &e);
    let log = launch.scratch.join(LOG);
    let mut command = child::daemon(&engine.daemon, &launch.scratch, &log, false).map_err(fail)?;
    for node in disks.nodes(launch) {
        command.args(["--blockdev", &node.to_string()]);
    }
    let export = json!({
        "type": "fuse", "id": "shown", "node-name": disks.top(), "mountpoint": shown, "writable": true,
    });
    // The monitor comes last: when it accepts connections, the disk is
    // exported.
    command
        .args(["--export", &export.to_string()])
        .args(["--chardev", "socket,id=qmp,path=qmp,server=on,wait=off"])
        .args(["--monitor", "chardev=qmp,mode=control"]);
    // SAFETY: the closure makes system calls only.
    unsafe { command.pre_exec(host::own_mounts) };
    command.spawn().map_err(fail)
}

impl ContainerInstance {
    /// Whether the host's disk with the overlay is full.
    fn host_is_full(&self) -> bool {
        space::is_scarce(&self.scratch)
    }
}

impl Instance for ContainerInstance {
    type Channel = UnixStream;

    fn runner(&self) -> String {
        self.way.clone()
    }

    fn place(&self) -> Place {
        Place::Outside(self.network.clone())
    }

    fn channel(&mut self) -> Option<UnixStream> {
        self.agent.take()
    }

    async fn snapshot(&mut self, next: &Path) -> Result<(), HostError> {
        let full = self.host_is_full();
        let fail = |e: io::Error| {
            // The kernel sees only that its device failed.
            let error = HostError::io("can't write the layer to its disk", &e);
            HostError { is_full: error.is_full || full, ..error }
        };
        let mounted =
            self.mounted.as_ref().ok_or_else(|| HostError::new("the container has already stopped"))?;
        self.disks.add(&mut self.monitor, next).await?;
        mounted.sync().map_err(fail)?;
        // Dropping it thaws the filesystem, whatever happens.
        let held = mounted.hold().map_err(fail)?;
        let switched = self.disks.switch(&mut self.monitor).await;
        drop(held);
        switched
    }

    fn guards_disk(&self) -> bool {
        true
    }

    fn way_out(&self) -> WayOut {
        self.way_out.clone()
    }

    fn trim(&self) {
        if let Some(mounted) = &self.mounted {
            mounted.trim();
        }
    }

    async fn ended(&mut self) -> Ended {
        tokio::select! {
            _ = self.daemon.wait() => {
                Ended::Killed(format!("qemu-storage-daemon: {}", child::last_words(&self.scratch.join(LOG))))
            }
            _ = self.bwrap.wait() => {
                if self.host_is_full() {
                    return Ended::HostDiskFull;
                }
                // Its last output may still be on its way.
                tokio::time::sleep(Duration::from_millis(50)).await;
                let said = self.words.text().trim().to_owned();
                if said.is_empty() { Ended::AgentGone } else { Ended::Killed(said) }
            }
        }
    }

    fn console_since(&self, seen: u64) -> (u64, Vec<u8>) {
        self.words.since(seen)
    }

    async fn stop(mut self) {
        let _ = self.bwrap.kill().await;
        if let Some(mounted) = self.mounted.take() {
            let _ = tokio::task::spawn_blocking(move || mounted.release()).await;
        }
        let _ = self.daemon.kill().await;
    }
}

/// Stops from the top down, so that the kernel is not left with a filesystem
/// without a disk.
impl Drop for ContainerInstance {
    fn drop(&mut self) {
        let _ = self.bwrap.start_kill();
        if let Some(mounted) = self.mounted.take() {
            mounted.release();
        }
        let _ = self.daemon.start_kill();
    }
}

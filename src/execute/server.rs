//! Servers: machines that keep running after vimg has ended. Each has a
//! directory with its disks, its sockets and a record.

use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use vimg_agent::protocol::{AGENT, Exec, Stream};
use vimg_lang::model::{DiskFormat, Forward, Machine};

use super::change::{self, TAIL, at};
use super::context::{BuildContext, BuildState};
use super::failure::{Failure, FailureKind};
use super::guest::{Guest, Stopped};
use super::log::clean;
use super::node::NodeContext;
use super::session::{Ended, Input, SessionError};
use super::up::{self, Stand};
use crate::digest::Key;
use crate::disk::DiskTool;
use crate::graph::{Difference, ServerPart, ServerPlan};
use crate::plan::Plan;
use crate::provider::{self, Instance, Lasting, Launch, Provider, Retarget, Servers};
use crate::store::{Boot, KeyLock, replace, try_lock};

/// The version of [`ServerRecord`].
const FORMAT: u32 = 1;

/// The longest chain of disks that a server may have. Each change adds one, and
/// a chain of 128 disks takes twice as long to read.
const MOST_DISKS: usize = 100;

/// The record of a server, `server.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ServerRecord {
    format: u32,
    /// The image that it was started from.
    pub image: String,
    /// The key of that image's base, which no change can replace.
    root: Key,
    /// When it was first started, in seconds since 1970.
    pub since: u64,
    /// Forwarded ports: address, port of the host, port of the machine.
    pub forwards: Vec<(String, u16, u16)>,
    /// The parts that are in effect.
    parts: Vec<ServerPart>,
    machine: (u32, u64, u64),
    boot: Option<Boot>,
    /// Disks below the one that takes the writes, the lowest first. All are the
    /// server's own links, because the store may later replace a state by
    /// another build, whose blocks lie elsewhere.
    chain: Vec<PathBuf>,
    overlay: PathBuf,
    /// A change is not finished; the overlay is only for this change.
    changing: bool,
    /// It has `decommission` hooks.
    #[serde(default)]
    parting: bool,
}

/// What `up` found or did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Came {
    /// It was already running.
    Running,
    /// It was off, and booted from its disk.
    Back,
    /// It is new.
    New,
}

/// The directory of a server, locked against other vimg processes.
pub struct ServerHome {
    dir: PathBuf,
    _lock: KeyLock,
}

/// Reads the record of a server. Returns `None` if there is none that this
/// version can read.
pub fn known(dir: &Path) -> Option<ServerRecord> {
    let record: ServerRecord = serde_json::from_slice(&std::fs::read(dir.join("server.json")).ok()?).ok()?;
    (record.format == FORMAT).then_some(record)
}

impl ServerHome {
    /// Locks the directory of a server. The error says why it can't be locked.
    pub fn take(dir: &Path) -> Result<Self, String> {
        if let Some(parent) = dir.parent() {
            std::fs::create_dir_all(parent).map_err(|e| format!("{}: {e}", parent.display()))?;
        }
        // No server's name begins with a full stop.
        let name = dir.file_name().unwrap_or_default().to_string_lossy();
        match try_lock(&dir.with_file_name(format!(".lock-{name}"))) {
            Ok(Some(lock)) => Ok(Self { dir: dir.to_owned(), _lock: lock }),
            Ok(None) => Err("another vimg process is using it; try again when that has ended".into()),
            Err(error) => Err(error.to_string()),
        }
    }

    fn record(&self) -> Option<ServerRecord> {
        known(&self.dir)
    }

    fn keep(&self, record: &ServerRecord) -> std::io::Result<()> {
        let bytes = serde_json::to_vec_pretty(record).map_err(std::io::Error::other)?;
        let path = self.dir.join("server.json");
        // Replace it atomically: vimg finds the server's disk only through it.
        replace(&path, &bytes)
    }

    /// Returns a free path for the server's next disk.
    fn free_disk(&self) -> PathBuf {
        let mut n = 1;
        loop {
            let path = self.dir.join(format!("disk-{n}.qcow2"));
            if !path.exists() {
                return path;
            }
            n += 1;
        }
    }

    /// Gives the server its own hard links to disks of the store. They take no
    /// space.
    fn adopt(&self, chain: &[PathBuf]) -> std::io::Result<Vec<PathBuf>> {
        let adopt = |(n, disk): (usize, &PathBuf)| {
            let own = self.dir.join(format!("base-{n}.qcow2"));
            std::fs::hard_link(disk, &own).map(|()| own)
        };
        chain.iter().enumerate().map(adopt).collect()
    }

    /// Deletes the server's record and its disks.
    fn forget(&self) -> std::io::Result<()> {
        match std::fs::remove_dir_all(&self.dir) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        }
    }
}

impl ServerRecord {
    fn forwards(&self) -> Vec<Forward> {
        let forward = |(address, host, guest): &(String, u16, u16)| Forward {
            address: address.clone(),
            host: *host,
            guest: *guest,
        };
        self.forwards.iter().map(forward).collect()
    }

    fn lead(&mut self, forwards: &[Forward]) {
        self.forwards = forwards.iter().map(|f| (f.address.clone(), f.host, f.guest)).collect();
    }

    /// Drops a change that is not finished.
    fn step_back(&mut self) {
        // The record may also name an overlay that was never created.
        if self.changing || !self.overlay.exists() {
            let _ = std::fs::remove_file(&self.overlay);
            if let Some(below) = self.chain.pop() {
                self.overlay = below;
            }
            self.changing = false;
        }
    }

    fn launch<P>(&self, site: &NodeContext<'_, P>, dir: &Path) -> Launch {
        let (cpus, memory, disk) = self.machine;
        Launch {
            chain: self.chain.clone(),
            overlay: self.overlay.clone(),
            again: true,
            machine: Machine { cpus, memory, disk },
            boot: site.boot_paths(&self.boot),
            offline: None,
            memory: None,
            network: true,
            retarget: Retarget::Never,
            scratch: dir.to_owned(),
            lasting: Some(Lasting { forwards: self.forwards() }),
        }
    }
}

/// Finds a running server and connects to its agent.
async fn find<P: Provider>(provider: &P, home: &ServerHome) -> Result<Option<Guest<P::Instance>>, String> {
    let found = servers(provider)?.find(&home.dir).await.map_err(|e| e.message)?;
    let Some(instance) = found else { return Ok(None) };
    let servers = servers(provider)?;
    let mut guest = Guest::connect(instance).map_err(|instance| {
        servers.leave(instance);
        "the machine has no agent port"
    })?;
    let ready = guest.ask(async |session| {
        session.ready(false).await?;
        // The last vimg may have ended between freeze and thaw.
        session.thaw().await
    });
    match ready.await {
        Ok(()) => Ok(Some(guest)),
        Err(stopped) => {
            servers.leave(guest.close());
            Err(format!("its agent does not answer: {}", words(stopped)))
        }
    }
}

/// Says in a few words why a server did not answer.
fn words(stopped: Stopped) -> String {
    match stopped {
        Stopped::Session(SessionError::Broken(why) | SessionError::Refused(why)) => clean(&why),
        Stopped::Session(SessionError::Step { message, .. }) => clean(&message),
        Stopped::Session(SessionError::Silent(time) | SessionError::Endless(time)) => {
            format!("no answer within {} s", time.as_secs())
        }
        Stopped::Ended(provider::Ended::Off) => "the machine switched itself off".into(),
        Stopped::Ended(provider::Ended::Panic) => "its kernel panicked".into(),
        Stopped::Ended(provider::Ended::Hangs(seconds)) => {
            format!("its processors have been stuck for {seconds} s")
        }
        Stopped::Ended(provider::Ended::AgentGone) => "the agent in the machine died".into(),
        Stopped::Ended(provider::Ended::HostDiskFull) => "the disk that holds the store is full".into(),
        Stopped::Ended(provider::Ended::DiskError(why)) => format!("its disk failed: {}", clean(&why)),
        Stopped::Ended(provider::Ended::Killed(last)) => format!("QEMU ended: {}", clean(&last)),
    }
}

/// The part of a provider that runs servers.
fn servers<P: Provider>(provider: &P) -> Result<&dyn Servers<P::Instance>, String> {
    provider.servers().ok_or_else(|| "this provider runs no servers".to_owned())
}

/// Lets a server continue when vimg ends.
fn leave<P: Provider>(provider: &P, server: Guest<P::Instance>) {
    if let Some(servers) = provider.servers() {
        servers.leave(server.close());
    }
}

/// Whether a server runs.
pub async fn runs<P: Provider>(provider: &P, dir: &Path) -> bool {
    let Some(servers) = provider.servers() else { return false };
    match servers.find(dir).await {
        Ok(Some(instance)) => {
            servers.leave(instance);
            true
        }
        // It does not answer, but it runs.
        Err(_) => true,
        Ok(None) => false,
    }
}

/// Starts a server, or boots it again from its disk.
pub async fn up<P: Provider>(
    context: &BuildContext<P>,
    plan: &ServerPlan,
    home: &ServerHome,
) -> Result<Came, Box<Failure>> {
    let shared = context.share(&Plan::default());
    let site = NodeContext { shared: &shared, node: context.graph.node(plan.image) };
    let host = |why: String| at(plan, FailureKind::Host, why);
    if let Some(mut record) = home.record() {
        if runs(&*shared.provider, &home.dir).await {
            return Ok(Came::Running);
        }
        record.step_back();
        if let Some(gone) = record.chain.iter().chain([&record.overlay]).find(|disk| !disk.exists()) {
            let mut failure = host(format!("one of its disks is missing: {}", gone.display()));
            failure.help = Some(format!("`vimg down --force --remove {}` deletes the rest of it", plan.name));
            return Err(failure);
        }
        let lives = back(&site, plan, home, &record).await?;
        return lives.map(|()| Came::Back);
    }
    if home.dir.join("server.json").exists() {
        let mut failure = host("its record can't be read, so its disk stays as it is".into());
        failure.help = Some(format!("if you do not need the disk, delete {}", home.dir.display()));
        return Err(failure);
    }
    // An earlier start may have been interrupted.
    if let Some(servers) = shared.provider.servers()
        && let Ok(Some(old)) = servers.find(&home.dir).await
    {
        old.stop().await;
    }
    home.forget()
        .and_then(|()| std::fs::create_dir_all(&home.dir))
        .map_err(|e| site.io_failure(&home.dir, e))?;
    let made = start(&shared, &site, plan, home).await;
    if made.is_err() {
        let _ = home.forget();
    }
    made.map(|()| Came::New)
}

async fn start<P: Provider>(
    shared: &BuildState<P>,
    site: &NodeContext<'_, P>,
    plan: &ServerPlan,
    home: &ServerHome,
) -> Result<(), Box<Failure>> {
    let overlay = home.dir.join("disk-0.qcow2");
    let stand = Stand {
        machine: plan.machine,
        lasting: Some(Lasting { forwards: plan.forwards.clone() }),
        ..Stand::of_person(site.node, Retarget::Never)
    };
    let up = up::up(site, &stand, &home.dir, &overlay).await?;
    let mut found = up.guest;
    let chain = match home.adopt(&up.launch.chain) {
        Ok(chain) => chain,
        Err(error) => {
            found.stop().await;
            return Err(site.io_failure(&home.dir, error));
        }
    };
    let root = shared.graph.node(shared.graph.chain(plan.image)[0]).key;
    let Machine { cpus, memory, disk } = plan.machine;
    let mut record = ServerRecord {
        format: FORMAT,
        image: site.node.image.clone(),
        root,
        since: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
        forwards: Vec::new(),
        parts: plan.base.clone(),
        machine: (cpus, memory, disk),
        boot: up.record.boot,
        chain,
        overlay,
        changing: false,
        parting: plan.has_parting(),
    };
    record.lead(&plan.forwards);
    let difference = plan.difference(&record.parts);
    let made = async {
        let change = change::prepare(site, plan, &difference).await?;
        let parts = change::make(site, plan, change, &mut found).await?;
        live(site, plan, &mut found, "begin").await.map(|()| parts)
    };
    match made.await {
        Ok(parts) => {
            record.parts = parts;
            home.keep(&record).map_err(|e| site.io_failure(&home.dir, e))?;
            leave(&*shared.provider, found);
            Ok(())
        }
        Err(failure) => {
            found.stop().await;
            Err(failure)
        }
    }
}

/// Boots a server from its disk. The inner result says whether its hooks
/// passed; it keeps running in any case.
async fn back<P: Provider>(
    site: &NodeContext<'_, P>,
    plan: &ServerPlan,
    home: &ServerHome,
    record: &ServerRecord,
) -> Result<Result<(), Box<Failure>>, Box<Failure>> {
    let mut found = up::again(site, &record.launch(site, &home.dir)).await?;
    home.keep(record).map_err(|e| site.io_failure(&home.dir, e))?;
    let lives = live(site, plan, &mut found, "live").await.map_err(|mut failure| {
        failure.help = Some(format!("the server runs; `vimg restart {}` tries again", plan.name));
        failure
    });
    leave(&*site.shared.provider, found);
    Ok(lives)
}

/// Runs the hooks of a server's boot.
async fn live<P: Provider>(
    site: &NodeContext<'_, P>,
    plan: &ServerPlan,
    found: &mut Guest<P::Instance>,
    what: &str,
) -> Result<(), Box<Failure>> {
    site.phase("hooks");
    hooks::<P>(found, what, |line| site.line(line)).await.map_err(|mut tail| {
        let mut failure = at(plan, FailureKind::Recipe, tail.pop().unwrap_or_default());
        failure.tail = tail;
        failure
    })
}

/// How much output of hooks is kept, in bytes.
const SAID: usize = 64 << 10;

/// The start of lines in which the agent itself says what failed.
const AGENT_SAYS: &str = "vimg-agent: ";

/// Has the agent run the hooks of an event. The error is the last output,
/// followed by the reason.
async fn hooks<P: Provider>(
    found: &mut Guest<P::Instance>,
    what: &str,
    mut line: impl FnMut(&str) + Send,
) -> Result<(), Vec<String>> {
    let mut said = Vec::new();
    let command = vec![AGENT.to_owned(), what.to_owned()];
    // Hooks get no input.
    let (_, input) = mpsc::channel(1);
    let mut output = |_: Stream, bytes: &[u8]| {
        said.extend_from_slice(bytes);
        said.drain(..said.len().saturating_sub(SAID));
    };
    let exec = Exec { command, terminal: None };
    let ended = found.ask(async |session| session.exec(exec, input, &mut output).await).await.map_err(words);
    let said: Vec<String> = String::from_utf8_lossy(&said).lines().map(clean).collect();
    match ended {
        Ok(Ended::Code(0)) => {
            said.iter().for_each(|text| line(text));
            Ok(())
        }
        Ok(_) => {
            let (why, mut tail): (Vec<String>, Vec<String>) =
                said.into_iter().partition(|text| text.starts_with(AGENT_SAYS));
            tail.drain(..tail.len().saturating_sub(TAIL));
            let why = why.last().and_then(|why| why.strip_prefix(AGENT_SAYS));
            tail.push(why.unwrap_or("a hook failed").to_owned());
            Err(tail)
        }
        Err(why) => Err(vec![why]),
    }
}

/// Returns how a server differs from its recipe. The error says that it was
/// never started.
pub fn difference(plan: &ServerPlan, home: &ServerHome) -> Result<Difference, String> {
    let record = home.record().ok_or("it was never started")?;
    Ok(plan.difference(&record.parts))
}

/// Changes a running server to match its recipe. If that fails, the server
/// boots from its disk as it was before.
pub async fn apply<P: Provider>(
    context: &BuildContext<P>,
    plan: &ServerPlan,
    home: &ServerHome,
) -> Result<Difference, Box<Failure>> {
    let shared = context.share(&Plan::default());
    let site = NodeContext { shared: &shared, node: context.graph.node(plan.image) };
    let host = |why: String| at(plan, FailureKind::Host, why);
    let mut record = home.record().ok_or_else(|| host("it was never started".into()))?;
    if shared.graph.node(shared.graph.chain(plan.image)[0]).key != record.root {
        let mut failure = at(plan, FailureKind::Recipe, "its image has another base now".into());
        failure.help = Some(format!("start anew: `vimg down --remove {0}`, then `vimg up {0}`", plan.name));
        return Err(failure);
    }
    if record.changing {
        let mut failure = host("its last change was interrupted".into());
        failure.help = Some(format!(
            "to go back to the disk before it: `vimg down --force {0}`, then `vimg up {0}`",
            plan.name
        ));
        return Err(failure);
    }
    let difference = plan.difference(&record.parts);
    let forwards = record.forwards();
    if difference.is_empty() && forwards == plan.forwards {
        return Ok(difference);
    }
    if let Some(stuck) = difference.stuck.first() {
        let message = format!("`{stuck}` can't be reverted: one of its scripts has no `undo`");
        let mut failure = at(plan, FailureKind::Recipe, message);
        failure.help = Some(format!("start anew: `vimg down --remove {0}`, then `vimg up {0}`", plan.name));
        return Err(failure);
    }
    let found = find(&*shared.provider, home).await.map_err(host)?;
    let mut found = found.ok_or_else(|| {
        let mut failure = host("it is switched off".into());
        failure.help = Some(format!("`vimg up {}` boots it", plan.name));
        failure
    })?;
    if record.chain.len() >= MOST_DISKS {
        leave(&*shared.provider, found);
        return Err(host("its disk has seen too many changes; start anew".into()));
    }
    if !difference.is_empty() {
        let change = match change::prepare(&site, plan, &difference).await {
            Ok(change) => change,
            Err(failure) => {
                leave(&*shared.provider, found);
                return Err(failure);
            }
        };
        if let Err(why) = branch::<P>(home, &mut record, true, &mut found).await {
            leave(&*shared.provider, found);
            return Err(host(why));
        }
        match change::make(&site, plan, change, &mut found).await {
            Ok(parts) => record.parts = parts,
            Err(mut failure) => {
                found.stop().await;
                record.step_back();
                if let Err(hook) = back(&site, plan, home, &record).await? {
                    site.notice(&hook.message);
                }
                failure.help = Some("the server has booted from its disk as it was before".into());
                return Err(failure);
            }
        }
        record.changing = false;
        record.parting = plan.has_parting();
        home.keep(&record).map_err(|e| site.io_failure(&home.dir, e))?;
    }
    let servers = servers(&*shared.provider).map_err(host)?;
    let led = servers.forward(&mut found.instance, &forwards, &plan.forwards).await;
    if led.is_ok() {
        record.lead(&plan.forwards);
    }
    home.keep(&record).map_err(|e| site.io_failure(&home.dir, e))?;
    leave(&*shared.provider, found);
    led.map_err(|e| Box::new(Failure::provider(&plan.name, plan.span, e)))?;
    Ok(difference)
}

/// Continues a server's disk in a new file. Writes the record first, so that it
/// never names a disk that is no longer written to.
async fn branch<P: Provider>(
    home: &ServerHome,
    record: &mut ServerRecord,
    changing: bool,
    found: &mut Guest<P::Instance>,
) -> Result<(), String> {
    let (before, next) = (record.clone(), home.free_disk());
    record.chain.push(std::mem::replace(&mut record.overlay, next.clone()));
    record.changing = changing;
    home.keep(record).map_err(|e| e.to_string())?;
    let branched = match found.ask(async |session| session.freeze().await).await {
        Ok(()) => found.instance.snapshot(&next).await.map_err(|e| e.message),
        Err(stopped) => Err(words(stopped)),
    };
    let thawed = found.ask(async |session| session.thaw().await).await.map_err(words);
    if branched.is_err() {
        let _ = std::fs::remove_file(&next);
        *record = before;
        home.keep(record).map_err(|e| e.to_string())?;
    }
    branched.and(thawed)
}

/// Shuts a server down in order, or with `force` ends it without asking it.
/// With `remove` and without `force`, runs its `decommission` hooks first.
/// Returns whether it was running.
pub async fn down<P: Provider>(
    provider: &P,
    home: &ServerHome,
    force: bool,
    remove: bool,
) -> Result<bool, String> {
    let ran = match force {
        true => match servers(provider)?.find(&home.dir).await.map_err(|e| e.message)? {
            Some(instance) => {
                instance.stop().await;
                true
            }
            None => false,
        },
        false => match find(provider, home).await? {
            Some(mut found) => {
                if remove && let Err(mut said) = hooks::<P>(&mut found, "decommission", |_| {}).await {
                    leave(provider, found);
                    let why = said.pop().unwrap_or_default();
                    return Err(said.pop().map_or(why.clone(), |last| format!("{why}; last output: {last}")));
                }
                found.switch_off().await.map_err(|stopped| match stopped {
                    Stopped::Ended(_) => format!("it did not shut down in order: {}", words(stopped)),
                    stopped => words(stopped),
                })?;
                true
            }
            None if remove && home.record().is_some_and(|record| record.parting) => {
                return Err(
                    "it is off, and has hooks to run before its removal: start it with `vimg up`".into()
                );
            }
            None => false,
        },
    };
    if remove {
        home.forget().map_err(|e| format!("{}: {e}", home.dir.display()))?;
    }
    Ok(ran)
}

/// Runs a program in a running server.
pub async fn exec<P: Provider>(
    provider: &P,
    home: &ServerHome,
    exec: Exec,
    listen: impl FnOnce() -> mpsc::Receiver<Input>,
    mut output: impl FnMut(Stream, &[u8]) + Send,
) -> Result<Ended, String> {
    let Some(mut found) = find(provider, home).await? else {
        return Err("it is switched off".into());
    };
    let input = listen();
    let ended = found.ask(async |session| session.exec(exec, input, &mut output).await).await;
    leave(provider, found);
    ended.map_err(words)
}

/// Writes the current disk of a server to a file without a backing file.
pub async fn save<P: Provider>(
    provider: &P,
    disks: &dyn DiskTool,
    home: &ServerHome,
    to: &Path,
) -> Result<(), String> {
    let mut record = home.record().ok_or("it was never started")?;
    if record.changing {
        return Err("its last change was interrupted".into());
    }
    if let Some(mut found) = find(provider, home).await? {
        let room = record.chain.len() < MOST_DISKS;
        let branched = match room {
            true => branch::<P>(home, &mut record, false, &mut found).await,
            false => Err("its disk has seen too many changes".into()),
        };
        leave(provider, found);
        branched?;
        return disks.export(&record.chain, DiskFormat::Qcow2, to).await.map_err(|e| e.message);
    }
    let mut chain = record.chain;
    chain.push(record.overlay);
    disks.export(&chain, DiskFormat::Qcow2, to).await.map_err(|e| e.message)
}

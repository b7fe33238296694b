//! Servers: machines that keep running after vimg has ended. Each has a
//! directory with its disks, its sockets and a record.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use tokio::sync::mpsc;
use vimg_agent::protocol::{AGENT, Exec, Stream};
use vimg_lang::model::{DiskFormat, Forward, Machine};

use super::change::{self, ServerContext, TAIL};
use super::context::BuildContext;
use super::failure::Failure;
use super::guest::{Guest, Stopped};
use super::log::clean;
use super::node::NodeContext;
use super::node_failure::{FailureKind, NodeFailure};
use super::order::NodeOrder;
use super::session::{Ended, Input, SessionError};
use super::up::{self, Stand};
use super::worker::Worker;
use crate::disk::DiskTool;
use crate::graph::{Difference, ServerPart, ServerPlan};
use crate::provider::{self, Instance, Lasting, Launch, Provider, Retarget, Servers};
use crate::store::{self, Record, ServerHome, read_server};

/// The longest chain of disks that a server may have. Each change adds one, and
/// a chain of 128 disks takes twice as long to read.
const MOST_DISKS: usize = 100;

/// The record of a server.
pub type ServerRecord = store::ServerRecord<ServerPart>;

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

/// Reads the record of a server. Returns `None` if there is none that this
/// version can read.
pub fn known(dir: &Path) -> Option<ServerRecord> {
    read_server(dir)
}

fn forwards(record: &ServerRecord) -> Vec<Forward> {
    let forward = |(address, host, guest): &(String, u16, u16)| Forward {
        address: address.clone(),
        host: *host,
        guest: *guest,
    };
    record.forwards.iter().map(forward).collect()
}

fn lead(record: &mut ServerRecord, forwards: &[Forward]) {
    record.forwards = forwards.iter().map(|f| (f.address.clone(), f.host, f.guest)).collect();
}

/// Returns the request to boot a server from its own disks.
fn launch(home: &ServerHome, record: &ServerRecord, boot: Option<(PathBuf, PathBuf)>) -> Launch {
    let (cpus, memory, disk) = record.machine;
    Launch {
        chain: home.chain(record),
        overlay: home.overlay(record),
        again: true,
        machine: Machine { cpus, memory, disk },
        boot,
        offline: None,
        memory: None,
        network: true,
        retarget: Retarget::Never,
        scratch: home.dir().to_owned(),
        lasting: Some(Lasting { forwards: forwards(record) }),
    }
}

/// Finds a running server and connects to its agent.
async fn find<P: Provider>(provider: &P, home: &ServerHome) -> Result<Option<Guest<P::Instance>>, String> {
    let found = servers(provider)?.find(home.dir()).await.map_err(|e| e.message)?;
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

/// Returns the context of a server.
fn server<'a, P>(
    context: &'a BuildContext<P>,
    worker: &'a Worker<P>,
    node: &'a NodeOrder,
    plan: &'a ServerPlan,
) -> ServerContext<'a, P> {
    let site = NodeContext { worker, node };
    ServerContext { site, context, plan }
}

/// Starts a server, or boots it again from its disk.
pub async fn up<P: Provider>(
    context: &BuildContext<P>,
    plan: &ServerPlan,
    home: &ServerHome,
) -> Result<Came, Box<Failure>> {
    let worker = context.worker();
    let node = NodeOrder::new(&context.graph, plan.image, &BTreeMap::new());
    let server = server(context, &worker, &node, plan);
    if let Some(mut record) = home.record() {
        if runs(&*worker.provider, home.dir()).await {
            return Ok(Came::Running);
        }
        home.step_back(&mut record);
        if let Some(gone) = home.missing(&record) {
            let mut failure = server.host(format!("one of its disks is missing: {}", gone.display()));
            failure.help = Some(format!("`vimg down --force --remove {}` deletes the rest of it", plan.name));
            return Err(failure);
        }
        let lives = back(&server, home, &record).await?;
        return lives.map(|()| Came::Back);
    }
    if home.has_record() {
        let mut failure = server.host("its record can't be read, so its disk stays as it is".into());
        failure.help = Some(format!("if you do not need the disk, delete {}", home.dir().display()));
        return Err(failure);
    }
    // An earlier start may have been interrupted.
    if let Some(servers) = worker.provider.servers()
        && let Ok(Some(old)) = servers.find(home.dir()).await
    {
        old.stop().await;
    }
    home.forget()
        .and_then(|()| std::fs::create_dir_all(home.dir()))
        .map_err(|e| server.io_failure(home.dir(), e))?;
    let made = start(&server, home).await;
    if made.is_err() {
        let _ = home.forget();
    }
    made.map(|()| Came::New)
}

async fn start<P: Provider>(server: &ServerContext<'_, P>, home: &ServerHome) -> Result<(), Box<Failure>> {
    let ServerContext { site, context, plan } = server;
    let graph = &context.graph;
    let overlay = home.free_disk();
    let stand = Stand {
        machine: plan.machine,
        lasting: Some(Lasting { forwards: plan.forwards.clone() }),
        ..Stand::of_person(site.node, Retarget::Never)
    };
    let up = up::up(site, &stand, home.dir(), &home.dir().join(&overlay)).await;
    let up = up.map_err(|failure| server.placed(*failure))?;
    let mut found = up.guest;
    let chain = match own(server, home, &up.launch.chain, &up.record) {
        Ok(chain) => chain,
        Err(failure) => {
            found.stop().await;
            return Err(failure);
        }
    };
    let root = graph.node(graph.chain(plan.image)[0]).key;
    let Machine { cpus, memory, disk } = plan.machine;
    let mut record = ServerRecord {
        image: graph.node(plan.image).image.clone(),
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
    lead(&mut record, &plan.forwards);
    let difference = plan.difference(&record.parts);
    let made = async {
        let change = change::prepare(server, &difference).await?;
        let parts = change::make(server, change, &mut found).await?;
        live(server, &mut found, "begin").await.map(|()| parts)
    };
    match made.await {
        Ok(parts) => {
            record.parts = parts;
            home.keep(&record).map_err(|e| server.io_failure(home.dir(), e))?;
            leave(&*site.worker.provider, found);
            Ok(())
        }
        Err(failure) => {
            found.stop().await;
            Err(failure)
        }
    }
}

/// Gives a server that has started everything that it stands on. Returns the
/// names of its disks.
fn own<P>(
    server: &ServerContext<'_, P>,
    home: &ServerHome,
    chain: &[PathBuf],
    state: &Record,
) -> Result<Vec<PathBuf>, Box<Failure>> {
    let store = &server.site.worker.store;
    let names = home.adopt(chain).and_then(|names| home.boot(store, &state.boot).map(|_| names));
    let names = names.map_err(|error| {
        let message = format!("it can't have hard links to its disks: {error}");
        let mut failure = server.failure(FailureKind::Store, &message);
        failure.help = Some("the store must be in one filesystem that has hard links".into());
        failure
    })?;
    // The links must be to the disks that the machine has started from.
    let stood = store.chain_of(&(state.key, state.id)).is_some_and(|now| now == chain);
    if stood { Ok(names) } else { Err(server.placed(*server.site.gone())) }
}

/// Boots a server from its disk. The inner result says whether its hooks
/// passed; it keeps running in any case.
async fn back<P: Provider>(
    server: &ServerContext<'_, P>,
    home: &ServerHome,
    record: &ServerRecord,
) -> Result<Result<(), Box<Failure>>, Box<Failure>> {
    let ServerContext { site, plan, .. } = server;
    let boot = home.boot(&site.worker.store, &record.boot).map_err(|error| {
        let why = format!("its kernel or initrd is missing: {error}");
        let mut failure = server.failure(FailureKind::Store, &why);
        failure.help = Some("its disks are whole: `vimg save` writes them to a file".into());
        failure
    })?;
    let found = up::again(site, &launch(home, record, boot)).await;
    let mut found = found.map_err(|failure| server.placed(*failure))?;
    home.keep(record).map_err(|e| server.io_failure(home.dir(), e))?;
    let lives = live(server, &mut found, "live").await.map_err(|mut failure| {
        failure.help = Some(format!("the server runs; `vimg restart {}` tries again", plan.name));
        failure
    });
    leave(&*site.worker.provider, found);
    Ok(lives)
}

/// Runs the hooks of a server's boot.
async fn live<P: Provider>(
    server: &ServerContext<'_, P>,
    found: &mut Guest<P::Instance>,
    what: &str,
) -> Result<(), Box<Failure>> {
    server.site.phase("hooks");
    hooks::<P>(found, what, |line| server.site.line(line)).await.map_err(|mut tail| {
        let mut failure = server.failure(FailureKind::Recipe, &tail.pop().unwrap_or_default());
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

/// Returns why the server of a record can't be changed, if that is so.
fn refusal<P>(
    server: &ServerContext<'_, P>,
    record: &ServerRecord,
    difference: &Difference,
) -> Option<Box<Failure>> {
    let (graph, plan) = (&server.context.graph, server.plan);
    let help = |mut failure: Box<Failure>, help: String| {
        failure.help = Some(help);
        Some(failure)
    };
    let anew = || format!("start anew: `vimg down --remove {0}`, then `vimg up {0}`", plan.name);
    if graph.node(graph.chain(plan.image)[0]).key != record.root {
        return help(server.failure(FailureKind::Recipe, "its image has another base now"), anew());
    }
    if record.changing {
        let back = "to go back to the disk before it";
        return help(
            server.host("its last change was interrupted".into()),
            format!("{back}: `vimg down --force {0}`, then `vimg up {0}`", plan.name),
        );
    }
    let stuck = difference.stuck.first()?;
    let message = format!("`{stuck}` can't be reverted: one of its scripts has no `undo`");
    help(server.failure(FailureKind::Recipe, &message), anew())
}

/// Changes a running server to match its recipe. If that fails, the server
/// boots from its disk as it was before.
pub async fn apply<P: Provider>(
    context: &BuildContext<P>,
    plan: &ServerPlan,
    home: &ServerHome,
) -> Result<Difference, Box<Failure>> {
    let worker = context.worker();
    let node = NodeOrder::new(&context.graph, plan.image, &BTreeMap::new());
    let server = server(context, &worker, &node, plan);
    let mut record = home.record().ok_or_else(|| server.host("it was never started".into()))?;
    let difference = plan.difference(&record.parts);
    if let Some(failure) = refusal(&server, &record, &difference) {
        return Err(failure);
    }
    let forwards = forwards(&record);
    if difference.is_empty() && forwards == plan.forwards {
        return Ok(difference);
    }
    let found = find(&*worker.provider, home).await.map_err(|why| server.host(why))?;
    let mut found = found.ok_or_else(|| {
        let mut failure = server.host("it is switched off".into());
        failure.help = Some(format!("`vimg up {}` boots it", plan.name));
        failure
    })?;
    if record.chain.len() >= MOST_DISKS {
        leave(&*worker.provider, found);
        return Err(server.host("its disk has seen too many changes; start anew".into()));
    }
    if !difference.is_empty() {
        found = changed(&server, home, (&mut record, &difference), found).await?;
    }
    let servers = servers(&*worker.provider).map_err(|why| server.host(why))?;
    let led = servers.forward(&mut found.instance, &forwards, &plan.forwards).await;
    if led.is_ok() {
        lead(&mut record, &plan.forwards);
    }
    home.keep(&record).map_err(|e| server.io_failure(home.dir(), e))?;
    leave(&*worker.provider, found);
    led.map_err(|e| Box::new(Failure::at(plan.span, NodeFailure::provider(&plan.name, e))))?;
    Ok(difference)
}

/// Reverts and applies the parts of a difference in a running server, on a new
/// disk. Returns the server.
async fn changed<P: Provider>(
    server: &ServerContext<'_, P>,
    home: &ServerHome,
    (record, difference): (&mut ServerRecord, &Difference),
    mut found: Guest<P::Instance>,
) -> Result<Guest<P::Instance>, Box<Failure>> {
    let provider = &*server.site.worker.provider;
    let change = match change::prepare(server, difference).await {
        Ok(change) => change,
        Err(failure) => {
            leave(provider, found);
            return Err(failure);
        }
    };
    if let Err(why) = branch::<P>(home, record, true, &mut found).await {
        leave(provider, found);
        return Err(server.host(why));
    }
    match change::make(server, change, &mut found).await {
        Ok(parts) => record.parts = parts,
        Err(mut failure) => {
            found.stop().await;
            home.step_back(record);
            if let Err(hook) = back(server, home, record).await? {
                server.site.notice(&hook.message);
            }
            failure.help = Some("the server has booted from its disk as it was before".into());
            return Err(failure);
        }
    }
    record.changing = false;
    record.parting = server.plan.has_parting();
    home.keep(record).map_err(|e| server.io_failure(home.dir(), e))?;
    Ok(found)
}

/// Continues a server's disk in a new file. Writes the record first, so that it
/// never names a disk that is no longer written to.
async fn branch<P: Provider>(
    home: &ServerHome,
    record: &mut ServerRecord,
    changing: bool,
    found: &mut Guest<P::Instance>,
) -> Result<(), String> {
    let (before, name) = (record.clone(), home.free_disk());
    let next = home.dir().join(&name);
    record.chain.push(std::mem::replace(&mut record.overlay, name));
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
        true => match servers(provider)?.find(home.dir()).await.map_err(|e| e.message)? {
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
            None if remove && home.record().is_some_and(|record: ServerRecord| record.parting) => {
                return Err(
                    "it is off, and has hooks to run before its removal: start it with `vimg up`".into()
                );
            }
            None => false,
        },
    };
    if remove {
        home.forget().map_err(|e| format!("{}: {e}", home.dir().display()))?;
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
        return disks.export(&home.chain(&record), DiskFormat::Qcow2, to).await.map_err(|e| e.message);
    }
    let mut chain = home.chain(&record);
    chain.push(home.overlay(&record));
    disks.export(&chain, DiskFormat::Qcow2, to).await.map_err(|e| e.message)
}

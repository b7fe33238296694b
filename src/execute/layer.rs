//! Builds one layer in a running instance: applies it, freezes the disk and
//! commits it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::SemaphorePermit;
use vimg_agent::protocol::Apply;

use super::explain::explain;
use super::guest::{Guest, Stopped};
use super::inputs::Inputs;
use super::log::Log;
use super::make::{Facts, Made, NodeBuild};
use super::node::NodeContext;
use super::node_failure::{FailureKind, NodeFailure};
use super::order::{LayerOrder, Needs, Task};
use super::session::{Blobs, Progress, SessionError, Source};
use super::up::{self, Started};
use crate::digest::Digest;
use crate::files::FileError;
use crate::host::space;
use crate::provider::{Instance, Launch, Provider};
use crate::store::{Disk, DiskKind, FailedDisk, Staging};

/// A chain of disks is flattened when it would become longer than this. Opening
/// and reading a chain of 16 takes no measurable time, one of 128 takes twice
/// as long, and at 1,000 qemu-img crashes.
const MAX_DEPTH: u32 = 16;

/// How long it may take to freeze the disk of a layer that failed.
const LAST_REST: Duration = Duration::from_secs(60);

/// The instance of a batch, and what is known of its disk.
pub(super) struct Running<'a, I: Instance> {
    pub(super) guest: Guest<I>,
    /// How it was launched, with the disks below the one that takes the writes.
    launch: Launch,
    made: Facts,
    /// The part of its job that it gives up with its first step. Before that, a
    /// machine that has just started still has several things to do at once.
    /// Afterwards it mostly does one after the other.
    spare: Option<SemaphorePermit<'a>>,
}

impl<'a, I: Instance> Running<'a, I> {
    pub(super) fn on(up: Started<I>, spare: Option<SemaphorePermit<'a>>) -> Self {
        let Started { guest, launch, record, disk } = up;
        let made = Facts {
            disk,
            boot: record.boot,
            appliance: record.appliance,
            trusted_filesystem: record.trusted_filesystem && guest.instance.guards_disk(),
            provider: guest.instance.runner(),
            source: None,
            inherited: Vec::new(),
            same: None,
        };
        Self { guest, launch, made, spare }
    }
}

/// Builds one node in a running instance and commits it.
pub(super) async fn make<P: Provider>(
    build: &NodeBuild<'_, P>,
    running: &mut Running<'_, P::Instance>,
    staging: Staging,
    next_disk: &Path,
    last: bool,
) -> Made {
    let node = build.node;
    let log_path = staging.path().join("log.zst");
    let mut log = Log::create(&log_path).map_err(|e| build.io_failure(&log_path, e))?;
    let outcome = match &node.task {
        Task::Layer { layer, blobs } => {
            let blobs = stage_blobs(build, build.inputs, layer, blobs.clone(), &staging).await?;
            match apply(build, running, layer, &blobs, &staging, &mut log).await {
                Err(Stop::Failure(failure)) => return Err(failure),
                Err(Stop::Stopped(trouble)) => Err(trouble),
                Ok(boot_changed) => Ok(boot_changed),
            }
        }
        task => {
            let agent = !matches!(task, Task::Seal { agent: false });
            seal(build, running, &mut log, agent).await.map(|()| false)
        }
    };
    let boot_changed = match outcome {
        Ok(boot_changed) => boot_changed,
        Err(trouble) => {
            let tail = log.finish();
            let alive = matches!(trouble, Stopped::Session(SessionError::Step { .. }));
            let mut failure = explain(build, &mut running.guest.instance, trouble, Some(tail)).await;
            failure.log = build.keep_log(&log_path);
            if alive {
                keep_failed(build, running, &staging, next_disk, &failure).await;
            }
            return Err(failure);
        }
    };
    log.finish();
    match settle(build, running, &staging, next_disk, boot_changed, last).await {
        Ok(()) => keep(build, running, staging).await,
        Err(Stop::Failure(failure)) => Err(failure),
        Err(Stop::Stopped(trouble)) => Err(explain(build, &mut running.guest.instance, trouble, None).await),
    }
}

/// Seals the machine, and tells what that removed.
async fn seal<P: Provider>(
    build: &NodeBuild<'_, P>,
    running: &mut Running<'_, P::Instance>,
    log: &mut Log,
    agent: bool,
) -> Result<(), Stopped> {
    build.phase("seal");
    running.spare = None;
    let sealed = running.guest.ask(async |session| session.seal(agent).await).await?;
    running.guest.instance.trim();
    for removed in &sealed.removed {
        log.text(&format!("removed {removed}\n"), |_| {});
    }
    for key in &sealed.private_keys {
        build.notice(&format!(
            "{}: all machines of this image have the private key {key}, which no layer declares",
            build.node.name
        ));
    }
    Ok(())
}

/// Why the build of a layer stops.
enum Stop {
    /// The reason is known.
    Failure(Box<NodeFailure>),
    /// The machine's console or its end may say why.
    Stopped(Stopped),
}

/// Applies a layer, and boots its machine again at each step `reboot`. Returns
/// whether the files that the machine boots have changed since they were last
/// fetched.
async fn apply<P: Provider>(
    build: &NodeBuild<'_, P>,
    running: &mut Running<'_, P::Instance>,
    what: &LayerOrder,
    blobs: &Staged,
    staging: &Staging,
    log: &mut Log,
) -> Result<bool, Stop> {
    for note in &what.notes {
        build.notice(&format!("{}: {note}", build.node.name));
    }
    build.phase("apply");
    let offline = build.node.needs == Needs::Disk;
    let names = &what.labels;
    let (layer, steps) = (what.layer.clone(), what.steps.clone());
    let host = running.guest.instance.way_out().host;
    let mut apply = Apply { layer, steps, from: 0, offline, durable: false, host };
    loop {
        let Running { guest, spare, .. } = &mut *running;
        let way_out = guest.instance.way_out();
        let mut hear = |progress: Progress<'_>| match progress {
            Progress::Started(step) => {
                *spare = None;
                log.heading(&names[step]);
                build.phase(&names[step]);
            }
            Progress::Output(text) => log.text(text, |line| build.line(line)),
            Progress::Finished { step, changed } => {
                if !changed {
                    log.heading(&format!("{}: unchanged", names[step]));
                }
            }
        };
        let applied =
            guest.ask(async |session| session.apply(&apply, blobs, &way_out, &mut hear).await).await;
        // The next layer must not find the network open.
        let closed = way_out.set(false).await;
        let applied = applied.map_err(Stop::Stopped)?;
        closed.map_err(|e| {
            Stop::Failure(build.failure(FailureKind::Host, format!("the network can't be closed: {e}")))
        })?;
        let Some(next) = applied.next else { return Ok(applied.boot_changed) };
        if applied.boot_changed {
            take_boot(build, running, staging).await?;
        }
        reboot(build, running, staging, next).await?;
        apply.from = next;
    }
}

/// Shuts the machine down in order and boots it again on the same disk, after the
/// first `steps` steps of the layer.
async fn reboot<P: Provider>(
    build: &NodeBuild<'_, P>,
    running: &mut Running<'_, P::Instance>,
    staging: &Staging,
    steps: usize,
) -> Result<(), Stop> {
    running.guest.switch_off().await.map_err(Stop::Stopped)?;
    let node = build.node;
    running.launch = Launch {
        overlay: staging.path().join(DiskKind::Qcow2.file_name()),
        again: true,
        parameters: node.task.parameters(&node.parameters, steps).line(),
        boot: build.boot_paths(&running.made.boot),
        memory: None,
        ..running.launch.clone()
    };
    running.guest = up::again(build, &running.launch).await.map_err(Stop::Failure)?;
    build.phase("apply");
    Ok(())
}

/// Commits to the store the kernel and initrd that the machine would boot now.
/// Without a kernel, the machine boots with its own loader, if it has one. A
/// disk that boots with its own loader continues to do so.
async fn take_boot<P: Provider>(
    build: &NodeBuild<'_, P>,
    running: &mut Running<'_, P::Instance>,
    staging: &Staging,
) -> Result<(), Stop> {
    let Running { guest, made, .. } = &mut *running;
    if made.boot.is_none() {
        return Ok(());
    }
    let files = (staging.path().join("vmlinuz"), staging.path().join("initrd"));
    let fetched = guest.ask(async |session| session.boot_files([&files.0, &files.1]).await).await;
    made.boot = match fetched {
        Ok(()) => Some(build.keep_boot(&files).map_err(Stop::Failure)?),
        Err(Stopped::Session(SessionError::Refused(_))) => None,
        Err(stopped) => return Err(Stop::Stopped(stopped)),
    };
    Ok(())
}

/// Keeps the disk of a layer that failed, for `vimg shell --failed`. Best
/// effort.
async fn keep_failed<P: Provider>(
    build: &NodeBuild<'_, P>,
    running: &mut Running<'_, P::Instance>,
    staging: &Staging,
    next_disk: &Path,
    failure: &NodeFailure,
) {
    let Running { guest, made, .. } = running;
    let Some(on) = made.disk.backing else { return };
    let Some(below) = build.node.parent.and_then(|key| Some((key, build.worker.store.record(&key)?.id)))
    else {
        return;
    };
    let rest = tokio::time::timeout(LAST_REST, async {
        guest.ask(async |session| session.freeze().await).await.ok()?;
        guest.instance.snapshot(next_disk).await.ok()
    });
    if let Ok(Some(())) = rest.await {
        let disk = staging.path().join(DiskKind::Qcow2.file_name());
        let failed = FailedDisk { below, on, why: failure.message.clone() };
        let _ = build.worker.notes.keep_failed(&build.node.name, &disk, &failed);
    }
}

/// Freezes the machine's disk and continues on a new one.
async fn settle<P: Provider>(
    build: &NodeBuild<'_, P>,
    running: &mut Running<'_, P::Instance>,
    staging: &Staging,
    next_disk: &Path,
    boot_changed: bool,
    last: bool,
) -> Result<(), Stop> {
    build.phase("snapshot");
    if boot_changed {
        take_boot(build, running, staging).await?;
    }
    let guest = &mut running.guest;
    guest.ask(async |session| session.freeze().await).await.map_err(Stop::Stopped)?;
    guest.instance.snapshot(next_disk).await.map_err(|e| Stop::Failure(build.provider_failure(e)))?;
    if last {
        return Ok(());
    }
    guest.ask(async |session| session.thaw().await).await.map_err(Stop::Stopped)
}

/// Commits a disk that is no longer written to.
async fn keep<P: Provider>(
    build: &NodeBuild<'_, P>,
    running: &mut Running<'_, P::Instance>,
    staging: Staging,
) -> Made {
    let (worker, node) = (build.worker, build.node);
    let own = staging.path().join(DiskKind::Qcow2.file_name());
    let mut made = running.made.clone();
    if made.disk.depth >= MAX_DEPTH {
        build.phase("flatten");
        let mut chain = running.launch.chain.clone();
        chain.push(own.clone());
        let flat = staging.path().join("flat.qcow2");
        worker.disks.flatten(&chain, &flat).await.map_err(|e| build.provider_failure(e))?;
        // The running machine still has the old file open.
        std::fs::rename(&flat, &own).map_err(|e| build.io_failure(&own, e))?;
        // A retargeted machine has booted from other disks than its parent's.
        let owners = running.launch.chain.iter().filter_map(|disk| worker.store.owner(disk));
        made.inherited = owners.flat_map(|owner| worker.store.origins(&owner.key)).collect();
        made.disk = Disk { kind: DiskKind::Qcow2, backing: None, depth: 0 };
    }
    made.same = build.same(&running.launch.chain, &own, &made).await;
    build.phase("store");
    let depth = made.disk.depth;
    let (id, built) = build.commit(staging, made).await?;
    let Some(id) = id else {
        // The store has another build of this state, which is not the machine's
        // disk.
        return Err(build.gone());
    };
    running.made.disk = Disk { kind: DiskKind::Qcow2, backing: Some((node.key, id)), depth: depth + 1 };
    running.launch.chain = worker.store.chain(&node.key).ok_or_else(|| build.gone())?;
    Ok(built)
}

/// The blobs of a layer, copied so that no other program can change them.
pub(super) struct Staged {
    blobs: BTreeMap<Digest, Source>,
    secrets: BTreeMap<String, Arc<[u8]>>,
}

impl Blobs for Staged {
    fn get(&self, digest: &Digest) -> Option<Source> {
        self.blobs.get(digest).cloned()
    }

    fn secret(&self, name: &str) -> Option<Arc<[u8]>> {
        self.secrets.get(name).cloned()
    }
}

/// Gets the blobs and the secrets of a layer.
pub(super) async fn stage_blobs<P: Provider>(
    site: &NodeContext<'_, P>,
    inputs: &Arc<dyn Inputs>,
    layer: &LayerOrder,
    blobs: BTreeSet<Digest>,
    staging: &Staging,
) -> Result<Staged, Box<NodeFailure>> {
    let mut secrets = BTreeMap::new();
    for (n, step) in layer.steps.iter().enumerate() {
        for name in step.secrets() {
            match inputs.secret(name) {
                Ok(value) => secrets.insert(name.clone(), value),
                Err(why) => {
                    let mut failure = site
                        .failure(FailureKind::Recipe, format!("the secret `{name}` is not available: {why}"));
                    failure.step = Some(n);
                    return Err(failure);
                }
            };
        }
    }
    let (inputs, to) = (inputs.clone(), staging.path().join("inputs"));
    let copied = tokio::task::spawn_blocking(move || {
        std::fs::create_dir_all(&to).map_err(|e| FileError {
            file: to.display().to_string(),
            why: e.to_string(),
            is_full: space::is_full(&e),
        })?;
        let blob = |digest| Ok((digest, inputs.blob(&digest, &to.join(digest.to_string()))?));
        blobs.into_iter().map(blob).collect::<Result<BTreeMap<_, _>, FileError>>()
    })
    .await;
    match copied {
        Ok(Ok(blobs)) => Ok(Staged { blobs, secrets }),
        Ok(Err(error)) => {
            let message = format!("{}: {}", error.file, error.why);
            Err(match error.is_full {
                true => site.full(Some(message)),
                false => site.failure(FailureKind::Recipe, message),
            })
        }
        Err(error) => Err(site.failure(FailureKind::Host, error.to_string())),
    }
}

//! Prewarms a fork for checks while the layer below them is still built: forks
//! the snapshot that will probably fit, and retargets the fork when the layer
//! is done. Best effort: if it fails, the checks start their own fork.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::task::{AbortHandle, JoinSet};

use super::guest::Guest;
use super::node::NodeContext;
use super::order::PrewarmOrder;
use super::up::{self, StartOptions, Started};
use super::worker::Worker;
use crate::provider::{Instance, Place, Provider};
use crate::store::{Disk, DiskKind, Staging};

/// How long a fork waits for its checks. After that, the time for a new one
/// hardly counts.
const AGE: Duration = Duration::from_secs(30);
/// How long a check waits for the fork.
const PATIENCE: Duration = Duration::from_secs(10);

/// A fork that is being started. It ends when no check takes it in time, or
/// when this is dropped.
pub(super) struct Prewarm<P: Provider> {
    tasks: JoinSet<Option<PrewarmedFork<P>>>,
    task: AbortHandle,
    wanted: Arc<Notify>,
}

impl<P: Provider> Prewarm<P> {
    /// Begins to start a fork for a check whose image does not exist yet.
    pub(super) fn begin(worker: Arc<Worker<P>>, order: PrewarmOrder) -> Self {
        let (mut tasks, wanted) = (JoinSet::new(), Arc::new(Notify::new()));
        let called = wanted.clone();
        let task = tasks.spawn(async move {
            let prewarm = fork(&worker, &order).await?;
            match tokio::time::timeout(AGE, called.notified()).await {
                Ok(()) => Some(prewarm),
                Err(_) => {
                    prewarm.guest.stop().await;
                    None
                }
            }
        });
        Self { tasks, task, wanted }
    }

    /// Whether the fork has failed or was given up.
    pub(super) fn is_over(&self) -> bool {
        self.task.is_finished()
    }

    /// Waits until the fork is ready.
    pub(super) async fn up(mut self) -> Option<PrewarmedFork<P>> {
        self.wanted.notify_one();
        tokio::time::timeout(PATIENCE, self.tasks.join_next()).await.ok()??.ok()?
    }
}

/// A fork whose agent answers, from the snapshot of another disk.
pub(super) struct PrewarmedFork<P: Provider> {
    guest: Guest<P::Instance>,
    /// Units that failed at its boot.
    failed: Vec<String>,
    /// The directory of its files.
    scratch: Staging,
}

async fn fork<P: Provider>(worker: &Worker<P>, order: &PrewarmOrder) -> Option<PrewarmedFork<P>> {
    let PrewarmOrder { check: node, below, before } = order;
    // A fork that waits must hold nothing that a layer needs. It holds a part
    // of a job only until it is up. It reserves no memory, because it takes
    // little for a short time.
    let _job = worker.jobs.acquire().await.ok()?;
    if worker.memory.available_permits() < worker.memory_of(node) as usize {
        return None;
    }
    let state = *below.iter().find(|key| worker.store.has(key))?;
    let snapshots = worker.provider.snapshots()?;
    let site = NodeContext { worker, node };
    let scratch = site.staging().ok()?;
    // The new image is probably almost like the previous one.
    let chain = before.and_then(|key| worker.store.chain(&key));
    // A check with a network starts its own fork.
    let options = StartOptions { chain, network: false, ..StartOptions::of_check(node, state) };
    let (mut launch, _) = up::prepare(&site, &options, scratch.path(), &overlay(&scratch)).ok()?;
    if let Some(record) = before.and_then(|key| worker.store.record(&key)) {
        launch.boot = site.boot_paths(&record.boot);
    }
    let mut guest = Guest::connect(snapshots.prewarm(&launch).await?).ok()?;
    let place = guest.instance.place();
    let ready = guest.ask(async |session| {
        let failed = session.ready(false).await?;
        // The new image will probably need the changes that the previous one
        // needed.
        if let Place::Retargeted(retargeted) = place {
            session.rehearse(&retargeted.altered).await?;
        }
        Ok(failed)
    });
    // Pause the machine: no check needs what it does by itself.
    let still = match ready.await {
        Ok(failed) => snapshots.pause(&mut guest.instance).await.ok().map(|()| failed),
        Err(_) => None,
    };
    match still {
        Some(failed) => Some(PrewarmedFork { guest, failed, scratch }),
        None => {
            guest.stop().await;
            None
        }
    }
}

/// Returns the path of the disk that takes a fork's writes.
pub(super) fn overlay(scratch: &Staging) -> PathBuf {
    scratch.path().join(DiskKind::Qcow2.file_name())
}

impl<P: Provider> PrewarmedFork<P> {
    /// Retargets the fork to a state that exists now. Returns `None` if that
    /// fails. A new fork may still fit, because this one has run for a while.
    pub(super) async fn adopt(
        self,
        site: &NodeContext<'_, P>,
        options: &StartOptions,
    ) -> Option<(Started<P::Instance>, Staging)> {
        let Self { mut guest, failed, scratch } = self;
        let (mut launch, record) = up::prepare(site, options, scratch.path(), &overlay(&scratch)).ok()?;
        let snapshots = site.worker.provider.snapshots()?;
        let retargeted = match snapshots.retargeted(&launch, &guest.instance).await {
            Some(retargeted) if snapshots.resume(&mut guest.instance).await.is_ok() => {
                let done = guest.ask(async |session| session.retarget(&retargeted.altered).await).await;
                done.ok().map(|()| retargeted)
            }
            _ => None,
        };
        let Some(retargeted) = retargeted else {
            guest.stop().await;
            return None;
        };
        up::tell_failed(site, &failed);
        launch.chain = retargeted.chain;
        let backing = Some((options.state, record.id));
        let disk = Disk { kind: DiskKind::Qcow2, backing, depth: record.disk.depth + 1 };
        Some((Started { guest, launch, record, disk }, scratch))
    }
}

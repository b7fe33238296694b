//! Builds one node: holds its lock, takes its time, and commits its state.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use super::batch_context::BatchContext;
use super::executor::{Built, Report};
use super::inputs::Inputs;
use super::node::NodeContext;
use super::node_failure::{FailureKind, NodeFailure};
use super::order::{Needs, Task};
use super::retargeted::hands_secrets;
use crate::digest::{Blob, Key};
use crate::disk;
use crate::provider::Provider;
use crate::store::{Boot, Disk, DiskKind, KeyLock, Origin, Record, Staging, StateId};

pub(super) type Made = Result<Built, Box<NodeFailure>>;

/// The build of one node, whatever its kind.
pub(super) struct NodeBuild<'a, P> {
    site: NodeContext<'a, P>,
    pub(super) inputs: &'a Arc<dyn Inputs>,
    start: Instant,
    /// Held until the node's state is committed, or the build of the node has
    /// failed.
    lock: Arc<KeyLock>,
}

impl<'a, P> std::ops::Deref for NodeBuild<'a, P> {
    type Target = NodeContext<'a, P>;

    fn deref(&self) -> &NodeContext<'a, P> {
        &self.site
    }
}

impl<'a, P: Provider> NodeBuild<'a, P> {
    /// Begins to build the node `n` of a batch.
    pub(super) fn begin(batch: &'a BatchContext<P>, n: usize, lock: Arc<KeyLock>) -> Self {
        batch.report(n, Report::Start);
        Self { site: batch.site(n), inputs: &batch.context.inputs, start: Instant::now(), lock }
    }

    /// Makes the record of a state that is built now.
    fn record(&self, made: &Facts) -> Record {
        let (kind, description) = (&self.node.kind, self.node.description.clone());
        let mut record = Record::new(self.node.key, kind, &self.node.name, description, made.disk.clone());
        record.boot = made.boot;
        record.appliance = made.appliance;
        record.trusted_filesystem = made.trusted_filesystem;
        record.made = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        record.seconds = self.start.elapsed().as_secs_f64();
        record.provider = made.provider.clone();
        record.source = made.source;
        record.inherited = made.inherited.clone();
        record.same = made.same;
        record
    }

    /// Commits a staging directory as the node's state. Writing to disk blocks,
    /// so another thread does it. That thread holds the lock as well, because
    /// it continues when the build is stopped. The ID is `None` if there was
    /// already a state with this key, although the lock should prevent that;
    /// the old state stays.
    pub(super) async fn commit(
        &self,
        staging: Staging,
        made: Facts,
    ) -> Result<(Option<StateId>, Built), Box<NodeFailure>> {
        let mut record = self.record(&made);
        // The store checks the origins of the disks below. Those of everything
        // else that the state is made from must be in its own record.
        let parent = self.node.parent.filter(|_| record.disk.backing.is_none());
        for key in parent.iter().chain(&self.node.others) {
            record.inherited.extend(self.worker.store.origins(key));
        }
        record.inherited.sort();
        record.inherited.dedup();
        record.bytes = on_disk(&staging.path().join(made.disk.kind.file_name()));
        let (bytes, id) = (record.bytes, record.id);
        self.worker.notes.forget_failed(&self.node.name);
        let (store, lock) = (self.worker.store.clone(), self.lock.clone());
        let done = tokio::task::spawn_blocking(move || {
            let done = store.commit(staging, &record);
            drop(lock);
            done
        });
        let is_own = match done.await {
            Ok(Ok(is_own)) => is_own,
            Ok(Err(error)) => return Err(self.store_failure(&error)),
            Err(error) => return Err(self.failure(FailureKind::Store, error.to_string())),
        };
        let same = made.same.filter(|_| is_own).map(|(of, _)| of);
        let built = Built { seconds: self.start.elapsed().as_secs_f64(), bytes, same };
        Ok((is_own.then_some(id), built))
    }

    /// Returns the previous state of this node, if a new disk that is no longer
    /// written to is identical to it (early cutoff).
    pub(super) async fn same(&self, below: &[PathBuf], disk: &Path, made: &Facts) -> Option<(Key, StateId)> {
        let (node, store) = (self.node, &self.worker.store);
        let Task::Layer { .. } = node.task else { return None };
        let key = node.before?;
        let was = store.record(&key)?;
        let now = self.record(made);
        let facts = |record: &Record| (record.description.facts.parent, record.description.facts.booted);
        let fits = now.disk.backing.is_some()
            && was.disk.backing == now.disk.backing
            && (was.boot, was.appliance) == (now.boot, now.appliance)
            && facts(&was) == facts(&now)
            && !hands_secrets(&was)
            && !hands_secrets(&now);
        let mut chain = store.chain(&key).filter(|_| fits)?;
        let booted = node.needs == Needs::Machine;
        let before = disk::Made { disk: chain.pop()?, during: was.during(), booted };
        let after = disk::Made { disk: disk.to_owned(), during: now.during(), booted };
        let alike = chain == below && self.worker.disks.alike(below, &before, &after).await;
        // The state that the previous one was identical to, if that still
        // counts.
        let known = was.same.filter(|(other, _)| *other != node.key && store.stands_for(&key) == *other);
        alike.then(|| known.unwrap_or((key, was.id)))
    }

    /// Commits a file to the store as a blob.
    pub(super) fn keep_file(&self, path: &Path) -> Result<Blob, Box<NodeFailure>> {
        let file = std::fs::File::open(path).map_err(|e| self.io_failure(path, e))?;
        let blob = Blob::copy(file, &mut std::io::sink()).map_err(|e| self.io_failure(path, e))?;
        self.worker.store.commit_blob(path, &blob).map_err(|e| self.store_failure(&e))?;
        Ok(blob)
    }

    /// Commits kernel and initrd to the store.
    pub(super) fn keep_boot(&self, files: &(PathBuf, PathBuf)) -> Result<Boot, Box<NodeFailure>> {
        Ok(Boot { kernel: self.keep_file(&files.0)?, initrd: self.keep_file(&files.1)? })
    }
}

/// What the record of a state says beyond its node.
#[derive(Debug, Clone)]
pub(super) struct Facts {
    pub(super) disk: Disk,
    pub(super) boot: Option<Boot>,
    pub(super) appliance: Option<Boot>,
    pub(super) trusted_filesystem: bool,
    /// The runner, for people.
    pub(super) provider: String,
    /// Of an output: the state that it was written from.
    pub(super) source: Option<(Key, StateId)>,
    /// The origins of the states that it was made from, besides those of its
    /// parent.
    pub(super) inherited: Vec<Origin>,
    /// The identical earlier state.
    pub(super) same: Option<(Key, StateId)>,
}

impl Facts {
    /// Returns the facts of a state that does not boot and has no states above
    /// it.
    pub(super) fn of(kind: DiskKind, provider: String) -> Self {
        let disk = Disk { kind, backing: None, depth: 0 };
        Self {
            disk,
            boot: None,
            appliance: None,
            trusted_filesystem: false,
            provider,
            source: None,
            inherited: Vec::new(),
            same: None,
        }
    }
}

/// Returns the size of a file on disk, in bytes.
fn on_disk(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    // st_blocks counts units of 512 bytes, on every filesystem.
    std::fs::metadata(path).map_or(0, |m| m.blocks() * 512)
}

//! The context of the batches that this machine builds. It knows neither the
//! graph nor the project.

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use tokio::sync::{Semaphore, SemaphorePermit};

use super::order::{Needs, NodeOrder, Task};
use super::staged::StagedOutputs;
use crate::base::Distribution;
use crate::disk::DiskTool;
use crate::event::{Event, Sink};
use crate::host::network::Access;
use crate::provider::OFFLINE_MEMORY;
use crate::store::{Lease, ProjectFiles, Store};

/// The parts of a job. A job is for two processors: a machine that starts keeps
/// both busy. A running machine, a fork for checks and a conversion take half a
/// job.
pub(super) const JOB: u32 = 2;

/// What all batches on this machine share.
pub(super) struct Worker<P> {
    pub(super) store: Store,
    pub(super) provider: Arc<P>,
    pub(super) disks: Arc<dyn DiskTool>,
    pub(super) distributions: &'static [&'static dyn Distribution],
    pub(super) access: Access,
    pub(super) sink: Sink,
    /// Free jobs, in parts of a job.
    pub(super) jobs: Semaphore,
    /// Free memory for instances, in MiB.
    pub(super) memory: Semaphore,
    pub(super) memory_mib: u32,
    pub(super) use_snapshots: bool,
    pub(super) staged: Arc<StagedOutputs>,
    pub(super) boots: AtomicUsize,
    /// Holds the logs and disks of failed layers.
    pub(super) notes: ProjectFiles,
    pub(super) lease: Lease,
}

impl<P> Worker<P> {
    pub(super) fn tell(&self, event: Event) {
        (self.sink)(event);
    }

    /// Whether a state exists under another key than the plan assumed (early
    /// cutoff).
    pub(super) fn has_moved(&self, node: &NodeOrder) -> bool {
        matches!(node.task, Task::Layer { .. }) && self.store.stands_for(&node.key) != node.stands_for
    }

    /// The memory that an instance for a node may take, in MiB.
    pub(super) fn memory_of(&self, node: &NodeOrder) -> u32 {
        let memory = match node.needs {
            // A fork for checks writes to little of the memory that it maps.
            Needs::Machine if self.use_snapshots && matches!(node.task, Task::Check(_)) => {
                node.machine.memory / 4
            }
            Needs::Machine => node.machine.memory,
            Needs::Disk | Needs::Nothing => OFFLINE_MEMORY,
        };
        ((memory >> 20) as u32).min(self.memory_mib)
    }

    /// Waits for the memory of an instance for a node.
    pub(super) async fn reserve(&self, node: &NodeOrder) -> Option<SemaphorePermit<'_>> {
        // A semaphore that is never closed always gives its permits.
        self.memory.acquire_many(self.memory_of(node)).await.ok()
    }
}

//! The context of a build: what the caller gives, and what all nodes share.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use tokio::sync::{Semaphore, SemaphorePermit};

use super::failure::placed;
use super::node_failure::{FailureKind, NodeFailure};
use super::order::{Needs, NodeOrder, Task};
use super::room::Room;
use super::staged::StagedOutputs;
use super::states::{States, Step};
use crate::base::Distribution;
use crate::disk::DiskTool;
use crate::event::{Event, Sink};
use crate::files::Project;
use crate::graph::{Graph, NodeId};
use crate::host::network::Access;
use crate::plan::Plan;
use crate::provider::OFFLINE_MEMORY;
use crate::store::{Lease, ProjectFiles, Store};

/// How much of the host a build may use.
#[derive(Debug, Clone, Copy)]
pub struct Budget {
    /// Machines and conversions in parallel.
    pub jobs: usize,
    /// Memory of all machines together, in bytes.
    pub memory: u64,
    /// Continue with nodes that do not depend on a failed one.
    pub keep_going: bool,
    /// Store memory snapshots of booted machines, and fork them.
    pub use_snapshots: bool,
}

/// Secrets by name, each with its value or the reason why it has none.
pub type Secrets = BTreeMap<String, Result<Arc<[u8]>, String>>;

/// The parts of a job. A job is for two processors: a machine that starts keeps
/// both busy. A running machine, a fork for checks and a conversion take half a
/// job.
pub(super) const JOB: u32 = 2;

/// What all batches of a build share.
pub(super) struct BuildState<P> {
    pub(super) graph: Arc<Graph>,
    pub(super) store: Store,
    pub(super) project: Arc<Project>,
    pub(super) secrets: Arc<Secrets>,
    pub(super) provider: Arc<P>,
    pub(super) disks: Arc<dyn DiskTool>,
    pub(super) distributions: &'static [&'static dyn Distribution],
    pub(super) access: Access,
    pub(super) sink: Sink,
    pub(super) states: States,
    /// Free jobs, in parts of a job.
    pub(super) jobs: Semaphore,
    /// Free memory for instances, in MiB.
    pub(super) memory: Semaphore,
    pub(super) memory_mib: u32,
    pub(super) use_snapshots: bool,
    pub(super) staged: Arc<StagedOutputs>,
    pub(super) boots: AtomicUsize,
    /// The notes of the project, which also hold the logs and disks of failed
    /// layers.
    pub(super) notes: ProjectFiles,
    pub(super) lease: Lease,
    room: Arc<Room>,
}

impl<P> BuildState<P> {
    /// Ends the build of a node with a failure. All failures arrive here. If
    /// the disk was full and there is room now, returns `true`: the node can be
    /// built again.
    pub(super) async fn fail(&self, id: NodeId, failure: Box<NodeFailure>) -> bool {
        let failure = placed(&self.graph, id, *failure);
        let failure = match failure.kind {
            FailureKind::Full => {
                self.room.make(&self.store, &self.sink, failure, || self.states.running(id)).await
            }
            FailureKind::Recipe | FailureKind::Host | FailureKind::Store => Some(failure),
        };
        let again = failure.is_none();
        self.states.set(id, failure.map_or(Step::Again, Step::Fail));
        again
    }

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

/// What a build needs.
pub struct BuildContext<P> {
    /// All nodes.
    pub graph: Arc<Graph>,
    /// The store of the states.
    pub store: Store,
    /// The project, with its files.
    pub project: Arc<Project>,
    /// Secrets for scripts.
    pub secrets: Arc<Secrets>,
    /// Runs machines, appliances and containers.
    pub provider: Arc<P>,
    /// Works on disks.
    pub disks: Arc<dyn DiskTool>,
    /// Where bases come from.
    pub distributions: &'static [&'static dyn Distribution],
    /// What a bootstrap may reach.
    pub access: Access,
    /// Receives events.
    pub sink: Sink,
    /// How much of the host may be used.
    pub budget: Budget,
    /// Copies of outputs that are made during the build.
    pub staged: Arc<StagedOutputs>,
    /// Keeps garbage collections from the states that the build uses.
    pub lease: Lease,
    /// Makes room on a full disk.
    pub room: Arc<Room>,
}

impl<P> BuildContext<P> {
    /// Gives nodes above states that are identical to earlier ones their old
    /// keys (early cutoff). Returns whether a key has changed.
    pub(super) fn resolve(&mut self) -> bool {
        let mut graph = Graph::clone(&self.graph);
        let changed = graph.resolve(|key| self.store.stands_for(key));
        if changed {
            // A lease that can't be written is no reason to stop: a state that is
            // gone is built again.
            let _ = self.store.lease_more(&self.lease, graph.keys());
            self.graph = Arc::new(graph);
        }
        changed
    }

    pub(super) fn share(&self, plan: &Plan) -> BuildState<P> {
        let notes = self.store.project(self.project.root());
        let memory_mib = (self.budget.memory >> 20).clamp(128, u64::from(u32::MAX >> 4)) as u32;
        BuildState {
            store: self.store.clone(),
            lease: self.lease.clone(),
            room: self.room.clone(),
            project: self.project.clone(),
            secrets: self.secrets.clone(),
            provider: self.provider.clone(),
            disks: self.disks.clone(),
            distributions: self.distributions,
            access: self.access.clone(),
            sink: self.sink.clone(),
            states: States::new(self.graph.clone(), self.sink.clone(), plan),
            jobs: Semaphore::new(self.budget.jobs.max(1) * JOB as usize),
            memory: Semaphore::new(memory_mib as usize),
            memory_mib,
            use_snapshots: self.budget.use_snapshots,
            staged: self.staged.clone(),
            boots: AtomicUsize::new(0),
            notes,
            graph: self.graph.clone(),
        }
    }
}

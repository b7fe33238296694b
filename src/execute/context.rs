//! The context of a build: what the caller gives, and what the scheduler knows.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use tokio::sync::Semaphore;

use super::failure::placed;
use super::node_failure::{FailureKind, NodeFailure};
use super::room::Room;
use super::staged::StagedOutputs;
use super::states::{States, Step};
use super::worker::{JOB, Worker};
use crate::base::Distribution;
use crate::disk::DiskTool;
use crate::event::Sink;
use crate::files::Project;
use crate::graph::{Graph, NodeId};
use crate::host::network::Access;
use crate::plan::Plan;
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

/// What a build has above the workers.
pub(super) struct BuildState<E> {
    pub(super) graph: Arc<Graph>,
    pub(super) project: Arc<Project>,
    pub(super) secrets: Arc<Secrets>,
    pub(super) store: Store,
    pub(super) states: States,
    /// The notes of the project.
    pub(super) notes: ProjectFiles,
    /// Builds the batches.
    pub(super) executor: E,
    sink: Sink,
    room: Arc<Room>,
}

impl<E> BuildState<E> {
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

    /// Makes the context of all that this machine builds.
    pub(super) fn worker(&self) -> Worker<P> {
        let memory_mib = (self.budget.memory >> 20).clamp(128, u64::from(u32::MAX >> 4)) as u32;
        Worker {
            store: self.store.clone(),
            provider: self.provider.clone(),
            disks: self.disks.clone(),
            distributions: self.distributions,
            access: self.access.clone(),
            sink: self.sink.clone(),
            jobs: Semaphore::new(self.budget.jobs.max(1) * JOB as usize),
            memory: Semaphore::new(memory_mib as usize),
            memory_mib,
            use_snapshots: self.budget.use_snapshots,
            staged: self.staged.clone(),
            boots: AtomicUsize::new(0),
            notes: self.store.project(self.project.root()),
            lease: self.lease.clone(),
        }
    }

    /// Makes the state of a build whose batches `executor` builds.
    pub(super) fn share<E>(&self, plan: &Plan, executor: E) -> BuildState<E> {
        BuildState {
            graph: self.graph.clone(),
            project: self.project.clone(),
            secrets: self.secrets.clone(),
            store: self.store.clone(),
            states: States::new(self.graph.clone(), self.sink.clone(), plan),
            notes: self.store.project(self.project.root()),
            executor,
            sink: self.sink.clone(),
            room: self.room.clone(),
        }
    }
}

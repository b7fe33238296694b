//! What a build is given, and what all of its nodes share.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use tokio::sync::{Semaphore, SemaphorePermit};

use super::staged::StagedOutputs;
use super::states::States;
use crate::event::{Event, Sink};
use crate::files::Project;
use crate::graph::{Graph, Needs, Node, Work};
use crate::plan::Plan;
use crate::provider::OFFLINE_MEMORY;
use crate::store::{ProjectFiles, Store};

/// How much of the host a build may use.
#[derive(Debug, Clone, Copy)]
pub struct Budget {
    /// Machines and conversions at once.
    pub jobs: usize,
    /// Memory of all machines together, in bytes.
    pub memory: u64,
    /// Go on with what does not depend on a failed node.
    pub keep_going: bool,
    /// Keep the memory of machines that booted, to fork them.
    pub use_snapshots: bool,
}

/// Secrets by name, each with its value or why there is none.
pub type Secrets = BTreeMap<String, Result<Arc<[u8]>, String>>;

/// A job is for two processors. A machine that comes up keeps both busy; one
/// that is up, a fork that is asked and a conversion are half a job.
pub(super) const JOB: u32 = 2;

/// What all runs of a build share.
pub(super) struct BuildState<P> {
    pub(super) graph: Arc<Graph>,
    pub(super) store: Store,
    pub(super) project: Arc<Project>,
    pub(super) secrets: Arc<Secrets>,
    pub(super) provider: Arc<P>,
    pub(super) sink: Sink,
    pub(super) states: States,
    /// In parts of a job.
    pub(super) jobs: Semaphore,
    /// In MiB.
    pub(super) memory: Semaphore,
    pub(super) memory_mib: u32,
    pub(super) use_snapshots: bool,
    pub(super) staged: Arc<StagedOutputs>,
    pub(super) boots: AtomicUsize,
    /// The project's notes: where logs and disks of failures go.
    pub(super) notes: ProjectFiles,
}

impl<P> BuildState<P> {
    pub(super) fn tell(&self, event: Event) {
        (self.sink)(event);
    }

    /// Whether a state that is there is known by another key than the plan
    /// thought.
    pub(super) fn has_moved(&self, node: &Node) -> bool {
        matches!(node.work, Work::Layer(_)) && self.store.stands_for(&node.key) != node.stands_for
    }

    /// The memory that an instance for a node may take, in MiB.
    pub(super) fn memory_of(&self, node: &Node) -> u32 {
        let memory = match node.needs {
            // A fork for questions writes to little of what it maps.
            Needs::Machine if self.use_snapshots && matches!(node.work, Work::Check(_)) => {
                node.machine.memory / 4
            }
            Needs::Machine => node.machine.memory,
            Needs::Disk | Needs::Nothing => OFFLINE_MEMORY,
        };
        ((memory >> 20) as u32).min(self.memory_mib)
    }

    /// Waits for it.
    pub(super) async fn reserve(&self, node: &Node) -> Option<SemaphorePermit<'_>> {
        // A semaphore that is never closed always gives its permits.
        self.memory.acquire_many(self.memory_of(node)).await.ok()
    }
}

/// Where and with what a build is done.
pub struct BuildContext<P> {
    /// All nodes.
    pub graph: Arc<Graph>,
    /// Where states are.
    pub store: Store,
    /// Where files are read from.
    pub project: Arc<Project>,
    /// What scripts may be handed.
    pub secrets: Arc<Secrets>,
    /// What runs machines.
    pub provider: Arc<P>,
    /// Who is told.
    pub sink: Sink,
    /// How much of the host may be used.
    pub budget: Budget,
    /// What is copied to where it is wanted while the build goes on.
    pub staged: Arc<StagedOutputs>,
}

impl<P> BuildContext<P> {
    /// Takes notice of which states hold the same as others. Says whether
    /// anything has another key now.
    pub(super) fn resolve(&mut self) -> bool {
        let mut graph = Graph::clone(&self.graph);
        let changed = graph.resolve(|key| self.store.stands_for(key));
        if changed {
            self.graph = Arc::new(graph);
        }
        changed
    }

    pub(super) fn share(&self, plan: &Plan) -> BuildState<P> {
        let notes = self.store.project(self.project.root());
        let memory_mib = (self.budget.memory >> 20).clamp(128, u64::from(u32::MAX >> 4)) as u32;
        BuildState {
            store: self.store.clone(),
            project: self.project.clone(),
            secrets: self.secrets.clone(),
            provider: self.provider.clone(),
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

//! Makes what the plan says is missing: the only module that touches both a
//! provider and the store.
//!
//! Nodes are made in *runs*. A run is a chain of nodes that one machine makes
//! one after the other, its disk switched between them, so that ten layers
//! boot once; each of them is a state of its own. Where a chain forks, one
//! branch goes on in the machine and the others start from the state that was
//! kept. Runs whose first parent is there are made in parallel, as far as
//! processors and memory go. `runs` cuts the plan into runs, `run` makes one,
//! `session` speaks with an agent, `log` keeps what it says.
//!
//! A layer that was made anew may hold what it held before. What is made from
//! it is then known by another key, and is mostly there already: `rounds` plans
//! again and goes on.

use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::{Semaphore, SemaphorePermit, mpsc};
use tokio::task::JoinSet;
use vimg_lang::Span;

use ahead::Coming;

use crate::event::{Event, Sink};
use crate::files::Project;
use crate::graph::{Graph, Needs, Node, NodeId, Work};
use crate::plan::{Plan, Reason};
use crate::provider::{OFFLINE_MEMORY, Provider, ProviderError};
use crate::store::{ProjectFiles, Store, StoreError};

mod ahead;
pub mod caching;
mod carried;
mod change;
mod checks;
mod compare;
mod drafts;
mod explain;
mod interact;
mod layer;
mod log;
mod output;
mod rounds;
mod run;
mod runs;
pub mod server;
mod session;
mod site;
mod up;

pub use compare::{Change, Comparison, How, compare};
pub use drafts::Drafts;
pub use interact::{Ended, Input, interact, watch};
pub use log::read as read_log;
pub use output::write_outputs;
pub use rounds::{make, remember};

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
    pub keep_memory: bool,
}

/// Why a node could not be made.
#[derive(Debug, Clone)]
pub struct Failure {
    /// The node's name.
    pub node: String,
    /// Where to look in the recipe.
    pub span: Span,
    /// What kind of failure it is.
    pub kind: FailureKind,
    /// What happened, in a sentence.
    pub message: String,
    /// Another place, and what it has to do with it.
    pub related: Option<(Span, String)>,
    /// What to do about it.
    pub help: Option<String>,
    /// The last lines that were printed before.
    pub tail: Vec<String>,
    /// Where the whole log is.
    pub log: Option<PathBuf>,
}

/// Kinds of failure, for exit codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FailureKind {
    /// What the recipe asks for does not work.
    Recipe,
    /// The host lacks something, or a program of it failed.
    Host,
    /// The store can't be written.
    Store,
}

/// What came of a build.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Nodes that were made.
    pub built: usize,
    /// Nodes that were there.
    pub reused: usize,
    /// Nodes that failed; those above them were not tried.
    pub failures: Vec<Failure>,
    /// How many machines were booted.
    pub boots: usize,
    /// A state is known by another key than before, and nothing was made from
    /// it yet.
    pub moved: bool,
}

/// Secrets by name, each with its value or why there is none.
pub type Secrets = BTreeMap<String, Result<Arc<[u8]>, String>>;

/// A job is for two processors. A machine that comes up keeps both busy; one
/// that is up, a fork that is asked and a conversion are half a job.
const JOB: u32 = 2;

/// What all runs of a build share.
struct Shared<P> {
    graph: Arc<Graph>,
    store: Store,
    project: Arc<Project>,
    secrets: Arc<Secrets>,
    provider: Arc<P>,
    sink: Sink,
    reasons: BTreeMap<NodeId, Reason>,
    /// In parts of a job.
    jobs: Semaphore,
    /// In MiB.
    memory: Semaphore,
    memory_mib: u32,
    keep_memory: bool,
    drafts: Arc<Drafts>,
    boots: AtomicUsize,
    /// The project's notes: where logs and disks of failures go.
    notes: ProjectFiles,
}

impl<P> Shared<P> {
    fn tell(&self, event: Event) {
        (self.sink)(event);
    }

    /// Whether a state that is there is known by another key than the plan
    /// thought.
    fn has_moved(&self, node: &Node) -> bool {
        matches!(node.work, Work::Layer(_)) && self.store.stands_for(&node.key) != node.stands_for
    }

    /// The memory that an instance for a node may take, in MiB.
    fn memory_of(&self, node: &Node) -> u32 {
        let memory = match node.needs {
            // A fork for questions writes to little of what it maps.
            Needs::Machine if self.keep_memory && matches!(node.work, Work::Check(_)) => {
                node.machine.memory / 4
            }
            Needs::Machine => node.machine.memory,
            Needs::Disk | Needs::Nothing => OFFLINE_MEMORY,
        };
        ((memory >> 20) as u32).min(self.memory_mib)
    }

    /// Waits for it.
    async fn reserve(&self, node: &Node) -> Option<SemaphorePermit<'_>> {
        // A semaphore that is never closed always gives its permits.
        self.memory.acquire_many(self.memory_of(node)).await.ok()
    }
}

/// A node is settled: runs that wait for it can start, or never will.
enum Settled {
    There(NodeId),
    Built(NodeId),
    /// It is there, or was built now if that is said, and is known by another
    /// key than the plan thought: what is made from it waits for the next
    /// round. Whoever finds that out says so once, because it may change.
    Moved(NodeId, bool),
    Failed(NodeId, Box<Failure>),
}

/// Where and with what a build is done.
pub struct Workshop<P> {
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
    pub drafts: Arc<Drafts>,
}

impl<P> Workshop<P> {
    /// Takes notice of which states hold the same as others. Says whether
    /// anything has another key now.
    fn resolve(&mut self) -> bool {
        let mut graph = Graph::clone(&self.graph);
        let changed = graph.resolve(|key| self.store.stands_for(key));
        if changed {
            self.graph = Arc::new(graph);
        }
        changed
    }

    fn share(&self, reasons: BTreeMap<NodeId, Reason>) -> Shared<P> {
        let notes = self.store.project(self.project.root());
        let memory_mib = (self.budget.memory >> 20).clamp(128, u64::from(u32::MAX >> 4)) as u32;
        Shared {
            store: self.store.clone(),
            project: self.project.clone(),
            secrets: self.secrets.clone(),
            provider: self.provider.clone(),
            sink: self.sink.clone(),
            reasons,
            jobs: Semaphore::new(self.budget.jobs.max(1) * JOB as usize),
            memory: Semaphore::new(memory_mib as usize),
            memory_mib,
            keep_memory: self.budget.keep_memory,
            drafts: self.drafts.clone(),
            boots: AtomicUsize::new(0),
            notes,
            graph: self.graph.clone(),
        }
    }
}

/// Makes what `plan` says is to be built, but for what is made from a state
/// that turned out to hold the same as one before.
pub async fn build<P: Provider>(workshop: &Workshop<P>, plan: &Plan) -> Outcome {
    let Workshop { graph, sink, budget, .. } = workshop;
    let mut outcome = Outcome { reused: plan.reused(), ..Outcome::default() };
    let reasons = plan.to_build().map(|(id, reason)| (id, reason.clone())).collect();
    let shared = Arc::new(workshop.share(reasons));
    let urgency = runs::urgency(graph, plan, &shared.store, &shared.notes.nodes());
    let mut waiting = runs::cut(graph, plan);
    let mut settled: HashSet<NodeId> =
        plan.steps.keys().copied().filter(|id| !shared.reasons.contains_key(id)).collect();
    let mut dead: HashSet<NodeId> = HashSet::new();
    let mut moved: HashSet<NodeId> = HashSet::new();
    let (sender, mut receiver) = mpsc::unbounded_channel();
    let mut tasks: JoinSet<Vec<NodeId>> = JoinSet::new();
    let mut stopping = false;
    // What is made now or was made, and a fork for checks of it.
    let mut started: HashSet<NodeId> = HashSet::new();
    let mut ahead: Option<(NodeId, Coming<P>)> = None;
    let mut tried: HashSet<NodeId> = HashSet::new();
    // Those whose earlier outputs are copied, if there are any.
    let mut copied: HashSet<NodeId> = HashSet::new();
    loop {
        let ready = |run: &Vec<NodeId>| graph.node(run[0]).parent.is_none_or(|p| settled.contains(&p));
        let (mut start_now, later): (Vec<_>, Vec<_>) =
            waiting.into_iter().partition(|run| !stopping && ready(run));
        waiting = later;
        // Who starts first gets a processor first.
        start_now.sort_by(|a, b| urgency[&b[0]].total_cmp(&urgency[&a[0]]));
        for run in start_now {
            let coming = ahead.take_if(|(check, _)| *check == run[0]).map(|(_, coming)| coming);
            started.extend(&run);
            tasks.spawn(run::make(shared.clone(), run, coming, sender.clone()));
        }
        let gone =
            |id: NodeId| graph.node(id).parent.is_some_and(|p| dead.contains(&p) || moved.contains(&p));
        ahead.take_if(|(check, coming)| coming.is_over() || gone(*check));
        // Once each, and one at a time: what is forked for checks that are long
        // to come only waits.
        if ahead.is_none() && budget.keep_memory && !stopping {
            let is_next = |run: &&Vec<NodeId>| {
                let node = graph.node(run[0]);
                let is_new = matches!(node.work, Work::Check(_)) && !tried.contains(&run[0]);
                is_new && node.parent.is_some_and(|p| started.contains(&p))
            };
            let next = waiting.iter().find(is_next).map(|run| run[0]);
            tried.extend(next);
            ahead = next.map(|check| (check, Coming::begin(shared.clone(), check)));
        }
        // What is to be in an output is almost there.
        let almost = |id: &NodeId| {
            let below = |id: NodeId| graph.node(id).parent;
            below(*id).is_none_or(|parent| below(parent).is_none_or(|layer| settled.contains(&layer)))
        };
        for run in waiting.iter().filter(|run| !stopping && almost(&run[0])) {
            if copied.insert(run[0]) {
                run::copy_earlier(&shared, run[0]);
            }
        }
        if tasks.is_empty() && receiver.is_empty() {
            break;
        }
        tokio::select! {
            biased;
            Some(news) = receiver.recv() => match news {
                Settled::There(id) => { settled.insert(id); outcome.reused += 1; }
                Settled::Built(id) => { settled.insert(id); outcome.built += 1; }
                Settled::Moved(id, built) => {
                    moved.insert(id);
                    outcome.built += usize::from(built);
                    outcome.reused += usize::from(!built);
                }
                Settled::Failed(id, failure) => {
                    sink(Event::Failed { node: failure.node.clone(), message: failure.message.clone() });
                    outcome.failures.push(*failure);
                    dead.insert(id);
                    stopping |= !budget.keep_going;
                }
            },
            Some(rest) = tasks.join_next() => match rest {
                // Another process makes a node of the run; wait for it there.
                Ok(rest) if !rest.is_empty() => waiting.push(rest),
                Ok(_) => {}
                Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
                Err(_) => {}
            },
        }
    }
    outcome.moved = !moved.is_empty();
    outcome.boots = shared.boots.load(Ordering::Relaxed);
    if !dead.is_empty() {
        let of_moved = |id: &NodeId| graph.chain(*id).iter().any(|below| moved.contains(below));
        let tried = |id: &NodeId| settled.contains(id) || dead.contains(id);
        for id in shared.reasons.keys().filter(|id| !tried(id) && !of_moved(id)) {
            shared.tell(Event::Skipped { node: graph.node(*id).name.clone() });
        }
    }
    outcome
}

impl Failure {
    fn new(node: &str, span: Span, kind: FailureKind, message: impl Into<String>) -> Self {
        Self {
            node: node.to_owned(),
            span,
            kind,
            message: message.into(),
            related: None,
            help: None,
            tail: Vec::new(),
            log: None,
        }
    }

    fn provider(node: &str, span: Span, error: ProviderError) -> Self {
        Self { help: error.help, ..Self::new(node, span, FailureKind::Host, error.message) }
    }

    fn store(node: &str, span: Span, error: &StoreError) -> Self {
        let mut failure = Self::new(node, span, FailureKind::Store, error.to_string());
        if error.is_full() {
            failure.help =
                Some("the disk that holds the store is full: remove old states, or set VIMG_STORE".into());
        }
        failure
    }
}

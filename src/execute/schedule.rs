//! Starts every batch whose inputs exist, the critical path first, until none
//! is left that can start. Prewarming and the copies of previous outputs run
//! beside the build, and observe the states of the nodes.

use std::sync::Arc;

use tokio::task::JoinSet;

use super::batches::{self, Batch};
use super::context::{BuildContext, BuildState};
use super::dispatch;
use super::executor::Executor;
use super::local::Local;
use super::order::{NodeOrder, PrewarmOrder};
use super::states::{NodeState, Outcome};
use crate::graph::{NodeId, Work};
use crate::plan::Plan;
use crate::provider::Provider;

/// Batches that have not started, and what decides whether they can.
struct Schedule<'a, E> {
    shared: &'a Arc<BuildState<E>>,
    waiting: Vec<Batch>,
    keep_going: bool,
}

impl<E: Executor> Schedule<'_, E> {
    /// Whether no more batches start.
    fn is_stopping(&self) -> bool {
        !self.keep_going && self.shared.states.has_failures()
    }

    /// Takes the batches that can start.
    fn start(&mut self) -> Vec<Batch> {
        if self.is_stopping() {
            return Vec::new();
        }
        let states = &self.shared.states;
        let is_ready = |batch: &Batch| states.of(batch[0]) == NodeState::Ready;
        let (ready, waiting) = std::mem::take(&mut self.waiting).into_iter().partition(is_ready);
        self.waiting = waiting;
        ready
    }

    /// Begins to copy the previous output, if the node is an output.
    fn copy_earlier(&self, id: NodeId) {
        let BuildState { graph, notes, executor, .. } = &**self.shared;
        if matches!(graph.node(id).work, Work::Export(_)) {
            executor.copy_earlier(&NodeOrder::new(graph, id, &notes.nodes()));
        }
    }

    fn is_waiting(&self, id: NodeId) -> bool {
        self.waiting.iter().any(|batch| batch.contains(&id))
    }
}

/// Forks a machine for checks while their image is still built: one at a time,
/// and once for each.
struct Prewarmer<E: Executor> {
    fork: Option<(NodeId, E::Fork)>,
    tried: Vec<NodeId>,
}

impl<E: Executor> Prewarmer<E> {
    /// The fork for a batch of checks that starts.
    fn take(&mut self, first: NodeId) -> Option<E::Fork> {
        self.fork.take_if(|(check, _)| *check == first).map(|(_, fork)| fork)
    }

    fn observe(&mut self, schedule: &Schedule<'_, E>) {
        let BuildState { graph, states, notes, executor, .. } = &**schedule.shared;
        self.fork.take_if(|(check, fork)| executor.is_over(fork) || states.has_lost_inputs(*check));
        if self.fork.is_some() || schedule.is_stopping() {
            return;
        }
        // A fork for checks that come much later would only wait.
        let next = schedule.waiting.iter().map(|batch| batch[0]).find(|id| {
            let node = graph.node(*id);
            let is_near = !node.inputs().any(|input| schedule.is_waiting(input));
            matches!(node.work, Work::Check(_))
                && is_near
                && !states.has_lost_inputs(*id)
                && !self.tried.contains(id)
        });
        if let Some(check) = next {
            self.tried.push(check);
            let order = PrewarmOrder::new(graph, check, &notes.nodes());
            self.fork = executor.prewarm(order).map(|fork| (check, fork));
        }
    }
}

/// Copies the previous outputs of nodes that will start soon, once each.
#[derive(Default)]
struct Copier(Vec<NodeId>);

impl Copier {
    fn observe<E: Executor>(&mut self, schedule: &Schedule<'_, E>) {
        if schedule.is_stopping() {
            return;
        }
        for id in schedule.waiting.iter().map(|batch| batch[0]) {
            // An output is made from the seal, which is made from a layer.
            let seal = schedule.shared.graph.node(id).parent();
            let layer = seal.and_then(|seal| schedule.shared.states.of_parent(seal));
            if layer.is_none_or(NodeState::is_there) && !self.0.contains(&id) {
                self.0.push(id);
                schedule.copy_earlier(id);
            }
        }
    }
}

/// Builds the nodes of `plan`, except those above a state that turns out to be
/// identical to an earlier one (early cutoff).
pub async fn build<P: Provider>(context: &BuildContext<P>, plan: &Plan) -> Outcome {
    let BuildContext { graph, budget, .. } = context;
    let shared = Arc::new(context.share(plan, Local::new(context.worker())));
    let critical_path = batches::critical_path(graph, plan, &shared.store, &shared.notes.nodes());
    let (waiting, keep_going) = (batches::cut(graph, plan), budget.keep_going);
    let mut schedule = Schedule { shared: &shared, waiting, keep_going };
    let (mut prewarmer, mut copier) = (Prewarmer { fork: None, tried: Vec::new() }, Copier::default());
    let mut tasks: JoinSet<Batch> = JoinSet::new();
    loop {
        let mut ready = schedule.start();
        // The first to start gets a processor first.
        ready.sort_by(|a, b| critical_path[&b[0]].total_cmp(&critical_path[&a[0]]));
        for batch in ready {
            let fork = prewarmer.take(batch[0]);
            tasks.spawn(dispatch::run(shared.clone(), batch, fork));
        }
        prewarmer.observe(&schedule);
        copier.observe(&schedule);
        if tasks.is_empty() {
            return shared.states.finish(shared.executor.boots());
        }
        tokio::select! {
            () = shared.states.changed() => {}
            Some(rest) = tasks.join_next() => match rest {
                // Another process builds a node of the batch: wait for it there.
                Ok(rest) if !rest.is_empty() => schedule.waiting.push(rest),
                Ok(_) => {}
                Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
                Err(_) => {}
            },
        }
    }
}

//! Starts what can start, until nothing is left that can.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::context::{BuildContext, Settled};
use super::failure::Failure;
use super::prewarm::Prewarm;
use super::{batch, batches};
use crate::event::Event;
use crate::graph::{NodeId, Work};
use crate::plan::Plan;
use crate::provider::Provider;

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

/// Makes what `plan` says is to be built, but for what is made from a state
/// that turned out to hold the same as one before.
pub async fn build<P: Provider>(context: &BuildContext<P>, plan: &Plan) -> Outcome {
    let BuildContext { graph, sink, budget, .. } = context;
    let mut outcome = Outcome { reused: plan.reused(), ..Outcome::default() };
    let reasons = plan.to_build().map(|(id, reason)| (id, reason.clone())).collect();
    let shared = Arc::new(context.share(reasons));
    let critical_path = batches::critical_path(graph, plan, &shared.store, &shared.notes.nodes());
    let mut waiting = batches::cut(graph, plan);
    let mut settled: HashSet<NodeId> =
        plan.steps.keys().copied().filter(|id| !shared.reasons.contains_key(id)).collect();
    let mut dead: HashSet<NodeId> = HashSet::new();
    let mut moved: HashSet<NodeId> = HashSet::new();
    let (sender, mut receiver) = mpsc::unbounded_channel();
    let mut tasks: JoinSet<Vec<NodeId>> = JoinSet::new();
    let mut stopping = false;
    // What is made now or was made, and a fork for checks of it.
    let mut started: HashSet<NodeId> = HashSet::new();
    let mut prewarm: Option<(NodeId, Prewarm<P>)> = None;
    let mut tried: HashSet<NodeId> = HashSet::new();
    // Those whose earlier outputs are copied, if there are any.
    let mut copied: HashSet<NodeId> = HashSet::new();
    loop {
        let ready = |run: &Vec<NodeId>| graph.node(run[0]).parent.is_none_or(|p| settled.contains(&p));
        let (mut start_now, later): (Vec<_>, Vec<_>) =
            waiting.into_iter().partition(|run| !stopping && ready(run));
        waiting = later;
        // Who starts first gets a processor first.
        start_now.sort_by(|a, b| critical_path[&b[0]].total_cmp(&critical_path[&a[0]]));
        for run in start_now {
            let prewarmed = prewarm.take_if(|(check, _)| *check == run[0]).map(|(_, prewarmed)| prewarmed);
            started.extend(&run);
            tasks.spawn(batch::make(shared.clone(), run, prewarmed, sender.clone()));
        }
        let gone =
            |id: NodeId| graph.node(id).parent.is_some_and(|p| dead.contains(&p) || moved.contains(&p));
        prewarm.take_if(|(check, prewarmed)| prewarmed.is_over() || gone(*check));
        // Once each, and one at a time: what is forked for checks that are long
        // to come only waits.
        if prewarm.is_none() && budget.use_snapshots && !stopping {
            let is_next = |run: &&Vec<NodeId>| {
                let node = graph.node(run[0]);
                let is_new = matches!(node.work, Work::Check(_)) && !tried.contains(&run[0]);
                is_new && node.parent.is_some_and(|p| started.contains(&p))
            };
            let next = waiting.iter().find(is_next).map(|run| run[0]);
            tried.extend(next);
            prewarm = next.map(|check| (check, Prewarm::begin(shared.clone(), check)));
        }
        // What is to be in an output is almost there.
        let almost = |id: &NodeId| {
            let below = |id: NodeId| graph.node(id).parent;
            below(*id).is_none_or(|parent| below(parent).is_none_or(|layer| settled.contains(&layer)))
        };
        for run in waiting.iter().filter(|run| !stopping && almost(&run[0])) {
            if copied.insert(run[0]) {
                batch::copy_earlier(&shared, run[0]);
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

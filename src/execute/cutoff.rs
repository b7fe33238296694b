//! Builds in rounds: a rebuilt layer that is identical to the previous one
//! gives the nodes above it other keys (early cutoff), so the next round begins
//! with a new plan.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use super::caching::{Caching, Looked};
use super::context::BuildContext;
use super::schedule::build;
use super::states::Outcome;
use crate::digest::Key;
use crate::event::{Event, Sink};
use crate::graph::{Graph, NodeId};
use crate::plan::{Plan, Step};
use crate::provider::Provider;
use crate::store::{Last, ProjectFiles, Store};

/// Fetches what caches have and builds the rest. Returns the plan of the last
/// round, for the graph of `context` as it is then.
pub async fn make<P: Provider>(
    context: &mut BuildContext<P>,
    caching: &Caching<'_>,
    last: &Last,
    wanted: &[NodeId],
) -> (Plan, Outcome) {
    let start = Instant::now();
    let notes = context.store.project(context.project.root());
    // On a full disk, what left the recipe makes room for this build.
    remember(&context.graph, &Plan::default(), &context.store, &notes);
    let mut looked = Looked::default();
    let mut now = last.clone();
    let mut all = Outcome::default();
    let mut damaged = BTreeSet::new();
    let planned = |sink: &Sink, plan: &Plan| {
        sink(Event::Planned { nodes: plan.steps.len(), reused: plan.reused() });
    };
    if !caching.caches.from.is_empty() {
        // Asking caches may take long, so what is at stake is told first.
        let first = Plan::new(&context.graph, &context.store, &now, &BTreeMap::new(), wanted);
        planned(&context.sink, &first);
    }
    let plan = loop {
        let mut plan = caching.obtain(&context.graph, &now, wanted, &mut looked).await;
        // A state that was missing before may exist now.
        now.complete.retain(|_, id| id.is_some());
        if looked.has_taken() && context.resolve() {
            continue;
        }
        if set_damaged_aside(context, &plan, &mut damaged) {
            now.complete.clear();
            continue;
        }
        leave_out(&mut plan, &context.graph, &all);
        planned(&context.sink, &plan);
        let outcome = match plan.to_build().next() {
            Some(_) => build(context, &plan).await,
            None => Outcome { reused: plan.reused(), ..Outcome::default() },
        };
        all.reused = outcome.reused.saturating_sub(all.built);
        all.built += outcome.built;
        all.boots += outcome.boots;
        let failed = !outcome.failures.is_empty();
        all.failures.extend(outcome.failures);
        if !outcome.moved {
            break plan;
        }
        context.resolve();
        if failed && !context.budget.keep_going {
            // No round follows, but the states that exist count under their new
            // keys.
            break Plan::new(&context.graph, &context.store, &now, &BTreeMap::new(), wanted);
        }
    };
    let Outcome { built, reused, boots, .. } = all;
    (context.sink)(Event::Finished {
        built,
        reused,
        failed: all.failures.len(),
        seconds: start.elapsed().as_secs_f64(),
        boots,
    });
    caching.tell(&looked);
    remember(&context.graph, &plan, &context.store, &notes);
    (plan, all)
}

/// Checks that the states which nodes will be built from can be read. Sets
/// damaged ones aside, so that they are built again, each only once. Returns
/// whether there were any.
fn set_damaged_aside<P>(context: &BuildContext<P>, plan: &Plan, before: &mut BTreeSet<Key>) -> bool {
    let graph = &context.graph;
    let below = plan.to_build().flat_map(|(id, _)| graph.node(id).inputs());
    let below: BTreeSet<NodeId> = below.filter(|id| plan.steps.get(id) == Some(&Step::Reuse)).collect();
    let mut any = false;
    for id in below {
        if let Some(key) = context.store.unreadable(&graph.node(id).key) {
            let text = format!("a state below {} is damaged and will be rebuilt: {key}", graph.node(id).name);
            (context.sink)(Event::Notice { text });
            any |= before.insert(key);
        }
    }
    any
}

/// Leaves out nodes that failed in an earlier round, and the nodes above them.
fn leave_out(plan: &mut Plan, graph: &Graph, so_far: &Outcome) {
    let failed: BTreeSet<NodeId> = so_far.failures.iter().filter_map(|f| graph.find(&f.node)).collect();
    if !failed.is_empty() {
        plan.steps.retain(|id, _| graph.needed([*id]).is_disjoint(&failed));
    }
}

/// Stores which keys the project's nodes have now. They explain the next build,
/// and keep their states from garbage collections. A node that this build did
/// not need keeps its key, also if its image is left out because it lacks files.
/// A node that left the recipe is forgotten.
pub fn remember(graph: &Graph, plan: &Plan, store: &Store, notes: &ProjectFiles) {
    let is_there = |(id, step): &(&NodeId, &Step)| **step == Step::Reuse || store.has(&graph.node(**id).key);
    let there = plan.steps.iter().filter(is_there).map(|(id, _)| graph.node(*id));
    let there: Vec<_> = there.map(|node| (node.name.clone(), node.key)).collect();
    let _ = notes.change_nodes(|nodes| {
        nodes.retain(|name, _| graph.node_of(name).is_some() || graph.leaves_out(name));
        nodes.extend(there);
    });
}

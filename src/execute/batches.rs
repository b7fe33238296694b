//! Cuts a plan into batches.

use std::collections::{BTreeMap, HashMap};

use vimg_agent::protocol::Order;

use crate::digest::Key;
use crate::graph::{Graph, Needs, NodeId, Work};
use crate::plan::{Plan, Step};
use crate::store::Store;

/// Nodes that one instance builds one after the other.
pub(super) type Batch = Vec<NodeId>;

/// The estimated time of a node that was never built, in seconds.
const GUESS: f64 = 10.0;

/// Cuts the nodes to build into chains that one instance can build. If several
/// nodes have the same parent, the instance continues with the one that has the
/// longest chain above it.
pub(super) fn cut(graph: &Graph, plan: &Plan) -> Vec<Batch> {
    let build: Vec<NodeId> = plan.to_build().map(|(id, _)| id).collect();
    let is_check = |id: NodeId| matches!(graph.node(id).work, Work::Check(_));
    // How many nodes need an instance, in the longest chain upwards from each.
    // Ids grow upwards, so children come later.
    let mut height: HashMap<NodeId, u32> = HashMap::new();
    for id in build.iter().rev() {
        let made = graph.node(*id).needs != Needs::Nothing && !is_check(*id);
        let own = height.get(id).copied().unwrap_or(0) + u32::from(made);
        height.insert(*id, own);
        for input in graph.node(*id).inputs() {
            let above = height.entry(input).or_default();
            *above = own.max(*above);
        }
    }
    // An instance can continue with a node if all that the node needs besides
    // the instance's disk exists already.
    let is_built = |id: NodeId| matches!(plan.steps.get(&id), Some(Step::Build(_)));
    let below = |id: NodeId| {
        let node = graph.node(id);
        let parent = node.parent()?;
        let waits = node.inputs().any(|input| input != parent && is_built(input));
        (!waits).then_some(parent)
    };
    // For each node, the child that its instance continues with.
    let mut next: HashMap<NodeId, NodeId> = HashMap::new();
    for id in &build {
        let Some(parent) = below(*id) else { continue };
        if graph.node(*id).needs == Needs::Nothing || is_check(*id) {
            continue;
        }
        let better = next.get(&parent).is_none_or(|other| height[id] > height[other]);
        if better {
            next.insert(parent, *id);
        }
    }
    let mut runs: BTreeMap<NodeId, Vec<NodeId>> = BTreeMap::new();
    let mut run_of: HashMap<NodeId, NodeId> = HashMap::new();
    let mut asked = HashMap::new();
    for id in build {
        let node = graph.node(id);
        if is_check(id) {
            // All checks of one machine are one batch.
            let inputs: Vec<NodeId> = node.inputs().collect();
            let machine = (inputs, node.machine.cpus, node.machine.memory);
            let first = *asked.entry(machine).or_insert(id);
            runs.entry(first).or_default().push(id);
            continue;
        }
        let goes_on = below(id).and_then(|parent| {
            let below = graph.node(parent);
            let alike = match node.needs {
                Needs::Nothing => false,
                Needs::Disk => true,
                // A machine keeps its processors and memory while it runs.
                Needs::Machine => below.machine == node.machine && is_quiet(&node.work),
            };
            let same = alike && below.needs == node.needs && next.get(&parent) == Some(&id);
            if same { run_of.get(&parent).copied() } else { None }
        });
        let first = goes_on.unwrap_or(id);
        run_of.insert(id, first);
        runs.entry(first).or_default().push(id);
    }
    runs.into_values().collect()
}

/// Whether a layer gives the same result in the machine of the layer below,
/// with what that left running and in memory, as after a boot. That is certain
/// only for steps in which the agent itself writes files.
fn is_quiet(work: &Work) -> bool {
    let Work::Layer(layer) = work else { return false };
    layer.order.steps.iter().all(Order::is_quiet)
}

/// Returns how long the longest path from each node to the end of the build
/// takes, in seconds, estimated from the last build.
pub(super) fn critical_path(
    graph: &Graph,
    plan: &Plan,
    store: &Store,
    last: &BTreeMap<String, Key>,
) -> HashMap<NodeId, f64> {
    let mut critical_path: HashMap<NodeId, f64> = HashMap::new();
    let build: Vec<NodeId> = plan.to_build().map(|(id, _)| id).collect();
    // Ids grow upwards, so children come later.
    for id in build.iter().rev() {
        let node = graph.node(*id);
        let before = last.get(&node.name).and_then(|key| store.record(key)).map(|r| r.seconds);
        let own = before.unwrap_or(GUESS);
        let above = |child: &NodeId| critical_path.get(child).copied().unwrap_or(0.0);
        let longest = graph.children(*id).iter().map(above).fold(0.0, f64::max);
        critical_path.insert(*id, own + longest);
    }
    critical_path
}

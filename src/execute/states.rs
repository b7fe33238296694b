//! Where each node of a build stands. One function changes that,
//! [`States::set`], and it also sends the event.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use super::executor::{Built, Report};
use super::failure::Failure;
use crate::event::{Event, Sink};
use crate::graph::{Graph, Node, NodeId};
use crate::plan::{Plan, Reason};

/// Where a node stands in a build.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NodeState {
    /// One of its inputs does not exist yet.
    Waiting,
    /// All its inputs exist.
    Ready,
    /// A worker builds it.
    Running,
    /// This build built it.
    Built,
    /// It existed.
    Reused,
    /// It exists under another key than the plan assumed (early cutoff). The
    /// nodes above it wait for the next round.
    Superseded,
    /// It could not be built.
    Failed,
    /// It was not tried, because a node failed.
    Skipped,
}

impl NodeState {
    /// Whether a node in this state can get the other.
    fn may_become(self, next: Self) -> bool {
        use NodeState::*;
        match self {
            Waiting => matches!(next, Ready | Skipped),
            // Another process may build it before a worker does.
            Ready => matches!(next, Running | Reused | Superseded | Failed | Skipped),
            // A full disk has room again.
            Running => matches!(next, Built | Superseded | Failed | Ready),
            Built | Reused | Superseded | Failed | Skipped => false,
        }
    }

    /// Whether nodes can be built from it.
    pub(super) fn is_there(self) -> bool {
        matches!(self, Self::Built | Self::Reused)
    }

    /// Whether nothing is built from it in this round.
    pub(super) fn is_lost(self) -> bool {
        matches!(self, Self::Failed | Self::Superseded | Self::Skipped)
    }
}

/// A change of a node's state, with what is known of it.
pub(super) enum Step {
    /// A worker reports it.
    Report(Report),
    /// It can't be built.
    Fail(Box<Failure>),
    /// A full disk has stopped it, and there is room now.
    Again,
    /// It is not tried.
    Skip,
}

/// The result of a build.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Nodes that were built.
    pub built: usize,
    /// Nodes that existed.
    pub reused: usize,
    /// Nodes that failed; those above them were not tried.
    pub failures: Vec<Failure>,
    /// How many machines were booted.
    pub boots: usize,
    /// A state has another key than before, and nothing was built from it yet.
    pub moved: bool,
}

/// The states of all nodes of a build.
pub(super) struct States {
    graph: Arc<Graph>,
    sink: Sink,
    /// Why nodes are built.
    reasons: BTreeMap<NodeId, Reason>,
    inner: Mutex<Inner>,
    changed: Notify,
}

#[derive(Default)]
struct Inner {
    /// The states of the nodes of the plan. All other nodes are below those,
    /// and exist.
    states: BTreeMap<NodeId, NodeState>,
    outcome: Outcome,
}

impl Inner {
    fn state(&self, id: NodeId) -> NodeState {
        self.states.get(&id).copied().unwrap_or(NodeState::Reused)
    }

    fn change(&mut self, id: NodeId, next: NodeState) {
        let before = self.state(id);
        debug_assert!(before.may_become(next), "{before:?} to {next:?}");
        self.states.insert(id, next);
    }
}

impl States {
    /// The states at the beginning of a build.
    pub(super) fn new(graph: Arc<Graph>, sink: Sink, plan: &Plan) -> Self {
        let reasons: BTreeMap<_, _> = plan.to_build().map(|(id, reason)| (id, reason.clone())).collect();
        let mut inner = Inner::default();
        inner.outcome.reused = plan.reused();
        for id in plan.steps.keys() {
            let mut inputs = graph.node(*id).inputs();
            let state = match reasons.contains_key(id) {
                false => NodeState::Reused,
                true if !inputs.any(|input| reasons.contains_key(&input)) => NodeState::Ready,
                true => NodeState::Waiting,
            };
            inner.states.insert(*id, state);
        }
        Self { graph, sink, reasons, inner: Mutex::new(inner), changed: Notify::new() }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The state of a node.
    pub(super) fn of(&self, id: NodeId) -> NodeState {
        self.inner().state(id)
    }

    /// The state of a node's parent, if it has one.
    pub(super) fn of_parent(&self, id: NodeId) -> Option<NodeState> {
        self.graph.node(id).parent().map(|parent| self.of(parent))
    }

    /// Whether nothing is built from one of a node's inputs in this round.
    pub(super) fn has_lost_inputs(&self, id: NodeId) -> bool {
        self.graph.node(id).inputs().any(|input| self.of(input).is_lost())
    }

    /// Whether a node has failed.
    pub(super) fn has_failures(&self) -> bool {
        !self.inner().outcome.failures.is_empty()
    }

    /// The names of the nodes that are being built, and of the node `id`.
    pub(super) fn running(&self, id: NodeId) -> BTreeSet<String> {
        let inner = self.inner();
        let running = inner.states.iter().filter(|(_, state)| **state == NodeState::Running);
        running.map(|(id, _)| *id).chain([id]).map(|id| self.graph.node(id).name.clone()).collect()
    }

    /// Waits until a state has changed since this was last awaited.
    pub(super) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Changes the state of a node, and sends the event. Nodes above it may
    /// become ready.
    pub(super) fn set(&self, id: NodeId, step: Step) {
        let node = self.graph.node(id);
        // The lock is held while events are sent, so that they have the order
        // of the changes.
        let mut inner = self.inner();
        match step {
            Step::Report(Report::Start) => {
                inner.change(id, NodeState::Running);
                let reason = self.reasons.get(&id).map_or_else(|| "needed".to_owned(), ToString::to_string);
                (self.sink)(Event::Started { node: node.name.clone(), key: node.key.to_string(), reason });
            }
            Step::Report(Report::Build(built)) => {
                inner.change(id, NodeState::Built);
                self.tell(&mut inner, node, Some(built));
            }
            Step::Report(Report::Reuse) => {
                inner.change(id, NodeState::Reused);
                self.tell(&mut inner, node, None);
            }
            Step::Report(Report::Supersede(built)) => {
                inner.change(id, NodeState::Superseded);
                inner.outcome.moved = true;
                self.tell(&mut inner, node, built);
            }
            Step::Fail(failure) => {
                inner.change(id, NodeState::Failed);
                (self.sink)(Event::Failed { node: failure.node.clone(), message: failure.message.clone() });
                inner.outcome.failures.push(*failure);
            }
            // A node whose lock did not fit on the disk has not started.
            Step::Again if inner.state(id) == NodeState::Ready => {}
            Step::Again => inner.change(id, NodeState::Ready),
            Step::Skip => {
                inner.change(id, NodeState::Skipped);
                (self.sink)(Event::Skipped { node: node.name.clone() });
            }
        }
        if inner.state(id).is_there() {
            for above in self.graph.children(id) {
                let is_ready = self.graph.node(above).inputs().all(|input| inner.state(input).is_there());
                if is_ready && inner.states.get(&above) == Some(&NodeState::Waiting) {
                    inner.change(above, NodeState::Ready);
                }
            }
        }
        drop(inner);
        self.changed.notify_one();
    }

    /// Counts a node that exists, and sends the event.
    fn tell(&self, inner: &mut Inner, node: &Node, built: Option<Built>) {
        let (name, key) = (node.name.clone(), node.key.to_string());
        let Some(Built { seconds, bytes, same }) = built else {
            inner.outcome.reused += 1;
            return (self.sink)(Event::Reused { node: name, key });
        };
        inner.outcome.built += 1;
        (self.sink)(Event::Built { node: name.clone(), key: key.clone(), seconds, bytes });
        if let Some(of) = same {
            (self.sink)(Event::Same { node: name, key, of: of.to_string() });
        }
    }

    /// Ends a build: nodes that were not tried because one failed are skipped.
    pub(super) fn finish(&self, boots: usize) -> Outcome {
        if self.has_failures() {
            let untried: Vec<NodeId> = {
                let inner = self.inner();
                let superseded = |id| {
                    let below = self.graph.needed([id]);
                    below.iter().any(|below| inner.state(*below) == NodeState::Superseded)
                };
                let waits = |state| matches!(state, NodeState::Waiting | NodeState::Ready);
                let untried = inner.states.iter().filter(|(id, state)| waits(**state) && !superseded(**id));
                untried.map(|(id, _)| *id).collect()
            };
            untried.into_iter().for_each(|id| self.set(id, Step::Skip));
        }
        let outcome = std::mem::take(&mut self.inner().outcome);
        Outcome { boots, ..outcome }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::batches;
    use super::NodeState::{self, *};
    use super::*;
    use crate::graph::{Edge, Role};
    use crate::store::{Last, Store};

    /// Two chains of layers; the last layer of `top` also needs the last one of
    /// `tool`.
    const RECIPE: &str = "image \"base\" { bootstrap \"debian\" suite=\"bookworm\" }
image \"tool\" { from \"base\"; layer \"t\" }
image \"top\" { from \"base\"; layer \"x\"; layer \"y\" }
configuration \"t\" { file \"/t\" content=\"t\" }
configuration \"x\" { file \"/x\" content=\"x\" }
configuration \"y\" { file \"/y\" content=\"y\" }
";

    #[test]
    fn a_node_waits_for_all_its_inputs() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("store")).unwrap();
        let mut graph = Graph::of(dir.path(), RECIPE);
        let [base, t, x, y] = ["base:base", "tool@t", "top@x", "top@y"].map(|name| graph.find(name).unwrap());
        let plan = |graph: &Graph| Plan::new(graph, &store, &Last::default(), &BTreeMap::new(), &[y]);
        // With one input, the instance of its parent builds it.
        assert_eq!(batches::cut(&graph, &plan(&graph)), [vec![base], vec![x, y]]);
        graph.connect(y, Edge { role: Role::Files, node: t });
        let plan = plan(&graph);
        assert_eq!(plan.steps.keys().copied().collect::<Vec<_>>(), [base, t, x, y]);
        assert_eq!(batches::cut(&graph, &plan), [vec![base], vec![t], vec![x], vec![y]]);
        let path = batches::critical_path(&graph, &plan, &store, &BTreeMap::new());
        assert_eq!((path[&t], path[&x], path[&base]), (20.0, 20.0, 30.0));
        assert_eq!((graph.chain(y), graph.needed([y]).len()), (vec![base, x, y], 4));
        let states = States::new(Arc::new(graph), Arc::new(|_| {}), &plan);
        let built = |id| {
            states.set(id, Step::Report(Report::Start));
            let built = super::Built { seconds: 0.0, bytes: 0, same: None };
            states.set(id, Step::Report(Report::Build(built)));
            [t, x, y].map(|id| states.of(id))
        };
        assert_eq!(built(base), [Ready, Ready, Waiting]);
        assert_eq!(built(x), [Ready, NodeState::Built, Waiting]);
        assert_eq!(built(t), [NodeState::Built, NodeState::Built, Ready]);
        assert!(!states.has_lost_inputs(y));
    }

    #[test]
    fn what_is_settled_stays() {
        let all = [Waiting, Ready, Running, NodeState::Built, Reused, Superseded, Failed, Skipped];
        for from in all {
            let next = all.into_iter().filter(|to| from.may_become(*to)).count();
            assert_eq!(next == 0, from.is_there() || from.is_lost(), "{from:?}");
            assert!(!from.may_become(from), "{from:?}");
            assert!(!from.is_there() || !from.is_lost(), "{from:?}");
        }
    }
}

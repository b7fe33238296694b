//! The border between the scheduler and the workers that build batches. Above it
//! are the graph, the project and the states of nodes; below it are orders.

use std::sync::Arc;

use futures_util::future::BoxFuture;
use serde::{Deserialize, Serialize};

use super::inputs::Inputs;
use super::node_failure::NodeFailure;
use super::order::{BatchOrder, NodeOrder, PrewarmOrder};
use crate::digest::Key;

/// Builds batches. The first implementation is [`super::local::Local`].
pub(super) trait Executor: Send + Sync + 'static {
    /// A fork that it has started before the checks that need it.
    type Fork: Send + 'static;

    /// Builds the nodes of an order, one after the other, or its checks in
    /// parallel. Returns the numbers of the nodes to try again with a new order:
    /// another process builds them, the state below was built again, or a full
    /// disk has room now.
    fn execute(
        &self,
        order: BatchOrder,
        context: OrderContext,
        fork: Option<Self::Fork>,
    ) -> impl Future<Output = Vec<usize>> + Send;

    /// Begins to start a fork for a check whose image does not exist yet. Best
    /// effort. The fork ends when it is dropped.
    fn prewarm(&self, order: PrewarmOrder) -> Option<Self::Fork>;

    /// Whether a fork has failed or was given up.
    fn is_over(&self, fork: &Self::Fork) -> bool;

    /// Begins to copy the previous output, if most of the new one is probably
    /// in it. Best effort.
    fn copy_earlier(&self, output: &NodeOrder);

    /// Returns how many machines it has booted.
    fn boots(&self) -> usize;
}

/// What a worker gets with an order.
#[derive(Clone)]
pub(super) struct OrderContext {
    /// The files and secrets of the order.
    pub(super) inputs: Arc<dyn Inputs>,
    /// Receives what happens to its nodes.
    pub(super) reports: Arc<dyn Reports>,
}

/// Receives what happens to the nodes of an order, by their numbers in it.
pub(super) trait Reports: Send + Sync {
    /// Takes a report.
    fn report(&self, node: usize, report: Report);

    /// Ends the build of a node with a failure. Returns whether the node can be
    /// tried again, because a full disk has room now.
    fn fail(&self, node: usize, failure: Box<NodeFailure>) -> BoxFuture<'_, bool>;
}

/// What happens to a node, except for a failure.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) enum Report {
    /// The worker begins to build it.
    Start,
    /// It was built.
    Build(Built),
    /// It exists: another process built it, or it is in the graph twice.
    Reuse,
    /// It exists under another key than the order assumed (early cutoff); built
    /// now, or not.
    Supersede(Option<Built>),
}

/// A state that was committed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Built {
    /// How long it took, in seconds.
    pub(super) seconds: f64,
    /// How large its own disk is, in bytes.
    pub(super) bytes: u64,
    /// The earlier state with the same contents.
    pub(super) same: Option<Key>,
}

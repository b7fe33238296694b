//! The context of a batch: its order, and what its worker needs besides.

use std::sync::Arc;

use super::context::BuildState;
use super::inputs::Inputs;
use super::node::NodeContext;
use super::node_failure::NodeFailure;
use super::order::BatchOrder;
use super::states::Step;
use crate::graph::NodeId;

/// A batch that is built.
pub(super) struct BatchContext<P> {
    pub(super) shared: Arc<BuildState<P>>,
    pub(super) ids: Vec<NodeId>,
    pub(super) order: BatchOrder,
    pub(super) inputs: Arc<dyn Inputs>,
}

impl<P> BatchContext<P> {
    /// Returns the context of a node of the batch.
    pub(super) fn site(&self, n: usize) -> NodeContext<'_, P> {
        NodeContext { shared: &self.shared, node: &self.order.nodes[n] }
    }

    /// Changes the state of a node.
    pub(super) fn set(&self, n: usize, step: Step) {
        self.shared.states.set(self.ids[n], step);
    }

    /// Ends the build of a node with a failure. Returns whether the node can be
    /// tried again.
    pub(super) async fn fail(&self, n: usize, failure: Box<NodeFailure>) -> bool {
        self.shared.fail(self.ids[n], failure).await
    }

    /// Returns a node and all nodes after it.
    pub(super) fn rest(&self, n: usize) -> Vec<usize> {
        (n..self.order.nodes.len()).collect()
    }
}

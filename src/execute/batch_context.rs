//! The context of a batch: its order, and what its worker needs besides.

use std::sync::Arc;

use super::executor::{OrderContext, Report};
use super::node::NodeContext;
use super::node_failure::NodeFailure;
use super::order::BatchOrder;
use super::worker::Worker;

/// A batch that is built.
pub(super) struct BatchContext<P> {
    pub(super) worker: Arc<Worker<P>>,
    pub(super) order: BatchOrder,
    pub(super) context: OrderContext,
}

impl<P> BatchContext<P> {
    /// Returns the context of a node of the batch.
    pub(super) fn site(&self, n: usize) -> NodeContext<'_, P> {
        NodeContext { worker: &self.worker, node: &self.order.nodes[n] }
    }

    /// Reports what happens to a node.
    pub(super) fn report(&self, n: usize, report: Report) {
        self.context.reports.report(n, report);
    }

    /// Ends the build of a node with a failure. Returns whether the node can be
    /// tried again.
    pub(super) async fn fail(&self, n: usize, failure: Box<NodeFailure>) -> bool {
        self.context.reports.fail(n, failure).await
    }

    /// Returns a node and all nodes after it.
    pub(super) fn rest(&self, n: usize) -> Vec<usize> {
        (n..self.order.nodes.len()).collect()
    }
}

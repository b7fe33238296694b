//! The scheduler's side of an executor: makes orders of nodes of the graph, and
//! turns reports into states of nodes.

use std::sync::Arc;

use futures_util::future::BoxFuture;

use super::batches::Batch;
use super::context::BuildState;
use super::executor::{Executor, OrderContext, Report, Reports};
use super::node_failure::NodeFailure;
use super::order::BatchOrder;
use super::project_inputs::ProjectInputs;
use super::states::Step;
use crate::graph::Work;

/// Has a batch built. Returns the nodes to try again.
pub(super) async fn run<E: Executor>(
    shared: Arc<BuildState<E>>,
    batch: Batch,
    fork: Option<E::Fork>,
) -> Batch {
    let graph = &shared.graph;
    let parent = graph.node(batch[0]).parent().map(|id| graph.node(id).key);
    let parent = parent.and_then(|key| Some((key, shared.store.record(&key)?.id)));
    let order = BatchOrder::new(graph, &batch, &shared.notes.nodes(), parent);
    let layers = batch.iter().filter_map(|id| match &graph.node(*id).work {
        Work::Layer(work) => Some(&**work),
        _ => None,
    });
    let inputs = ProjectInputs::new(shared.project.clone(), shared.secrets.clone(), layers);
    let reports = BatchReports { shared: shared.clone(), batch: batch.clone() };
    let context = OrderContext { inputs: Arc::new(inputs), reports: Arc::new(reports) };
    let left = shared.executor.execute(order, context, fork).await;
    left.into_iter().filter_map(|n| batch.get(n).copied()).collect()
}

/// Takes the reports on a batch.
struct BatchReports<E> {
    shared: Arc<BuildState<E>>,
    batch: Batch,
}

impl<E: Executor> Reports for BatchReports<E> {
    fn report(&self, node: usize, report: Report) {
        if let Some(id) = self.batch.get(node) {
            self.shared.states.set(*id, Step::Report(report));
        }
    }

    fn fail(&self, node: usize, failure: Box<NodeFailure>) -> BoxFuture<'_, bool> {
        Box::pin(async move {
            match self.batch.get(node) {
                Some(id) => self.shared.fail(*id, failure).await,
                None => false,
            }
        })
    }
}

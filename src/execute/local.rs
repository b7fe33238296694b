//! Builds batches on this machine.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::batch;
use super::batch_context::BatchContext;
use super::executor::{Executor, OrderContext};
use super::export;
use super::order::{BatchOrder, NodeOrder, PrewarmOrder};
use super::prewarm::Prewarm;
use super::worker::Worker;
use crate::provider::Provider;

/// The executor of this machine.
pub(super) struct Local<P>(Arc<Worker<P>>);

impl<P> Local<P> {
    pub(super) fn new(worker: Worker<P>) -> Self {
        Self(Arc::new(worker))
    }
}

impl<P: Provider> Executor for Local<P> {
    type Fork = Prewarm<P>;

    async fn execute(
        &self,
        order: BatchOrder,
        context: OrderContext,
        fork: Option<Prewarm<P>>,
    ) -> Vec<usize> {
        batch::make(Arc::new(BatchContext { worker: self.0.clone(), order, context }), fork).await
    }

    fn prewarm(&self, order: PrewarmOrder) -> Option<Prewarm<P>> {
        self.0.use_snapshots.then(|| Prewarm::begin(self.0.clone(), order))
    }

    fn is_over(&self, fork: &Prewarm<P>) -> bool {
        fork.is_over()
    }

    fn copy_earlier(&self, output: &NodeOrder) {
        export::copy_earlier(&self.0, output);
    }

    fn boots(&self) -> usize {
        self.0.boots.load(Ordering::Relaxed)
    }
}

//! Failures of nodes with their places in the recipe, for a person. This is
//! where the failure of a worker gets its place.

use std::path::PathBuf;

use vimg_lang::Span;

use super::node_failure::{FailureKind, NodeFailure};
use crate::graph::{Graph, NodeId, Work};

/// Why a node could not be built.
#[derive(Debug, Clone)]
pub struct Failure {
    /// The node's name.
    pub node: String,
    /// Its place in the recipe.
    pub span: Span,
    /// What kind of failure it is.
    pub kind: FailureKind,
    /// What happened, in a sentence.
    pub message: String,
    /// Another place in the recipe, and how it is involved.
    pub related: Option<(Span, String)>,
    /// What to do about it.
    pub help: Option<String>,
    /// The last lines of output before it.
    pub tail: Vec<String>,
    /// The file with the whole log.
    pub log: Option<PathBuf>,
}

impl Failure {
    /// Gives a failure a place in the recipe.
    pub(super) fn at(span: Span, failure: NodeFailure) -> Self {
        let NodeFailure { node, kind, message, help, tail, log, .. } = failure;
        Self { node, span, kind, message, related: None, help, tail, log }
    }
}

/// Finds the place in the recipe of a node's failure: that of the failed step,
/// or that of the node.
pub(super) fn placed(graph: &Graph, id: NodeId, failure: NodeFailure) -> Box<Failure> {
    let node = graph.node(id);
    let spans = match &node.work {
        Work::Layer(work) => work.spans.as_slice(),
        Work::Check(work) => work.spans.as_slice(),
        Work::Bootstrap(_) | Work::Import { .. } | Work::Seal { .. } | Work::Export(_) => &[],
    };
    let step = failure.step.and_then(|step| spans.get(step));
    let layer = failure.layer.as_ref().and_then(|layer| graph.applied(node, layer));
    let mut failure = Failure::at(step.copied().unwrap_or(node.span), failure);
    failure.related = layer.map(|span| (span, "this layer changed it".to_owned()));
    Box::new(failure)
}

//! Failures of nodes, in words for a person.

use std::path::PathBuf;

use vimg_lang::Span;

use crate::host::HostError;
use crate::store::StoreError;

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

/// Kinds of failure, for exit codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FailureKind {
    /// What the recipe asks for does not work.
    Recipe,
    /// The host lacks something, or a program of it failed.
    Host,
    /// The store can't be written.
    Store,
}

impl Failure {
    pub(super) fn new(node: &str, span: Span, kind: FailureKind, message: impl Into<String>) -> Self {
        Self {
            node: node.to_owned(),
            span,
            kind,
            message: message.into(),
            related: None,
            help: None,
            tail: Vec::new(),
            log: None,
        }
    }

    pub(super) fn provider(node: &str, span: Span, error: HostError) -> Self {
        Self { help: error.help, ..Self::new(node, span, FailureKind::Host, error.message) }
    }

    pub(super) fn store(node: &str, span: Span, error: &StoreError) -> Self {
        let mut failure = Self::new(node, span, FailureKind::Store, error.to_string());
        if error.is_full() {
            failure.help =
                Some("the disk that holds the store is full: remove old states, or set VIMG_STORE".into());
        }
        failure
    }
}

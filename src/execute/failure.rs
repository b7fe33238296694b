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
    /// The disk that holds the store is full.
    Full,
}

/// What to do about a full disk.
const MAKE_ROOM: &str = "make room: `vimg store gc` removes what nothing needs; or set VIMG_STORE to another \
                         disk. Finished layers are stored";

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

    /// Makes the failure for a full disk. `message` says what could not be
    /// written, if that is known.
    pub(super) fn full(node: &str, span: Span, message: Option<String>) -> Self {
        let message = message.unwrap_or_else(|| "the disk that holds the store is full".into());
        Self { help: Some(MAKE_ROOM.into()), ..Self::new(node, span, FailureKind::Full, message) }
    }

    pub(super) fn provider(node: &str, span: Span, error: HostError) -> Self {
        match error.is_full {
            true => Self::full(node, span, Some(error.message)),
            false => Self { help: error.help, ..Self::new(node, span, FailureKind::Host, error.message) },
        }
    }

    pub(super) fn store(node: &str, span: Span, error: &StoreError) -> Self {
        match error.is_full() {
            true => Self::full(node, span, Some(error.to_string())),
            false => Self::new(node, span, FailureKind::Store, error.to_string()),
        }
    }
}

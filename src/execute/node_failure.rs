//! Failures of nodes as a worker knows them: without places in the recipe.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::host::{HostError, limits};
use crate::store::StoreError;

/// Why a node could not be built. Names the step instead of its place in the
/// recipe; `failure::placed` finds that.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct NodeFailure {
    /// The node's name.
    pub(super) node: String,
    /// What kind of failure it is.
    pub(super) kind: FailureKind,
    /// What happened, in a sentence.
    pub(super) message: String,
    /// The step or probe that failed.
    pub(super) step: Option<usize>,
    /// The name in the machine of the layer that changed what the step needs.
    pub(super) layer: Option<String>,
    /// What to do about it.
    pub(super) help: Option<String>,
    /// The last lines of output before it.
    pub(super) tail: Vec<String>,
    /// The file with the whole log.
    pub(super) log: Option<PathBuf>,
}

/// Kinds of failure, for exit codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
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
const MAKE_ROOM: &str = "make room on this host: `vimg store gc` removes what nothing needs; or set VIMG_STORE to another \
                         disk. Finished layers are stored";

impl NodeFailure {
    pub(super) fn new(node: &str, kind: FailureKind, message: impl Into<String>) -> Self {
        Self {
            node: node.to_owned(),
            kind,
            message: message.into(),
            step: None,
            layer: None,
            help: None,
            tail: Vec::new(),
            log: None,
        }
    }

    /// Makes the failure for a full disk. `message` says what could not be
    /// written, if that is known.
    pub(super) fn full(node: &str, message: Option<String>) -> Self {
        let full = "the disk that holds the store is full";
        let message = message.map_or(full.to_owned(), |message| format!("{full}: {message}"));
        Self { help: Some(MAKE_ROOM.into()), ..Self::new(node, FailureKind::Full, message) }
    }

    pub(super) fn provider(node: &str, error: HostError) -> Self {
        match error.is_full {
            true => Self::full(node, Some(error.message)),
            false => Self { help: error.help, ..Self::new(node, FailureKind::Host, error.message) },
        }
    }

    pub(super) fn store(node: &str, error: &StoreError) -> Self {
        match error.is_full() {
            true => Self::full(node, Some(error.to_string())),
            false => {
                let help = limits::advice(&error.source);
                Self { help, ..Self::new(node, FailureKind::Store, error.to_string()) }
            }
        }
    }

    /// Makes the failure for a state that has disappeared.
    pub(super) fn gone(node: &str) -> Self {
        let message = "the state below was removed during the build";
        Self { help: Some("build again".into()), ..Self::new(node, FailureKind::Store, message) }
    }
}

//! The context of a node: sends its events and makes its failures.

use std::path::{Path, PathBuf};

use super::node_failure::{FailureKind, NodeFailure};
use super::order::NodeOrder;
use super::worker::Worker;
use crate::event::Event;
use crate::host::{HostError, limits, space};
use crate::store::{Boot, Staging, StoreError};

/// The order of a node, and the worker that builds it.
pub(super) struct NodeContext<'a, P> {
    pub(super) worker: &'a Worker<P>,
    pub(super) node: &'a NodeOrder,
}

impl<P> NodeContext<'_, P> {
    pub(super) fn phase(&self, phase: &str) {
        self.worker.tell(Event::Phase { node: self.node.name.clone(), phase: phase.to_owned() });
    }

    pub(super) fn line(&self, line: &str) {
        self.worker.tell(Event::Output { node: self.node.name.clone(), line: line.to_owned() });
    }

    pub(super) fn notice(&self, text: &str) {
        self.worker.tell(Event::Notice { text: text.to_owned() });
    }

    pub(super) fn failure(&self, kind: FailureKind, message: impl Into<String>) -> Box<NodeFailure> {
        Box::new(NodeFailure::new(&self.node.name, kind, message))
    }

    pub(super) fn provider_failure(&self, error: HostError) -> Box<NodeFailure> {
        Box::new(NodeFailure::provider(&self.node.name, error))
    }

    pub(super) fn store_failure(&self, error: &StoreError) -> Box<NodeFailure> {
        Box::new(NodeFailure::store(&self.node.name, error))
    }

    pub(super) fn io_failure(&self, path: &Path, error: std::io::Error) -> Box<NodeFailure> {
        let message = format!("{}: {error}", path.display());
        match space::is_full(&error) {
            true => self.full(Some(message)),
            false => {
                let failure = NodeFailure::new(&self.node.name, FailureKind::Store, message);
                Box::new(NodeFailure { help: limits::advice(&error), ..failure })
            }
        }
    }

    /// Makes the failure for a full disk; see [`NodeFailure::full`].
    pub(super) fn full(&self, message: Option<String>) -> Box<NodeFailure> {
        Box::new(NodeFailure::full(&self.node.name, message))
    }

    /// Makes the failure for a state that has disappeared.
    pub(super) fn gone(&self) -> Box<NodeFailure> {
        Box::new(NodeFailure::gone(&self.node.name))
    }

    pub(super) fn staging(&self) -> Result<Staging, Box<NodeFailure>> {
        self.worker.store.staging().map_err(|e| self.store_failure(&e))
    }

    /// Returns kernel and initrd, if they are still in the store.
    pub(super) fn boot_paths(&self, boot: &Option<Boot>) -> Option<(PathBuf, PathBuf)> {
        let store = &self.worker.store;
        let boot = boot.filter(|b| store.has_blob(&b.kernel) && store.has_blob(&b.initrd))?;
        Some((store.blob(&boot.kernel.digest), store.blob(&boot.initrd.digest)))
    }

    /// Keeps the log of a failed node. Returns its path.
    pub(super) fn keep_log(&self, log: &Path) -> Option<PathBuf> {
        let kept = self.worker.notes.failed_log(&self.node.name);
        if let Some(dir) = kept.parent() {
            let _ = std::fs::create_dir_all(dir);
        }
        std::fs::copy(log, &kept).is_ok().then_some(kept)
    }
}

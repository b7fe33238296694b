//! Makes room when the disk that holds the store is full: one garbage
//! collection for each build. Nodes that the full disk has stopped are then
//! tried once more.

use std::collections::BTreeSet;

use tokio::sync::Mutex;

use super::failure::Failure;
use crate::event::{Event, Sink};
use crate::graph::Graph;
use crate::store::gc::{self, Keep};
use crate::store::{Lease, Store, StoreError};

/// Whether a build has collected garbage, and which nodes it may try again.
#[derive(Debug, Default)]
pub struct Room(Mutex<Option<Collected>>);

/// What the collection of a build gave.
#[derive(Debug)]
struct Collected {
    /// How much it removed, in bytes.
    bytes: u64,
    /// The nodes that were running when it ended, and have not been tried
    /// again. A node that began later had the room from the start.
    again: BTreeSet<String>,
}

impl Room {
    /// Leases the states that a build may use. A disk without room even for
    /// that is the first reason to collect.
    ///
    /// # Errors
    ///
    /// The lease can't be written.
    pub fn lease(store: &Store, graph: &Graph, sink: &Sink) -> Result<(Self, Lease), StoreError> {
        match store.lease(graph.keys()) {
            Err(error) if error.is_full() => {
                let bytes = told(sink, store.collect(&Keep::default()));
                let collected = Collected { bytes, again: BTreeSet::new() };
                let lease = store.lease(graph.keys())?;
                Ok((Self(Mutex::new(Some(collected))), lease))
            }
            lease => Ok((Self::default(), lease?)),
        }
    }

    /// Makes room after a node has failed because of a full disk. Returns
    /// nothing if the node should be tried again, and otherwise the failure.
    /// `running` lists the nodes that are being built. Nodes that fail during
    /// the collection wait for its end.
    pub(super) async fn make(
        &self,
        store: &Store,
        sink: &Sink,
        failure: Box<Failure>,
        running: impl FnOnce() -> BTreeSet<String>,
    ) -> Option<Box<Failure>> {
        let mut state = self.0.lock().await;
        let collected = match &mut *state {
            Some(collected) => collected,
            none => {
                let bytes = collect(store, sink).await;
                none.insert(Collected { bytes, again: running() })
            }
        };
        if collected.bytes > 0 && collected.again.remove(&failure.node) {
            return None;
        }
        let text = format!(
            "vimg has already removed what nothing needs. Make room on the host's disk of {}, or set \
             VIMG_STORE to another one; finished layers are stored",
            store.root().display()
        );
        Some(Box::new(Failure { help: Some(text), ..*failure }))
    }
}

/// Removes what nothing needs. Returns how much that was, in bytes.
async fn collect(store: &Store, sink: &Sink) -> u64 {
    let own = store.clone();
    // The lease of this build, and those of others, keep what they use.
    match tokio::task::spawn_blocking(move || own.collect(&Keep::default())).await {
        Ok(done) => told(sink, done),
        // The runtime ends.
        Err(_) => 0,
    }
}

/// Sends the notice of a collection. Returns how much it removed, in bytes.
fn told(sink: &Sink, done: Result<gc::Collected, StoreError>) -> u64 {
    let (bytes, text) = match done {
        Ok(done) if done.removed.is_empty() => (0, "the store has nothing to remove".to_owned()),
        Ok(done) => {
            let bytes: u64 = done.removed.iter().map(|item| item.bytes).sum();
            let mib = bytes.div_ceil(1 << 20);
            (bytes, format!("vimg removed {mib} MiB that nothing needs from the store"))
        }
        Err(error) => (0, error.to_string()),
    };
    sink(Event::Notice { text: format!("the disk is full: {text}") });
    bytes
}

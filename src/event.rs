//! What a build tells whoever watches. Events are the only way from the
//! executor to a screen; nothing below [`crate::report`] prints.
//!
//! The JSON form of these is an interface: `docs/events.md` lists it, and a
//! test compares the two.

use serde::Serialize;

/// Something that happened in a build.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// What will be done is known.
    Planned {
        /// Nodes that this build needs.
        nodes: usize,
        /// Of these, how many are there already.
        reused: usize,
    },
    /// A node is there already.
    Reused {
        /// Its name, for instance `web@nginx`.
        node: String,
        /// Its key.
        key: String,
    },
    /// Work on a node begins.
    Started {
        /// Its name.
        node: String,
        /// Its key.
        key: String,
        /// Why it is built.
        reason: String,
    },
    /// A node enters a phase, such as `boot` or `apply`.
    Phase {
        /// Its name.
        node: String,
        /// What is done now, in a few words.
        phase: String,
    },
    /// A line that a node's programs printed.
    Output {
        /// The node's name.
        node: String,
        /// The line, without its end.
        line: String,
    },
    /// A node is there now.
    Built {
        /// Its name.
        node: String,
        /// Its key.
        key: String,
        /// How long its own work took, in seconds.
        seconds: f64,
        /// What it takes on disk, in bytes.
        bytes: u64,
    },
    /// A node could not be built.
    Failed {
        /// Its name.
        node: String,
        /// Why, in a sentence.
        message: String,
    },
    /// A node was not tried, because one below it failed.
    Skipped {
        /// Its name.
        node: String,
    },
    /// A file was written.
    Written {
        /// The image's name.
        image: String,
        /// Where.
        path: String,
        /// Its size on disk in bytes.
        bytes: u64,
        /// It was there already, as it should be.
        unchanged: bool,
    },
    /// Something that a person should know and need not act upon.
    Notice {
        /// A sentence.
        text: String,
    },
    /// The build is over.
    Finished {
        /// Nodes that were built.
        built: usize,
        /// Nodes that were there.
        reused: usize,
        /// Nodes that failed.
        failed: usize,
        /// How long it took, in seconds.
        seconds: f64,
        /// How many machines were booted.
        boots: usize,
    },
}

/// Where events go. It must not block for long.
pub type Sink = std::sync::Arc<dyn Fn(Event) + Send + Sync>;

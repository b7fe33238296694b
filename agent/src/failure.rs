//! Why a step could not be made true, in words for people.

use std::io;
use std::path::Path;

use crate::protocol::FromAgent;

/// Where the agent keeps its own files.
pub(crate) const HOME: &str = "/var/lib/vimg";

/// Why a step could not be made true.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) message: String,
    pub(crate) exit: Option<i32>,
    /// The layer that is in the way.
    pub(crate) layer: Option<String>,
}

impl Failure {
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), exit: None, layer: None }
    }

    /// What the host is told of it.
    pub(crate) fn of(self, step: usize) -> FromAgent {
        FromAgent::Failed { step, message: self.message, exit: self.exit, layer: self.layer }
    }

    /// An error of the operating system at a path.
    pub(crate) fn at(path: impl AsRef<Path>, error: io::Error) -> Self {
        Self::new(format!("{}: {error}", path.as_ref().display()))
    }
}

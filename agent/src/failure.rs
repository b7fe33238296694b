//! Why a step failed.

use std::io;
use std::path::Path;

use crate::protocol::FromAgent;

/// The directory of the agent's own files.
pub(crate) const HOME: &str = "/var/lib/vimg";

/// Why a step failed: a message for the user and details for the host.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) message: String,
    pub(crate) exit: Option<i32>,
    /// The layer that caused the failure, if it is another one.
    pub(crate) layer: Option<String>,
}

impl Failure {
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), exit: None, layer: None }
    }

    /// Converts to the message for the host.
    pub(crate) fn of(self, step: usize) -> FromAgent {
        FromAgent::Failed { step, message: self.message, exit: self.exit, layer: self.layer }
    }

    /// Creates a failure from an error of the operating system at a path.
    pub(crate) fn at(path: impl AsRef<Path>, error: io::Error) -> Self {
        Self::new(format!("{}: {error}", path.as_ref().display()))
    }
}

//! Errors of this host: of its programs, disks and networks.

use std::io;
use std::sync::Arc;

use super::{limits, space};

/// An error of this host.
#[derive(Debug, Clone)]
pub struct HostError {
    /// What failed.
    pub message: String,
    /// What to do about it.
    pub help: Option<String>,
    /// Whether the cause is a full disk of the host.
    pub is_full: bool,
}

impl HostError {
    /// Makes an error without a help text.
    pub fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), help: None, is_full: false }
    }

    /// Makes an error of a system call; `what` names what failed. The help text
    /// names a limit of this process that may be the cause.
    pub fn io(what: impl std::fmt::Display, error: &io::Error) -> Self {
        let (is_full, help) = (space::is_full(error), limits::advice(error));
        Self { is_full, help, ..Self::new(format!("{what}: {error}")) }
    }

    /// Makes an error of a program of the host from its output.
    pub fn program(what: impl std::fmt::Display, output: &str) -> Self {
        let (is_full, help) = (space::says_full(output), limits::advice_for(output));
        Self { is_full, help, ..Self::new(format!("{what}: {output}")) }
    }

    /// Adds a help text, unless the cause is known: a limit of this process.
    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help.get_or_insert_with(|| help.into());
        self
    }
}

impl std::fmt::Display for HostError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

/// Receives lines for a person: what a program prints, or a notice.
pub type Lines = Arc<dyn Fn(&str) + Send + Sync>;

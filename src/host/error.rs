//! Errors of this host: of its programs, disks and networks.

use std::io;
use std::sync::Arc;

use super::space;

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

    /// Makes an error of a system call; `what` names what failed.
    pub fn io(what: impl std::fmt::Display, error: &io::Error) -> Self {
        Self { is_full: space::is_full(error), ..Self::new(format!("{what}: {error}")) }
    }

    /// Makes an error of a program of the host from its output.
    pub fn program(what: impl std::fmt::Display, output: &str) -> Self {
        Self { is_full: space::says_full(output), ..Self::new(format!("{what}: {output}")) }
    }

    /// Adds a help text.
    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
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

//! What goes wrong on this host.

use std::sync::Arc;

/// An error of this host: a program, a disk, a network.
#[derive(Debug, Clone)]
pub struct HostError {
    /// What failed.
    pub message: String,
    /// What to do about it.
    pub help: Option<String>,
}

impl HostError {
    /// Makes an error without a help text.
    pub fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), help: None }
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

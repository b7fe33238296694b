//! An error of the store.

use std::io;
use std::path::PathBuf;

use crate::host::space;

/// An error of the store.
#[derive(Debug)]
pub struct StoreError {
    /// The file or directory.
    pub path: PathBuf,
    /// What vimg tried to do, as a verb.
    pub action: &'static str,
    /// The error of the system.
    pub source: io::Error,
}

impl StoreError {
    pub(super) fn new(action: &'static str, path: impl Into<PathBuf>, source: io::Error) -> Self {
        Self { path: path.into(), action, source }
    }

    /// Whether the disk is full.
    pub fn is_full(&self) -> bool {
        space::is_full(&self.source)
    }
}

impl std::fmt::Display for StoreError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "the store can't {} {}: {}", self.action, self.path.display(), self.source)
    }
}

impl std::error::Error for StoreError {}

/// Whether an error means that a file is damaged, and not just unreadable at
/// the moment.
pub(super) fn is_damage(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof
    ) || error.raw_os_error() == Some(libc::EIO)
}

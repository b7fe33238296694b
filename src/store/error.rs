//! Why the store can't be used.

use std::io;
use std::path::PathBuf;

/// Why the store can't be used.
#[derive(Debug)]
pub struct StoreError {
    /// Which file or directory.
    pub path: PathBuf,
    /// What was tried.
    pub action: &'static str,
    /// What the system said.
    pub source: io::Error,
}

impl StoreError {
    pub(super) fn new(action: &'static str, path: impl Into<PathBuf>, source: io::Error) -> Self {
        Self { path: path.into(), action, source }
    }

    /// Whether the disk is full.
    pub fn is_full(&self) -> bool {
        matches!(self.source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
    }
}

impl std::fmt::Display for StoreError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "the store can't {} {}: {}", self.action, self.path.display(), self.source)
    }
}

impl std::error::Error for StoreError {}

/// Whether an error says that a file is damaged, and not that it can't be read
/// just now.
pub(super) fn is_damage(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof
    ) || error.raw_os_error() == Some(libc::EIO)
}

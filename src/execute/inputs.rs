//! What a worker gets besides its order: files and secrets.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;

use vimg_lang::FileRef;

use super::session::Source;
use crate::digest::Digest;
use crate::files::FileError;

/// The files and secrets of an order.
pub(super) trait Inputs: Send + Sync {
    /// Returns a blob of the order's layers. A file is copied to `to` first, so
    /// that no other program can change it, and must have this digest.
    ///
    /// # Errors
    ///
    /// The file can't be read, or has another digest.
    fn blob(&self, digest: &Digest, to: &Path) -> Result<Source, FileError>;

    /// Opens a file of the project.
    ///
    /// # Errors
    ///
    /// The file can't be opened.
    fn open(&self, file: &FileRef) -> io::Result<File>;

    /// Returns the value of a secret.
    ///
    /// # Errors
    ///
    /// The reason why it has none.
    fn secret(&self, name: &str) -> Result<Arc<[u8]>, String>;
}

//! Locks between processes. An open file holds them, so the end of a process
//! frees them.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::FlockOperation;

use super::error::StoreError;

/// The lock of a key; released when dropped.
#[derive(Debug)]
pub struct KeyLock {
    path: PathBuf,
    file: File,
}

impl Drop for KeyLock {
    fn drop(&mut self) {
        // While this lock is held, the file at the path belongs to it.
        let _ = fs::remove_file(&self.path);
        let _ = rustix::fs::flock(&self.file, FlockOperation::Unlock);
    }
}

/// Takes a lock if it is free.
pub fn try_lock(path: &Path) -> Result<Option<KeyLock>, StoreError> {
    let fail = |e: io::Error| StoreError::new("lock", path, e);
    loop {
        let file = OpenOptions::new().write(true).create(true).truncate(false).open(path).map_err(fail)?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
            Err(e) => return Err(fail(e.into())),
        }
        // The previous holder may have removed the file that is locked now.
        let ours = file.metadata().map_err(fail)?;
        if fs::metadata(path).is_ok_and(|m| (m.dev(), m.ino()) == (ours.dev(), ours.ino())) {
            return Ok(Some(KeyLock { path: path.to_owned(), file }));
        }
    }
}

/// Waits for a lock, by polling: it takes seconds to minutes until a state is
/// built, and a blocked thread could not be interrupted.
pub async fn lock(path: &Path) -> Result<KeyLock, StoreError> {
    let mut pause = Duration::from_millis(1);
    loop {
        if let Some(lock) = try_lock(path)? {
            return Ok(lock);
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_millis(200));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_holder_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("k");
        let first = try_lock(&path).unwrap().unwrap();
        assert!(try_lock(&path).unwrap().is_none());
        drop(first);
        assert!(!path.exists());
        assert!(try_lock(&path).unwrap().is_some());
    }
}

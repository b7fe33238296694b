//! Work in progress: a directory that goes away with its process.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::FlockOperation;

use super::StoreError;
use crate::host::namespaces::remove_tree;

/// A directory of one process; removed when dropped, and reaped by the next
/// process if this one dies. The lock stands beside it and not inside, so
/// that it is held until the directory has become something else.
#[derive(Debug)]
pub struct Staging {
    path: PathBuf,
    _lock: File,
    kept: bool,
}

static COUNTER: AtomicU64 = AtomicU64::new(0);

impl Staging {
    pub(super) fn new(parent: &Path) -> Result<Self, StoreError> {
        let fail = |e: io::Error| StoreError::new("stage in", parent, e);
        // Whoever makes a directory holds this, so that nobody reaps it in
        // the moment before its own lock is taken.
        let door = File::open(parent).map_err(fail)?;
        rustix::fs::flock(&door, FlockOperation::LockExclusive).map_err(|e| fail(e.into()))?;
        reap(parent);
        // Another container may have a process of the same number.
        let (path, lock) = loop {
            let n = COUNTER.fetch_add(1, Ordering::Relaxed);
            let path = parent.join(format!("{}-{n}", std::process::id()));
            match OpenOptions::new().write(true).create_new(true).open(lock_of(&path)) {
                Ok(lock) => break (path, lock),
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                Err(e) => return Err(fail(e)),
            }
        };
        rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|e| fail(e.into()))?;
        fs::create_dir(&path).map_err(fail)?;
        Ok(Self { path, _lock: lock, kept: false })
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The directory is something else now.
    pub(super) fn forget(mut self) {
        self.kept = true;
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if !self.kept {
            let _ = remove_tree(&self.path);
        }
        let _ = fs::remove_file(lock_of(&self.path));
    }
}

fn lock_of(path: &Path) -> PathBuf {
    path.with_extension("lock")
}

/// Removes what dead processes left: directories, then their locks. The lock
/// is made first and removed last, so a directory without one is nobody's.
fn reap(parent: &Path) {
    let Ok(entries) = fs::read_dir(parent) else { return };
    for path in entries.flatten().map(|e| e.path()) {
        let is_lock = path.extension().is_some_and(|e| e == "lock");
        let lock = if is_lock { path.clone() } else { lock_of(&path) };
        let free = match File::open(&lock) {
            Ok(lock) => rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok(),
            // Another error says nothing of who works there.
            Err(e) => e.kind() == io::ErrorKind::NotFound,
        };
        if !free {
            continue;
        }
        let _ = if is_lock {
            // Its directory may come later in the list.
            if path.with_extension("").exists() { continue } else { fs::remove_file(&path) }
        } else {
            remove_tree(&path)
        };
    }
}

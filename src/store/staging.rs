//! Staging: directories for work in progress, which end with their process.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread::JoinHandle;

use rustix::fs::FlockOperation;

use super::error::StoreError;
use crate::host::namespaces::remove_tree;

/// A directory of one process. It is removed when dropped; if the process dies,
/// the next one removes it. The lock is a file beside it, so that it stays held
/// until the directory has become a state.
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
        // Each process that makes a directory holds this lock, so that no other
        // process removes the directory before its own lock is taken.
        let door = File::open(parent).map_err(fail)?;
        rustix::fs::flock(&door, FlockOperation::LockExclusive).map_err(|e| fail(e.into()))?;
        let abandoned = abandoned(parent);
        // Another container may have a process with the same number.
        let (path, lock) = loop {
            let n = COUNTER.fetch_add(1, Ordering::Relaxed);
            let path = parent.join(format!("{}-{n}", std::process::id()));
            let taken = |e: &io::Error| e.kind() == io::ErrorKind::AlreadyExists;
            let lock = match OpenOptions::new().write(true).create_new(true).open(lock_of(&path)) {
                Ok(lock) => lock,
                Err(e) if taken(&e) => continue,
                Err(e) => return Err(fail(e)),
            };
            rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|e| fail(e.into()))?;
            match fs::create_dir(&path) {
                Ok(()) => break (path, lock),
                Err(e) => {
                    let _ = fs::remove_file(lock_of(&path));
                    // A directory that could not be removed still exists.
                    if !taken(&e) {
                        return Err(fail(e));
                    }
                }
            }
        };
        // Removing may take long, so it runs in a thread without the lock.
        drop(door);
        if !abandoned.is_empty() {
            let reaper = std::thread::spawn(|| reap(abandoned));
            REAPERS.lock().unwrap_or_else(PoisonError::into_inner).push(reaper);
        }
        Ok(Self { path, _lock: lock, kept: false })
    }

    /// Returns the directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Keeps the directory, because it has become a state.
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

/// Threads that remove abandoned directories.
static REAPERS: Mutex<Vec<JoinHandle<()>>> = Mutex::new(Vec::new());

/// Waits until the directories of dead processes are removed, as far as this
/// process has found them.
pub fn settle() {
    let reapers = std::mem::take(&mut *REAPERS.lock().unwrap_or_else(PoisonError::into_inner));
    // The next process removes what a failed thread left.
    reapers.into_iter().for_each(|reaper| drop(reaper.join()));
}

/// Finds the directories of dead processes, with their locks. A lock is made
/// first and removed last, so a directory without one has no owner. The caller
/// holds the parent's lock.
fn abandoned(parent: &Path) -> Vec<(PathBuf, Option<File>)> {
    let Ok(entries) = fs::read_dir(parent) else { return Vec::new() };
    let mut found = Vec::new();
    for path in entries.flatten().map(|e| e.path()) {
        let is_lock = path.extension().is_some_and(|e| e == "lock");
        let dir = if is_lock { path.with_extension("") } else { path };
        match File::open(lock_of(&dir)) {
            // Directory and lock are both listed; the pair is locked only once.
            Ok(lock) if rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok() => {
                found.push((dir, Some(lock)));
            }
            // Another error does not tell whether the owner lives.
            Err(e) if e.kind() == io::ErrorKind::NotFound => found.push((dir, None)),
            _ => {}
        }
    }
    found
}

/// Removes directories, then their locks.
fn reap(abandoned: Vec<(PathBuf, Option<File>)>) {
    for (dir, lock) in abandoned {
        if remove_tree(&dir).is_ok() && lock.is_some() {
            let _ = fs::remove_file(lock_of(&dir));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn staging_of_the_dead_is_reaped_and_of_the_living_kept() {
        let dir = tempfile::tempdir().unwrap();
        let parent = dir.path().join("staging");
        fs::create_dir(&parent).unwrap();
        let living = Staging::new(&parent).unwrap();
        let dead = dir.path().join("staging/1-1");
        fs::create_dir(&dead).unwrap();
        fs::write(dir.path().join("staging/1-1.lock"), "").unwrap();
        let _other = Staging::new(&parent).unwrap();
        settle();
        assert!(!dead.exists());
        assert!(living.path().exists());
        let path = living.path().to_owned();
        drop(living);
        assert!(!path.exists());
    }
}

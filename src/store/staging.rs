//! Work in progress: a directory that goes away with its process.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread::JoinHandle;

use rustix::fs::FlockOperation;

use super::error::StoreError;
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
        let abandoned = abandoned(parent);
        // Another container may have a process of the same number.
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
                    // One whose removal failed is still there.
                    if !taken(&e) {
                        return Err(fail(e));
                    }
                }
            }
        };
        // It may take long, and neither others nor this one wait for it.
        drop(door);
        if !abandoned.is_empty() {
            let reaper = std::thread::spawn(|| reap(abandoned));
            REAPERS.lock().unwrap_or_else(PoisonError::into_inner).push(reaper);
        }
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

/// Threads that remove abandoned directories.
static REAPERS: Mutex<Vec<JoinHandle<()>>> = Mutex::new(Vec::new());

/// Waits until what dead processes left is gone, as far as this process has
/// come upon it.
pub fn settle() {
    let reapers = std::mem::take(&mut *REAPERS.lock().unwrap_or_else(PoisonError::into_inner));
    // One that failed left what the next process removes.
    reapers.into_iter().for_each(|reaper| drop(reaper.join()));
}

/// What dead processes left, with its locks. A lock is made first and removed
/// last, so a directory without one has no owner. The caller holds the parent's
/// lock.
fn abandoned(parent: &Path) -> Vec<(PathBuf, Option<File>)> {
    let Ok(entries) = fs::read_dir(parent) else { return Vec::new() };
    let mut found = Vec::new();
    for path in entries.flatten().map(|e| e.path()) {
        let is_lock = path.extension().is_some_and(|e| e == "lock");
        let dir = if is_lock { path.with_extension("") } else { path };
        match File::open(lock_of(&dir)) {
            // What has both is found at either, and locked once.
            Ok(lock) if rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok() => {
                found.push((dir, Some(lock)));
            }
            // Another error says nothing of who works there.
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

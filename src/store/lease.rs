//! Leases: what a running process uses of the store, so that no garbage
//! collection takes it. An open file holds a lease, so the end of the process
//! ends it.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::FlockOperation;

use super::error::StoreError;
use crate::digest::Key;

const PREFIX: &str = "lease-";
/// Held shared while a process looks for states and leases them, and alone
/// while a collection decides what to take.
const GATE: &str = "gate";

static COUNTER: AtomicU64 = AtomicU64::new(0);

/// The states that a process uses; ends when the last clone is dropped.
#[derive(Debug, Clone)]
pub struct Lease(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    held: Mutex<(File, BTreeSet<Key>)>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// No collection takes anything while it is held.
#[derive(Debug)]
pub(super) struct Gate(#[expect(dead_code, reason = "it holds the lock")] File);

fn gate(locks: &Path, how: FlockOperation) -> Result<Gate, StoreError> {
    let path = locks.join(GATE);
    let fail = |e: io::Error| StoreError::new("lock", &path, e);
    let file = OpenOptions::new().write(true).create(true).truncate(false).open(&path).map_err(fail)?;
    rustix::fs::flock(&file, how).map_err(|e| fail(e.into()))?;
    Ok(Gate(file))
}

/// Waits until no collection decides, and lets none begin to.
pub(super) fn enter(locks: &Path) -> Result<Gate, StoreError> {
    gate(locks, FlockOperation::LockShared)
}

/// Waits until no process is between looking for states and leasing them.
pub(super) fn close(locks: &Path) -> Result<Gate, StoreError> {
    gate(locks, FlockOperation::LockExclusive)
}

impl Lease {
    /// Makes a lease of nothing. `locks` is the directory of locks.
    pub(super) fn new(locks: &Path) -> Result<Self, StoreError> {
        loop {
            let n = COUNTER.fetch_add(1, Ordering::Relaxed);
            let path = locks.join(format!("{PREFIX}{}-{n}", std::process::id()));
            let fail = |e: io::Error| StoreError::new("lease states in", &path, e);
            // Another container may have a process with the same number.
            let file = match OpenOptions::new().append(true).create_new(true).open(&path) {
                Ok(file) => file,
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => continue,
                Err(e) => return Err(fail(e)),
            };
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                // A collection took it for the lease of a dead process.
                Err(rustix::io::Errno::WOULDBLOCK) => continue,
                locked => locked.map_err(|e| fail(e.into()))?,
            }
            if !path.exists() {
                continue;
            }
            return Ok(Self(Arc::new(Inner { path, held: Mutex::new((file, BTreeSet::new())) })));
        }
    }

    /// Adds states, and all states below them. They may not exist yet.
    ///
    /// # Errors
    ///
    /// The file can't be written.
    pub fn hold(&self, keys: impl IntoIterator<Item = Key>) -> Result<(), StoreError> {
        let mut held = self.0.held.lock().unwrap_or_else(PoisonError::into_inner);
        let (file, known) = &mut *held;
        let new: BTreeSet<Key> = keys.into_iter().filter(|key| !known.contains(key)).collect();
        let text: String = new.iter().map(|key| format!("{key}\n")).collect();
        let fail = |e: io::Error| StoreError::new("lease states in", &self.0.path, e);
        let before = file.metadata().map_err(fail)?.len();
        if let Err(error) = file.write_all(text.as_bytes()) {
            // A half written line would spoil the next one.
            let _ = file.set_len(before);
            return Err(fail(error));
        }
        known.extend(new);
        Ok(())
    }
}

/// Reads the leases of all living processes, and removes those of dead ones. The
/// gate must be closed.
pub(super) fn leased(locks: &Path) -> Result<BTreeSet<Key>, StoreError> {
    let mut keys = BTreeSet::new();
    let entries = fs::read_dir(locks).map_err(|e| StoreError::new("read", locks, e))?;
    for entry in entries.flatten() {
        if !entry.file_name().to_string_lossy().starts_with(PREFIX) {
            continue;
        }
        let path = entry.path();
        let fail = |e: io::Error| StoreError::new("read", &path, e);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            Err(e) => return Err(fail(e)),
        };
        if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() {
            let _ = fs::remove_file(&path);
            continue;
        }
        let text = fs::read_to_string(&path).map_err(fail)?;
        // The last line may be half written: its state is not used yet.
        keys.extend(text.lines().filter_map(|line| Some(Key(line.parse().ok()?))));
    }
    Ok(keys)
}

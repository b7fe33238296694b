//! The snapshot store.

use std::collections::HashSet;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::retarget;
use super::snapshot::Snapshot;

/// Snapshots may take one part in this many of the free disk.
pub(super) const SHARE: u64 = 4;
/// Space that must stay free on the disk, in bytes.
pub(super) const FREE: u64 = 2 << 30;

/// The snapshot store, and whether snapshots work on this host.
pub(super) struct Snapshots {
    pub(super) home: PathBuf,
    /// Snapshots that this process has saved.
    own: Mutex<HashSet<PathBuf>>,
    /// Set when one of these did not resume: this host or QEMU can't do it.
    useless: AtomicBool,
}

impl Snapshots {
    pub(super) fn new(home: PathBuf) -> Self {
        Self { home, own: Mutex::default(), useless: AtomicBool::new(false) }
    }

    pub(super) fn are_of_use(&self) -> bool {
        !self.useless.load(Ordering::Relaxed)
    }

    pub(super) fn add(&self, dir: &Path) {
        self.own.lock().unwrap_or_else(PoisonError::into_inner).insert(dir.to_owned());
    }

    /// Removes a snapshot that does not resume.
    pub(super) fn failed(&self, dir: &Path) {
        Snapshot::at(dir).remove();
        if self.own.lock().unwrap_or_else(PoisonError::into_inner).contains(dir) {
            self.useless.store(true, Ordering::Relaxed);
        }
    }
}

/// The snapshot of a fork.
pub(super) struct Origin {
    pub(super) snapshots: Arc<Snapshots>,
    pub(super) dir: PathBuf,
}

impl Origin {
    /// Removes the snapshot, because the fork did not start.
    pub(super) fn distrust(&self) {
        self.snapshots.failed(&self.dir);
    }
}

/// The data to save the memory of a machine with that is booting.
pub(super) struct PendingSnapshot {
    pub(super) snapshots: Arc<Snapshots>,
    /// The directory for the snapshot.
    pub(super) dir: PathBuf,
    pub(super) scratch: PathBuf,
    pub(super) overlay: PathBuf,
    pub(super) origin: retarget::Origin,
    /// Why no other snapshot could be retargeted.
    pub(super) why: Option<String>,
    /// Held while this process boots what others wait to fork.
    pub(super) _lock: File,
}

/// Returns the free space of a disk, in bytes.
pub(super) fn free(home: &Path) -> u64 {
    rustix::fs::statvfs(home).map_or(0, |s| s.f_bavail * s.f_frsize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_that_forks_nothing_is_not_asked_again() {
        let home = tempfile::tempdir().unwrap();
        let snapshots = Arc::new(Snapshots::new(home.path().to_owned()));
        let useless = || !snapshots.are_of_use();
        let of = |name: &str| Origin { snapshots: snapshots.clone(), dir: home.path().join(name) };
        std::fs::create_dir(home.path().join("old")).unwrap();
        of("old").distrust();
        assert!(!useless() && !home.path().join("old").exists(), "another host may have kept it");
        snapshots.add(&home.path().join("new"));
        of("new").distrust();
        assert!(useless());
    }
}

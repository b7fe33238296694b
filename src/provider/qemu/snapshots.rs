//! Where machines are kept, and which of them are of use.

use std::collections::HashSet;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::retarget;
use super::snapshot::Snapshot;

/// The share of the free disk, one in so many, that kept machines may take.
pub(super) const SHARE: u64 = 4;
/// How much of a disk must stay free, in bytes.
pub(super) const FREE: u64 = 2 << 30;

/// Where machines are kept, and whether that is of use here.
pub(super) struct Snapshots {
    pub(super) home: PathBuf,
    /// What this process has kept.
    own: Mutex<HashSet<PathBuf>>,
    /// Not even that goes on: this host, or this QEMU, can't do it.
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

    /// Removes a machine that does not go on.
    pub(super) fn failed(&self, dir: &Path) {
        Snapshot::at(dir).remove();
        if self.own.lock().unwrap_or_else(PoisonError::into_inner).contains(dir) {
            self.useless.store(true, Ordering::Relaxed);
        }
    }
}

/// A kept machine that was forked.
pub(super) struct Origin {
    pub(super) snapshots: Arc<Snapshots>,
    pub(super) dir: PathBuf,
}

impl Origin {
    /// It did not come up.
    pub(super) fn distrust(&self) {
        self.snapshots.failed(&self.dir);
    }
}

/// What it takes to keep a machine that boots.
pub(super) struct PendingSnapshot {
    pub(super) snapshots: Arc<Snapshots>,
    /// Where it is to be.
    pub(super) dir: PathBuf,
    pub(super) scratch: PathBuf,
    pub(super) overlay: PathBuf,
    pub(super) origin: retarget::Origin,
    /// Why none goes on that was kept of another disk.
    pub(super) why: Option<String>,
    /// Held by who boots what others want to fork.
    pub(super) _lock: File,
}

/// What is free of the disk, in bytes.
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

//! Finds a snapshot of a near-identical disk, and the files that must change in
//! a fork of it.
//!
//! The agent in the fork decides whether the result equals a boot: it knows
//! what the boot has read (`agent/src/retarget.rs`). If anything is unclear or
//! fails, the machine boots.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use vimg_agent::protocol::MAX_RETARGETED;

use super::snapshot::Snapshot;
use crate::disk::difference::{NOTES, compare};
use crate::disk::ext4::{Difference, Special};
use crate::files;
use crate::provider::{Retarget, Retargeted};

/// Directories whose files the kernel itself opens, without fanotify events.
const KERNELS: [&str; 2] = ["/usr/lib/firmware", "/lib/firmware"];
/// Maximum number of snapshots that are compared, the nearest first.
const TRIED: usize = 6;

/// The machine and the disk of a snapshot, stored beside it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Origin {
    /// Identifies everything but the disk.
    machine: String,
    /// Its disk, the lowest file first.
    chain: Vec<File>,
}

/// A file of the store. It never changes, but may be removed and made again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct File {
    path: PathBuf,
    /// Device, inode, size and modification time. A server's hard link to the
    /// file changes only the inode's change time, which is left out.
    stamp: [u64; 5],
}

impl File {
    fn of(path: &Path) -> io::Result<Self> {
        let [device, inode, size, seconds, nanoseconds, ..] = files::stamp(&rustix::fs::stat(path)?);
        Ok(Self { path: path.to_owned(), stamp: [device, inode, size, seconds, nanoseconds] })
    }

    fn is_there(&self) -> bool {
        Self::of(&self.path).is_ok_and(|now| now == *self)
    }
}

impl Origin {
    pub(super) fn of(machine: String, chain: &[PathBuf]) -> io::Result<Self> {
        Ok(Self { machine, chain: chain.iter().map(|path| File::of(path)).collect::<Result<_, _>>()? })
    }

    pub(super) fn write(&self, snapshot: &Snapshot) -> io::Result<()> {
        fs::write(snapshot.origin(), serde_json::to_vec(self)?)
    }

    fn read(snapshot: &Snapshot) -> Option<Self> {
        serde_json::from_slice(&fs::read(snapshot.origin()).ok()?).ok()
    }
}

/// A snapshot of a near-identical disk.
pub(super) struct Near {
    pub(super) snapshot: PathBuf,
    pub(super) retargeted: Retargeted,
}

/// A snapshot that may fit.
struct Candidate {
    /// How many of its lowest disks are also the lowest wanted disks.
    shared: usize,
    used: std::time::SystemTime,
    snapshot: PathBuf,
    origin: Origin,
}

impl Candidate {
    fn at(dir: PathBuf, wanted: &Origin) -> Option<Self> {
        let snapshot = Snapshot::at(&dir);
        let origin = Origin::read(&snapshot).filter(|o| o.machine == wanted.machine)?;
        let shared = origin.chain.iter().zip(&wanted.chain).take_while(|(a, b)| a == b).count();
        let of_use = snapshot.is_there()
            && snapshot.memory().exists()
            && shared > 0
            && origin.chain.iter().all(File::is_there);
        of_use.then(|| Some(Self { shared, used: snapshot.used()?, snapshot: dir, origin }))?
    }

    /// Compares its disk with the wanted one. With `named`, the result names a
    /// file.
    fn against(&self, wanted: &Origin, retarget: Retarget, named: bool) -> io::Result<Difference> {
        let apart: &[&str] = if retarget == Retarget::Discarded { &NOTES } else { &[] };
        let special = Special { apart, fixed: &KERNELS, most: MAX_RETARGETED, named };
        compare(&paths(&self.origin), &paths(wanted), self.shared, special)
    }

    /// Returns the files to change; `None` if it can't be retargeted.
    fn retargeted(&self, wanted: &Origin, retarget: Retarget) -> Option<Retargeted> {
        match self.against(wanted, retarget, false) {
            Ok(Difference::Files(altered)) => {
                Some(Retargeted { altered: altered.into(), chain: paths(&self.origin) })
            }
            _ => None,
        }
    }
}

/// Lists the snapshots in `home` that may fit, the nearest first.
fn candidates(home: &Path, wanted: &Origin) -> Vec<Candidate> {
    let mut near: Vec<Candidate> = fs::read_dir(home)
        .into_iter()
        .flatten()
        .flatten()
        // Names of snapshots that are being removed begin with a dot.
        .filter(|entry| !entry.file_name().as_encoded_bytes().starts_with(b"."))
        .filter_map(|entry| Candidate::at(entry.path(), wanted))
        .collect();
    near.sort_by_key(|one| {
        std::cmp::Reverse((one.shared, one.origin.chain.len() == wanted.chain.len(), one.used))
    });
    near
}

/// Finds a snapshot in `home` that can be retargeted. `Err` says why the
/// nearest one can't; `None` if there is none that comes close.
pub(super) fn find(home: &Path, wanted: &Origin, retarget: Retarget) -> Option<Result<Near, String>> {
    let mut near = candidates(home, wanted);
    near.truncate(TRIED);
    for one in &near {
        if let Some(retargeted) = one.retargeted(wanted, retarget) {
            return Some(Ok(Near { snapshot: one.snapshot.clone(), retargeted }));
        }
    }
    // The machine boots now, so the time to find a name does not matter.
    Some(Err(match near.first()?.against(wanted, retarget, true) {
        Ok(Difference::More(what)) => what,
        Ok(Difference::Files(_)) => return None,
        Err(error) => format!("the disk of the snapshot can't be compared: {error}"),
    }))
}

/// Compares the snapshot at `snapshot` with a disk, for a fork that is thrown
/// away; `None` if it can't be retargeted.
pub(super) fn over(snapshot: PathBuf, wanted: &Origin) -> Option<Retargeted> {
    Candidate::at(snapshot, wanted)?.retargeted(wanted, Retarget::Discarded)
}

fn paths(origin: &Origin) -> Vec<PathBuf> {
    origin.chain.iter().map(|file| file.path.clone()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_of_the_store_is_the_same_while_servers_link_to_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.qcow2");
        fs::write(&path, "a disk").unwrap();
        let file = File::of(&path).unwrap();
        fs::hard_link(&path, dir.path().join("link")).unwrap();
        assert!(file.is_there());
        // A new file with the same name is another one.
        fs::remove_file(&path).unwrap();
        fs::write(&path, "a disk").unwrap();
        assert!(!file.is_there());
    }
}

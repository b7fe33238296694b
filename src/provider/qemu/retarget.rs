//! Finds a kept machine whose disk is almost the one that is wanted, and what
//! of it has to be changed: files that hold something else.
//!
//! Whether that comes to the same as a boot, the machine's agent says, which
//! knows what the boot has read (`agent/src/retarget.rs`). Whatever is unclear
//! before, or fails, is a reason to boot.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use vimg_agent::protocol::MAX_RETARGETED;

use super::snapshot::Snapshot;
use crate::ext4::{Difference, Special};
use crate::files;
use crate::provider::difference::{NOTES, compare};
use crate::provider::{Retarget, Retargeted};

/// What the kernel itself opens, unseen.
const KERNELS: [&str; 2] = ["/usr/lib/firmware", "/lib/firmware"];
/// How many kept machines are compared at most, the nearest first.
const TRIED: usize = 6;

/// What a machine was kept of, beside it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Origin {
    /// Names everything but the disk.
    machine: String,
    /// Its disk, the lowest file first.
    chain: Vec<File>,
}

/// A file of the store, which never changes, but may go and come again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct File {
    path: PathBuf,
    /// Device, inode, size and time of the last change of its content. A server's
    /// link to it changes the time of its inode, which is none of these.
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

/// A machine that booted from almost the same disk.
pub(super) struct Near {
    pub(super) snapshot: PathBuf,
    pub(super) retargeted: Retargeted,
}

/// A machine that may do, and what it was kept of.
struct Candidate {
    /// How many of its disks are wanted, too: the lowest.
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

    /// In what the disk that is wanted differs from its own; if that is to be
    /// told, `named`.
    fn against(&self, wanted: &Origin, retarget: Retarget, named: bool) -> io::Result<Difference> {
        let apart: &[&str] = if retarget == Retarget::Discarded { &NOTES } else { &[] };
        let special = Special { apart, fixed: &KERNELS, most: MAX_RETARGETED, named };
        compare(&paths(&self.origin), &paths(wanted), self.shared, special)
    }

    /// How it is carried over to the disk that is wanted, if it may be.
    fn retargeted(&self, wanted: &Origin, retarget: Retarget) -> Option<Retargeted> {
        match self.against(wanted, retarget, false) {
            Ok(Difference::Files(altered)) => {
                Some(Retargeted { altered: altered.into(), chain: paths(&self.origin) })
            }
            _ => None,
        }
    }
}

/// Those in `home` that may do, the nearest first.
fn candidates(home: &Path, wanted: &Origin) -> Vec<Candidate> {
    let mut near: Vec<Candidate> = fs::read_dir(home)
        .into_iter()
        .flatten()
        .flatten()
        // What is being removed has such a name.
        .filter(|entry| !entry.file_name().as_encoded_bytes().starts_with(b"."))
        .filter_map(|entry| Candidate::at(entry.path(), wanted))
        .collect();
    near.sort_by_key(|one| {
        std::cmp::Reverse((one.shared, one.origin.chain.len() == wanted.chain.len(), one.used))
    });
    near
}

/// Finds one among those in `home`; a sentence says why there is none, if
/// there is a machine that comes close.
pub(super) fn find(home: &Path, wanted: &Origin, retarget: Retarget) -> Option<Result<Near, String>> {
    let mut near = candidates(home, wanted);
    near.truncate(TRIED);
    for one in &near {
        if let Some(retargeted) = one.retargeted(wanted, retarget) {
            return Some(Ok(Near { snapshot: one.snapshot.clone(), retargeted }));
        }
    }
    // The machine boots, and to find a name takes little time beside that.
    Some(Err(match near.first()?.against(wanted, retarget, true) {
        Ok(Difference::More(what)) => what,
        Ok(Difference::Files(_)) => return None,
        Err(error) => format!("its disk can't be compared: {error}"),
    }))
}

/// How a machine that is thrown away, and was kept at `snapshot`, is carried over
/// to a disk, if it may be.
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
        // Made again, it is another one.
        fs::remove_file(&path).unwrap();
        fs::write(&path, "a disk").unwrap();
        assert!(!file.is_there());
    }
}

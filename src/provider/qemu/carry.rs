//! Finds a kept machine whose disk is almost the one that is wanted, and what
//! of it has to be changed: files that hold something else.
//!
//! Whether that comes to the same as a boot, the machine's agent says, which
//! knows what the boot has read (`agent/src/carry.rs`). Whatever is unclear
//! before, or fails, is a reason to boot.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use vimg_agent::protocol::MOST_CARRIED;

use super::kept::Kept;
use crate::ext4::{Difference, Special};
use crate::files::{self, Stamp};
use crate::provider::difference::{NOTES, compare};
use crate::provider::{Carried, Carry};

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
    stamp: Stamp,
}

impl File {
    fn of(path: &Path) -> io::Result<Self> {
        Ok(Self { path: path.to_owned(), stamp: files::stamp(&rustix::fs::stat(path)?) })
    }

    fn is_there(&self) -> bool {
        Self::of(&self.path).is_ok_and(|now| now == *self)
    }
}

impl Origin {
    pub(super) fn of(machine: String, chain: &[PathBuf]) -> io::Result<Self> {
        Ok(Self { machine, chain: chain.iter().map(|path| File::of(path)).collect::<Result<_, _>>()? })
    }

    pub(super) fn write(&self, kept: &Kept) -> io::Result<()> {
        fs::write(kept.origin(), serde_json::to_vec(self)?)
    }

    fn read(kept: &Kept) -> Option<Self> {
        serde_json::from_slice(&fs::read(kept.origin()).ok()?).ok()
    }
}

/// A machine that booted from almost the same disk.
pub(super) struct Near {
    pub(super) kept: PathBuf,
    pub(super) carried: Carried,
}

/// Finds one among those in `home`; a sentence says why there is none, if
/// there is a machine that comes close.
pub(super) fn find(home: &Path, wanted: &Origin, carry: Carry) -> Option<Result<Near, String>> {
    let apart: &[&str] = if carry == Carry::Thrown { &NOTES } else { &[] };
    let mut near: Vec<(usize, std::time::SystemTime, PathBuf, Origin)> = fs::read_dir(home)
        .ok()?
        .flatten()
        .filter_map(|entry| {
            // What is being removed has such a name.
            if entry.file_name().as_encoded_bytes().starts_with(b".") {
                return None;
            }
            let kept = Kept::at(&entry.path());
            let origin = Origin::read(&kept).filter(|o| o.machine == wanted.machine)?;
            let shared = origin.chain.iter().zip(&wanted.chain).take_while(|(a, b)| a == b).count();
            let of_use = kept.is_there()
                && kept.memory().exists()
                && shared > 0
                && origin.chain.iter().all(File::is_there);
            of_use.then(|| Some((shared, kept.used()?, entry.path(), origin)))?
        })
        .collect();
    near.sort_by_key(|(shared, used, _, origin)| {
        std::cmp::Reverse((*shared, origin.chain.len() == wanted.chain.len(), *used))
    });
    near.truncate(TRIED);
    let against = |(shared, _, _, origin): &(usize, _, _, Origin), named| {
        let special = Special { apart, fixed: &KERNELS, most: MOST_CARRIED, named };
        compare(&paths(origin), &paths(wanted), *shared, special)
    };
    for one in &near {
        if let Ok(Difference::Files(altered)) = against(one, false) {
            let (_, _, kept, origin) = one;
            let carried = Carried { altered: altered.into(), chain: paths(origin) };
            return Some(Ok(Near { kept: kept.clone(), carried }));
        }
    }
    // The machine boots, and to find a name takes little time beside that.
    Some(Err(match against(near.first()?, true) {
        Ok(Difference::More(what)) => what,
        Ok(Difference::Files(_)) => return None,
        Err(error) => format!("its disk can't be compared: {error}"),
    }))
}

fn paths(origin: &Origin) -> Vec<PathBuf> {
    origin.chain.iter().map(|file| file.path.clone()).collect()
}

//! Remembers digests of files that did not change since they were hashed.
//!
//! A file counts as unchanged if device, inode, size, mtime and ctime are the
//! same. A change within one tick of the clock would not show in these, so the
//! digest of a recently changed file is not remembered.

use std::collections::HashMap;
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::Stat;

use crate::digest::Digest;

/// Files younger than this when hashed are hashed again, in seconds. Kernels
/// stamp files with a coarse clock, network filesystems with another one.
pub(super) const SETTLED: i64 = 2;

/// Device, inode, size, mtime and ctime with their nanoseconds.
pub type Stamp = [u64; 7];

/// Digests by stamp.
#[derive(Debug, Default, Clone)]
pub struct Stamps {
    known: HashMap<Stamp, Digest>,
    used: HashMap<Stamp, Digest>,
    changed: bool,
}

const RECORD: usize = 7 * 8 + 32;

impl Stamps {
    /// Parses the output of [`Stamps::to_bytes`]. Ignores anything else.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let mut known = HashMap::with_capacity(bytes.len() / RECORD);
        for record in bytes.chunks_exact(RECORD) {
            let mut stamp = [0; 7];
            for (field, bytes) in stamp.iter_mut().zip(record.chunks_exact(8)) {
                *field = u64::from_le_bytes(bytes.try_into().unwrap_or_default());
            }
            let mut digest = [0; 32];
            digest.copy_from_slice(&record[7 * 8..]);
            known.insert(stamp, Digest(digest));
        }
        Self { known, used: HashMap::new(), changed: false }
    }

    /// Encodes the stamps that were used in this build; `None` if the file
    /// would not change.
    pub fn to_bytes(&self) -> Option<Vec<u8>> {
        if !self.changed && self.used.len() == self.known.len() {
            return None;
        }
        let mut out = Vec::with_capacity(self.used.len() * RECORD);
        for (stamp, digest) in &self.used {
            for field in stamp {
                out.extend(field.to_le_bytes());
            }
            out.extend(digest.0);
        }
        Some(out)
    }

    pub(super) fn get(&mut self, stat: &Stat) -> Option<Digest> {
        let stamp = stamp(stat);
        let digest = *self.used.get(&stamp).or_else(|| self.known.get(&stamp))?;
        self.used.insert(stamp, digest);
        Some(digest)
    }

    pub(super) fn put(&mut self, stat: &Stat, digest: Digest) {
        let now = now();
        // If the clock jumped back, files look young and are hashed again.
        if stat.st_mtime.max(stat.st_ctime) + SETTLED >= now {
            return;
        }
        self.used.insert(stamp(stat), digest);
        self.changed = true;
    }
}

/// Returns the current time, in seconds since 1970.
pub(super) fn now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs() as i64)
}

pub(super) fn same(a: &Stat, b: &Stat) -> bool {
    stamp(a) == stamp(b)
}

/// Returns the stamp of a file, which changes when the file does.
pub fn stamp(stat: &Stat) -> Stamp {
    [
        stat.st_dev,
        stat.st_ino,
        stat.st_size as u64,
        stat.st_mtime as u64,
        stat.st_mtime_nsec,
        stat.st_ctime as u64,
        stat.st_ctime_nsec,
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn young_files_are_not_remembered_and_old_ones_are() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, "x").unwrap();
        let digest = Digest::of(b"x");
        let mut stamps = Stamps::default();
        stamps.put(&rustix::fs::stat(&path).unwrap(), digest);
        assert_eq!(stamps.get(&rustix::fs::stat(&path).unwrap()), None, "written just now");

        // An old file of the system: neither mtime nor ctime is recent.
        let old = rustix::fs::stat("/etc/passwd").unwrap();
        stamps.put(&old, digest);
        let bytes = stamps.to_bytes().unwrap();
        let mut again = Stamps::from_bytes(&bytes);
        assert_eq!(again.get(&old), Some(digest));
        assert_eq!(again.to_bytes(), None, "nothing to write");
    }
}

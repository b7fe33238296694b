//! Memory snapshots: files of a machine that ran, and how to handle them.
//!
//! Main memory is a file that the machine wrote to. The state of the devices is
//! QEMU's migration stream. A fork maps the memory privately, loads the
//! devices, and continues where the machine stopped. A snapshot only saves
//! time: one that does not fit or does not start is removed, and a machine
//! boots instead.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use super::programs::{Accel, Rig};
use crate::digest::Description;
use crate::disk::sparse;

/// Prefix of directories that are being removed.
const GONE_PREFIX: &str = ".gone-";

/// A snapshot: a directory with the files of a machine.
pub(super) struct Snapshot {
    dir: PathBuf,
}

impl Snapshot {
    pub(super) fn at(dir: &Path) -> Self {
        Self { dir: dir.to_owned() }
    }

    /// Creates the directory of a new snapshot.
    pub(super) fn new(dir: PathBuf) -> std::io::Result<Self> {
        std::fs::create_dir(&dir)?;
        Ok(Self { dir })
    }

    /// The main memory.
    pub(super) fn memory(&self) -> PathBuf {
        self.dir.join("memory")
    }

    /// What the machine wrote to its disk before the snapshot, if it had a
    /// disk.
    pub(super) fn disk(&self) -> PathBuf {
        self.dir.join("disk.qcow2")
    }

    pub(super) fn devices(&self) -> PathBuf {
        self.dir.join("devices")
    }

    /// The description of its machine and disk.
    pub(super) fn origin(&self) -> PathBuf {
        self.dir.join("origin.json")
    }

    /// When it was last used.
    pub(super) fn used(&self) -> Option<std::time::SystemTime> {
        self.devices().metadata().and_then(|m| m.modified()).ok()
    }

    /// Whether the snapshot exists.
    pub(super) fn is_there(&self) -> bool {
        self.devices().exists()
    }

    /// Notes that it was used.
    pub(super) fn touch(&self) {
        if let Ok(file) = std::fs::File::open(self.devices()) {
            let _ = file.set_modified(std::time::SystemTime::now());
        }
    }

    /// Removes it. The rename makes sure that no process finds a part of it.
    pub(super) fn remove(&self) {
        static GONE: AtomicU32 = AtomicU32::new(0);
        let n = GONE.fetch_add(1, Ordering::Relaxed);
        let gone = self.dir.with_file_name(format!("{GONE_PREFIX}{}-{n}", std::process::id()));
        if std::fs::rename(&self.dir, &gone).is_ok() {
            let _ = std::fs::remove_dir_all(gone);
        }
    }

    /// Renames it to its final name. If there is a snapshot of that name
    /// already, that one stays.
    pub(super) fn rename(self, to: &Path) -> std::io::Result<()> {
        let there = Self::at(to);
        if there.is_there() {
            self.remove();
            return Ok(());
        }
        // An incomplete snapshot is useless.
        there.remove();
        std::fs::rename(&self.dir, to)
    }

    /// Makes holes where the memory is zero. No process may use it. A failure
    /// only costs space.
    pub(super) async fn shrink(&self) {
        let path = self.memory();
        let punch = move || sparse::punch(&std::fs::File::options().read(true).write(true).open(path)?);
        let _ = tokio::task::spawn_blocking(punch).await;
    }

    /// Syncs it, so that a power cut can't leave a part of it that looks whole.
    pub(super) fn sync(&self) -> std::io::Result<()> {
        for file in [self.memory(), self.devices()] {
            std::fs::File::open(file)?.sync_all()?;
        }
        Ok(())
    }
}

/// What every snapshot depends on: QEMU, and under KVM the host itself.
pub(super) fn facts(Rig { programs, accel, .. }: Rig<'_>) -> Description {
    let mut d = Description::default();
    d.value("qemu", &programs.version);
    if let Ok(meta) = std::fs::metadata(&programs.system) {
        d.value("qemu file", format_args!("{}:{}:{}", meta.len(), meta.mtime(), meta.ino()));
    }
    if accel == Accel::Kvm {
        // The guest has seen this processor and this kernel.
        d.value("host", std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default());
        let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let same = |line: &&str| !line.contains("MHz") && !line.contains("bogomips");
        d.value("processor", cpu.lines().take_while(|l| !l.is_empty()).filter(same).collect::<String>());
    }
    d
}

/// Waits for an exclusive lock. It is released with the file, even if its
/// holder dies.
pub(super) async fn exclusive(path: &Path) -> std::io::Result<std::fs::File> {
    let file = std::fs::File::create(path)?;
    loop {
        match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
            Err(rustix::io::Errno::WOULDBLOCK) => tokio::time::sleep(Duration::from_millis(20)).await,
            result => return result.map(|()| file).map_err(Into::into),
        }
    }
}

/// Removes the least recently used snapshots in `home` until they take at most
/// `most` bytes. A running fork has the files open.
pub(super) fn forget_old(home: &Path, most: u64) {
    let Ok(entries) = std::fs::read_dir(home) else { return };
    let size = |dir: &Path| -> u64 {
        let files = std::fs::read_dir(dir).into_iter().flatten().flatten();
        files.filter_map(|f| Some(f.metadata().ok()?.blocks() * 512)).sum()
    };
    let mut snapshot: Vec<_> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.is_dir())
        .filter(|path| {
            // A process died while it removed this.
            let gone = path.file_name().is_some_and(|n| n.to_string_lossy().starts_with(GONE_PREFIX));
            if gone {
                let _ = std::fs::remove_dir_all(path);
            }
            !gone
        })
        .map(|path| (Snapshot::at(&path).used(), size(&path), path))
        .collect();
    snapshot.sort();
    let mut sum: u64 = snapshot.iter().map(|(_, size, _)| size).sum();
    for (_, size, path) in snapshot {
        if sum <= most {
            break;
        }
        sum -= size;
        Snapshot::at(&path).remove();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_goes_first() {
        let home = tempfile::tempdir().unwrap();
        for (n, name) in ["b", "a", "c"].iter().enumerate() {
            let snapshot = Snapshot::new(home.path().join(name)).unwrap();
            std::fs::write(snapshot.memory(), vec![1; 64 << 10]).unwrap();
            std::fs::write(snapshot.devices(), "").unwrap();
            let time = std::time::SystemTime::UNIX_EPOCH + Duration::from_secs(n as u64);
            std::fs::File::open(snapshot.devices()).unwrap().set_modified(time).unwrap();
        }
        let left = || {
            let entries = std::fs::read_dir(home.path()).unwrap().flatten();
            let mut names: Vec<String> =
                entries.map(|e| e.file_name().to_string_lossy().into_owned()).collect();
            names.sort();
            names.concat()
        };
        forget_old(home.path(), 1 << 20);
        assert_eq!(left(), "abc");
        forget_old(home.path(), 150 << 10);
        assert_eq!(left(), "ac");
        Snapshot::at(&home.path().join("a")).touch();
        forget_old(home.path(), 100 << 10);
        assert_eq!(left(), "a");
        forget_old(&home.path().join("nothing"), 0);
    }
}

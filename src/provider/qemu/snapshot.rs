//! The memory of a machine that ran, kept in files, and forks of it.
//!
//! Main memory is a file that the machine wrote to; the state of its devices
//! is what QEMU sends to whom it migrates. A fork maps the file privately and
//! takes the devices over, and runs where the machine stood. What is kept only
//! saves time: whatever does not fit or does not start is removed, and a
//! machine boots instead.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use super::programs::{Accel, Rig};
use crate::digest::Description;
use crate::sparse;

/// How the directories begin that are being removed.
const GONE_PREFIX: &str = ".gone-";

/// The files of a kept machine, in a directory of their own.
pub(super) struct Snapshot {
    dir: PathBuf,
}

impl Snapshot {
    pub(super) fn at(dir: &Path) -> Self {
        Self { dir: dir.to_owned() }
    }

    /// Makes the directory that it is to be in.
    pub(super) fn new(dir: PathBuf) -> std::io::Result<Self> {
        std::fs::create_dir(&dir)?;
        Ok(Self { dir })
    }

    /// Main memory.
    pub(super) fn memory(&self) -> PathBuf {
        self.dir.join("memory")
    }

    /// What the machine wrote to its disk before it was kept, if it had one.
    pub(super) fn disk(&self) -> PathBuf {
        self.dir.join("disk.qcow2")
    }

    pub(super) fn devices(&self) -> PathBuf {
        self.dir.join("devices")
    }

    /// What it was kept of.
    pub(super) fn origin(&self) -> PathBuf {
        self.dir.join("origin.json")
    }

    /// When it was of use last.
    pub(super) fn used(&self) -> Option<std::time::SystemTime> {
        self.devices().metadata().and_then(|m| m.modified()).ok()
    }

    /// Whether there is one.
    pub(super) fn is_there(&self) -> bool {
        self.devices().exists()
    }

    /// Notes that it was of use.
    pub(super) fn touch(&self) {
        if let Ok(file) = std::fs::File::open(self.devices()) {
            let _ = file.set_modified(std::time::SystemTime::now());
        }
    }

    /// Removes it, at once: nobody finds a part of it.
    pub(super) fn remove(&self) {
        static GONE: AtomicU32 = AtomicU32::new(0);
        let n = GONE.fetch_add(1, Ordering::Relaxed);
        let gone = self.dir.with_file_name(format!("{GONE_PREFIX}{}-{n}", std::process::id()));
        if std::fs::rename(&self.dir, &gone).is_ok() {
            let _ = std::fs::remove_dir_all(gone);
        }
    }

    /// Takes its name, whole. If there is one of that name already, it stays.
    pub(super) fn rename(self, to: &Path) -> std::io::Result<()> {
        let there = Self::at(to);
        if there.is_there() {
            self.remove();
            return Ok(());
        }
        // What is not whole is of no use to anybody.
        there.remove();
        std::fs::rename(&self.dir, to)
    }

    /// Makes holes of what the machine left clear, once nobody uses it. What
    /// fails of that costs room, and nothing else.
    pub(super) async fn shrink(&self) {
        let path = self.memory();
        let punch = move || sparse::punch(&std::fs::File::options().read(true).write(true).open(path)?);
        let _ = tokio::task::spawn_blocking(punch).await;
    }

    /// Makes it outlive a power cut: what is only half on disk must not be
    /// taken for whole.
    pub(super) fn sync(&self) -> std::io::Result<()> {
        for file in [self.memory(), self.devices()] {
            std::fs::File::open(file)?.sync_all()?;
        }
        Ok(())
    }
}

/// What any kept machine depends on: QEMU, and under KVM the host itself.
pub(super) fn facts(Rig { programs, accel, .. }: Rig<'_>) -> Description {
    let mut d = Description::default();
    d.value("qemu", &programs.version);
    if let Ok(meta) = std::fs::metadata(&programs.system) {
        d.value("qemu file", format_args!("{}:{}:{}", meta.len(), meta.mtime(), meta.ino()));
    }
    if accel == Accel::Kvm {
        // The guest has seen this processor and this kernel's idea of it.
        d.value("host", std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default());
        let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let same = |line: &&str| !line.contains("MHz") && !line.contains("bogomips");
        d.value("processor", cpu.lines().take_while(|l| !l.is_empty()).filter(same).collect::<String>());
    }
    d
}

/// Waits until nobody else has the lock. It is let go with the file, whatever
/// becomes of its holder.
pub(super) async fn exclusive(path: &Path) -> std::io::Result<std::fs::File> {
    let file = std::fs::File::create(path)?;
    loop {
        match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
            Err(rustix::io::Errno::WOULDBLOCK) => tokio::time::sleep(Duration::from_millis(20)).await,
            result => return result.map(|()| file).map_err(Into::into),
        }
    }
}

/// Removes the oldest of what is kept in `home`, as long as it is more than
/// `most` bytes. Who runs a fork of one has its files open.
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
            // Somebody died while he removed it.
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

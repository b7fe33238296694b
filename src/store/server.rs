//! Servers: the directory of each, with its record and everything that it
//! stands on. The disks, the kernel and the initrd in it are hard links of
//! those in the store. So no removal, rebuild or collection of states can put
//! another base under its disk.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::area::Area;
use super::lock::{KeyLock, try_lock};
use super::record::Boot;
use super::replace::replace;
use super::states::Store;
use crate::digest::Key;

/// The version of `server.json`.
const FORMAT: u32 = 2;
/// An earlier version, with absolute paths.
const ABSOLUTE: u32 = 1;

const RECORD: &str = "server.json";
/// Prefix of the names of disks that are also disks of states.
const SHARED: &str = "base-";
/// Names of its kernel and its initrd.
const BOOT: [&str; 2] = ["kernel", "initrd"];

/// The record of a server. `P` describes a part that is in effect in it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ServerRecord<P> {
    /// The image that it was started from.
    pub image: String,
    /// The key of that image's base, which no change can replace.
    pub root: Key,
    /// When it was first started, in seconds since 1970.
    pub since: u64,
    /// Forwarded ports: address, port of the host, port of the machine.
    pub forwards: Vec<(String, u16, u16)>,
    /// The parts that are in effect.
    pub parts: Vec<P>,
    /// Processors, memory and size of the disk, both in bytes.
    pub machine: (u32, u64, u64),
    /// Its kernel and initrd; `None` boots with the disk's own loader.
    pub boot: Option<Boot>,
    /// The disks below the one that takes the writes, the lowest first: names
    /// in the server's directory.
    pub chain: Vec<PathBuf>,
    /// The disk that takes the writes.
    pub overlay: PathBuf,
    /// A change is not finished; the overlay is only for this change.
    pub changing: bool,
    /// It has `decommission` hooks.
    #[serde(default)]
    pub parting: bool,
}

/// The content of `server.json`.
#[derive(Serialize, Deserialize)]
struct Stored<R> {
    format: u32,
    #[serde(flatten)]
    record: R,
}

/// Reads the record of the server in `dir`. Returns `None` if there is none
/// that this version can read.
pub fn read_server<P: DeserializeOwned>(dir: &Path) -> Option<ServerRecord<P>> {
    let bytes = fs::read(dir.join(RECORD)).ok()?;
    let Stored { format, mut record } = serde_json::from_slice::<Stored<ServerRecord<P>>>(&bytes).ok()?;
    if format == ABSOLUTE {
        // The files were in this directory, wherever it was then.
        for path in record.chain.iter_mut().chain([&mut record.overlay]) {
            *path = path.file_name()?.into();
        }
    }
    [FORMAT, ABSOLUTE].contains(&format).then_some(record)
}

/// The directory of a server, locked against other vimg processes.
pub struct ServerHome {
    dir: PathBuf,
    _lock: KeyLock,
}

impl ServerHome {
    /// Locks the directory of a server. The error says why it can't be locked.
    pub fn take(dir: &Path) -> Result<Self, String> {
        if let Some(parent) = dir.parent() {
            fs::create_dir_all(parent).map_err(|e| format!("{}: {e}", parent.display()))?;
        }
        // No server's name begins with a full stop.
        let name = dir.file_name().unwrap_or_default().to_string_lossy();
        match try_lock(&dir.with_file_name(format!(".lock-{name}"))) {
            Ok(Some(lock)) => Ok(Self { dir: dir.to_owned(), _lock: lock }),
            Ok(None) => Err("another vimg process is using it; try again when that has ended".into()),
            Err(error) => Err(error.to_string()),
        }
    }

    /// Returns the directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Returns the server's record; see [`read_server`].
    pub fn record<P: DeserializeOwned>(&self) -> Option<ServerRecord<P>> {
        read_server(&self.dir)
    }

    /// Whether there is a record, even if this version can't read it.
    pub fn has_record(&self) -> bool {
        self.dir.join(RECORD).exists()
    }

    /// Writes the server's record in one step: vimg finds the server's disks
    /// only through it.
    ///
    /// # Errors
    ///
    /// It can't be written; the old one stays.
    pub fn keep<P: Serialize>(&self, record: &ServerRecord<P>) -> io::Result<()> {
        let bytes = serde_json::to_vec_pretty(&Stored { format: FORMAT, record })?;
        replace(&self.dir.join(RECORD), &bytes)
    }

    /// Returns the paths of the disks below the one that takes the writes.
    pub fn chain<P>(&self, record: &ServerRecord<P>) -> Vec<PathBuf> {
        record.chain.iter().map(|name| self.dir.join(name)).collect()
    }

    /// Returns the path of the disk that takes the writes.
    pub fn overlay<P>(&self, record: &ServerRecord<P>) -> PathBuf {
        self.dir.join(&record.overlay)
    }

    /// Returns a free name for the server's next disk.
    pub fn free_disk(&self) -> PathBuf {
        let mut names = (0..).map(|n| PathBuf::from(format!("disk-{n}.qcow2")));
        names.find(|name| !self.dir.join(name).exists()).unwrap_or_default()
    }

    /// Gives the server hard links to the disks that it stands on. They take no
    /// space. Returns their names.
    ///
    /// # Errors
    ///
    /// A disk can't be linked, for instance because it was removed.
    pub fn adopt(&self, chain: &[PathBuf]) -> io::Result<Vec<PathBuf>> {
        let adopt = |(n, disk): (usize, &PathBuf)| {
            let name = PathBuf::from(format!("{SHARED}{n}.qcow2"));
            fs::hard_link(disk, self.dir.join(&name)).map(|()| name)
        };
        chain.iter().enumerate().map(adopt).collect()
    }

    /// Returns kernel and initrd of the server, if it does not boot with the
    /// disk's own loader. Links those that it does not have yet.
    ///
    /// # Errors
    ///
    /// Neither the server nor the store has one of them, or it can't be linked.
    pub fn boot(&self, store: &Store, boot: &Option<Boot>) -> io::Result<Option<(PathBuf, PathBuf)>> {
        let Some(boot) = boot else { return Ok(None) };
        let [kernel, initrd] = BOOT.map(|name| self.dir.join(name));
        for (own, blob) in [(&kernel, &boot.kernel), (&initrd, &boot.initrd)] {
            if !own.exists() {
                fs::hard_link(store.blob(&blob.digest), own)?;
            }
        }
        Ok(Some((kernel, initrd)))
    }

    /// Returns a disk of the server that is missing.
    pub fn missing<P>(&self, record: &ServerRecord<P>) -> Option<PathBuf> {
        self.chain(record).into_iter().chain([self.overlay(record)]).find(|disk| !disk.exists())
    }

    /// Drops a change that is not finished. The record may also name an overlay
    /// that was never created. A disk that the server shares with a state never
    /// takes its writes.
    pub fn step_back<P>(&self, record: &mut ServerRecord<P>) {
        let is_open = record.changing || !self.overlay(record).exists();
        let is_own = |name: &PathBuf| !name.to_string_lossy().starts_with(SHARED);
        if is_open && record.chain.last().is_some_and(is_own) {
            let _ = fs::remove_file(self.overlay(record));
            if let Some(below) = record.chain.pop() {
                record.overlay = below;
            }
            record.changing = false;
        }
    }

    /// Deletes the server's record and its disks.
    ///
    /// # Errors
    ///
    /// Something can't be deleted.
    pub fn forget(&self) -> io::Result<()> {
        match fs::remove_dir_all(&self.dir) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        }
    }
}

impl Store {
    /// Lists the directories of all servers, with what they boot. A record that
    /// can't be read counts as a server that boots by itself.
    pub(super) fn all_servers(&self) -> Vec<(PathBuf, Option<Boot>)> {
        let entries = |dir: &Path| {
            let entries = fs::read_dir(dir).into_iter().flatten().flatten();
            entries.map(|entry| entry.path()).collect::<Vec<_>>()
        };
        let projects = entries(&self.dir(Area::Servers)).into_iter();
        let dirs = projects.flat_map(|project| entries(&project)).filter(|dir| dir.join(RECORD).exists());
        dirs.map(|dir| {
            let record = read_server::<serde::de::IgnoredAny>(&dir);
            (dir, record.and_then(|record| record.boot))
        })
        .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::{Blob, Digest};

    fn record(boot: Option<Boot>) -> ServerRecord<String> {
        ServerRecord {
            image: "web".into(),
            root: Key(Digest::of(b"root")),
            since: 7,
            forwards: vec![("127.0.0.1".into(), 8080, 80)],
            parts: vec!["part".into()],
            machine: (1, 512 << 20, 1 << 30),
            boot,
            chain: Vec::new(),
            overlay: "disk-0.qcow2".into(),
            changing: false,
            parting: true,
        }
    }

    fn home(store: &Store) -> ServerHome {
        let dir = store.servers(Path::new("/project")).join("web");
        let home = ServerHome::take(&dir).unwrap();
        fs::create_dir_all(&dir).unwrap();
        home
    }

    #[test]
    fn a_server_keeps_what_is_removed_from_the_store() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let home = home(&store);
        assert!(ServerHome::take(home.dir()).is_err(), "it is locked");
        let blob = |text: &str| {
            let blob = Blob::of(text.as_bytes());
            fs::write(store.blob(&blob.digest), text).unwrap();
            blob
        };
        let boot = Some(Boot { kernel: blob("a kernel"), initrd: blob("an initrd") });
        let disks = ["low", "high"].map(|name| store.dir(Area::States).join(name));
        disks.iter().for_each(|disk| fs::write(disk, disk.as_os_str().as_encoded_bytes()).unwrap());
        let mut kept = record(boot);
        kept.chain = home.adopt(&disks).unwrap();
        fs::write(home.overlay(&kept), "writes").unwrap();
        home.boot(&store, &boot).unwrap();
        home.keep(&kept).unwrap();
        // The store is emptied, and another base is built.
        for area in [Area::States, Area::Blobs] {
            fs::remove_dir_all(store.dir(area)).unwrap();
            fs::create_dir(store.dir(area)).unwrap();
        }
        fs::write(&disks[0], "another base").unwrap();
        let found: ServerRecord<String> = home.record().unwrap();
        assert_eq!((&found.parts, found.machine, found.since), (&kept.parts, kept.machine, 7));
        assert_eq!(home.missing(&found), None);
        for (own, disk) in home.chain(&found).iter().zip(&disks) {
            assert_eq!(fs::read(own).unwrap(), disk.as_os_str().as_encoded_bytes());
        }
        let (kernel, initrd) = home.boot(&store, &found.boot).unwrap().unwrap();
        assert_eq!(fs::read_to_string(kernel).unwrap(), "a kernel");
        assert_eq!(fs::read_to_string(&initrd).unwrap(), "an initrd");
        // What it lacks itself is refused.
        fs::remove_file(initrd).unwrap();
        assert_eq!(home.boot(&store, &found.boot).unwrap_err().kind(), io::ErrorKind::NotFound);
        assert_eq!(home.boot(&store, &None).unwrap(), None);
        fs::remove_file(&home.chain(&found)[1]).unwrap();
        assert_eq!(home.missing(&found), Some(home.dir().join("base-1.qcow2")));
        home.forget().unwrap();
        assert!(!home.has_record() && home.record::<String>().is_none());
    }

    #[test]
    fn a_record_of_an_earlier_version_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let home = home(&store);
        let old = record(None);
        let path = |name: &str| Path::new("/elsewhere/servers/id/web").join(name);
        let old = ServerRecord { chain: vec![path("base-0.qcow2")], overlay: path("disk-3.qcow2"), ..old };
        for (format, known) in [(ABSOLUTE, true), (3, false)] {
            let bytes = serde_json::to_vec(&Stored { format, record: &old }).unwrap();
            fs::write(home.dir().join(RECORD), bytes).unwrap();
            assert_eq!((home.record::<String>().is_some(), home.has_record()), (known, true));
        }
        let bytes = serde_json::to_vec(&Stored { format: ABSOLUTE, record: &old }).unwrap();
        fs::write(home.dir().join(RECORD), bytes).unwrap();
        let found = home.record::<String>().unwrap();
        assert_eq!(home.chain(&found), [home.dir().join("base-0.qcow2")]);
        assert_eq!(home.overlay(&found), home.dir().join("disk-3.qcow2"));
    }

    #[test]
    fn an_interrupted_change_is_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let home = home(&store);
        let mut changing = record(None);
        changing.chain = vec!["base-0.qcow2".into(), "disk-0.qcow2".into()];
        changing.overlay = home.free_disk();
        assert_eq!(changing.overlay, Path::new("disk-0.qcow2"));
        fs::write(home.dir().join("disk-0.qcow2"), "before").unwrap();
        changing.overlay = home.free_disk();
        changing.changing = true;
        fs::write(home.overlay(&changing), "a change").unwrap();
        home.step_back(&mut changing);
        assert_eq!(fs::read_to_string(home.overlay(&changing)).unwrap(), "before");
        assert_eq!((changing.chain.len(), changing.changing), (1, false));
        assert!(!home.dir().join("disk-1.qcow2").exists());
        home.step_back(&mut changing);
        assert_eq!(changing.chain.len(), 1, "nothing is left to drop");
        // Without its own disk, it must not write to a disk of the store.
        fs::remove_file(home.overlay(&changing)).unwrap();
        home.step_back(&mut changing);
        assert_eq!(home.missing(&changing), Some(home.dir().join("base-0.qcow2")));
        assert_eq!(changing.overlay, Path::new("disk-0.qcow2"));
    }
}

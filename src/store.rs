//! Where states live on this machine.
//!
//! ```text
//! states/<key>/    disk.qcow2 | disk.raw, record.json, identity, log.zst
//! blobs/<digest>   kernels and initrds
//! staging/<pid>-<n>/                       work in progress
//! locks/<key>      held while a state is made
//! servers/<id>/    a project's servers, with their disks; no cache
//! projects/<id>/   what a project last built; disposable
//! parsed/ probes/ appliances/ memories/    caches; disposable
//! ```
//!
//! The files are the truth, there is no index beside them. A state appears by
//! one rename of a directory whose contents are on disk, or not at all.
//! Knows nothing of providers and graphs.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::AtFlags;

use crate::digest::{Blob, Digest, Key};

mod lock;
mod project;
mod record;
mod staging;

pub use lock::{KeyLock, lock, try_lock};
pub use project::{FailedDisk, Last, ProjectFiles, WrittenOutput};
use record::Identity;
pub use record::{Boot, Disk, DiskKind, Record, SCHEMA, StateId};
pub use staging::Staging;

/// A store that is there and can be written.
#[derive(Debug, Clone)]
pub struct Store {
    root: PathBuf,
    states: Arc<OwnedFd>,
}

/// Why the store can't be used.
#[derive(Debug)]
pub struct StoreError {
    /// Which file or directory.
    pub path: PathBuf,
    /// What was tried.
    pub action: &'static str,
    /// What the system said.
    pub source: io::Error,
}

impl StoreError {
    fn new(action: &'static str, path: impl Into<PathBuf>, source: io::Error) -> Self {
        Self { path: path.into(), action, source }
    }

    /// Whether the disk is full.
    pub fn is_full(&self) -> bool {
        matches!(self.source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
    }
}

impl std::fmt::Display for StoreError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "the store can't {} {}: {}", self.action, self.path.display(), self.source)
    }
}

impl std::error::Error for StoreError {}

impl Store {
    /// Opens or makes the store at `root`.
    pub fn open(root: &Path) -> Result<Self, StoreError> {
        for dir in ["states", "blobs", "staging", "locks", "projects", "probes"] {
            let dir = root.join(dir);
            fs::create_dir_all(&dir).map_err(|e| StoreError::new("make", &dir, e))?;
        }
        let root = root.canonicalize().map_err(|e| StoreError::new("open", root, e))?;
        let states = root.join("states");
        let opened = File::open(&states).map_err(|e| StoreError::new("open", &states, e))?;
        Ok(Self { root, states: Arc::new(opened.into()) })
    }

    /// The store's directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Whether a state is there, whole, with everything that lies below it.
    pub fn has(&self, key: &Key) -> bool {
        self.whole(key, &mut HashMap::new()).is_some()
    }

    /// The same for many states: what was found out is kept in `known`.
    pub fn whole(&self, key: &Key, known: &mut HashMap<Key, Option<StateId>>) -> Option<StateId> {
        let mut way = Vec::new();
        let mut next = Some(*key);
        // Down to the lowest disk, or to what is known.
        while let Some(key) = next
            && !known.contains_key(&key)
        {
            let identity = self.identity(&key);
            next = identity.and_then(|i| i.backing).map(|(below, _)| below);
            way.push((key, identity));
            if way.len() > 1024 {
                return None;
            }
        }
        // And up again: a disk fits only on the one that it was made on.
        for (key, identity) in way.into_iter().rev() {
            let id = identity.filter(|i| match i.backing {
                None => true,
                Some((below, id)) => known.get(&below) == Some(&Some(id)),
            });
            known.insert(key, id.map(|i| i.id));
        }
        known.get(key).copied().flatten()
    }

    fn identity(&self, key: &Key) -> Option<Identity> {
        let name = key.to_string();
        let text = rustix::fs::readlinkat(&*self.states, format!("{name}/identity"), Vec::new()).ok()?;
        let identity = Identity::parse(text.to_str().ok()?)?;
        let disk = format!("{name}/{}", identity.kind.file_name());
        rustix::fs::accessat(&*self.states, disk, rustix::fs::Access::EXISTS, AtFlags::empty()).ok()?;
        Some(identity)
    }

    /// The state that what is made from this one is known by: itself, unless
    /// one was there before that holds the same. Another build of that one says
    /// nothing of this.
    pub fn stands_for(&self, key: &Key) -> Key {
        let same = self.identity(key).and_then(|identity| identity.same);
        let known = same.filter(|(other, id)| self.identity(other).is_none_or(|there| there.id == *id));
        known.map_or(*key, |(other, _)| other)
    }

    /// The directory of a state, there or not.
    pub fn state_dir(&self, key: &Key) -> PathBuf {
        self.root.join("states").join(key.to_string())
    }

    /// A state's record; `None` if the state is not there or can't be read, in
    /// which case it has to be made again.
    pub fn record(&self, key: &Key) -> Option<Record> {
        let bytes = fs::read(self.state_dir(key).join("record.json")).ok()?;
        let record: Record = serde_json::from_slice(&bytes).ok()?;
        (record.schema == SCHEMA && record.key == *key).then_some(record)
    }

    /// The disks that a state consists of, the lowest first; the last is its
    /// own. `None` if one of them is missing.
    pub fn chain(&self, key: &Key) -> Option<Vec<PathBuf>> {
        if !self.has(key) {
            return None;
        }
        let mut disks = Vec::new();
        let mut next = Some(*key);
        while let Some(key) = next {
            let identity = self.identity(&key)?;
            disks.push(self.state_dir(&key).join(identity.kind.file_name()));
            next = identity.backing.map(|(below, _)| below);
        }
        disks.reverse();
        Some(disks)
    }

    /// The disks of a state, if it is still the same build of it.
    pub fn chain_of(&self, (key, id): &(Key, StateId)) -> Option<Vec<PathBuf>> {
        self.chain(key).filter(|_| self.identity(key).is_some_and(|identity| identity.id == *id))
    }

    /// The state whose disk this file is.
    pub fn owner(&self, disk: &Path) -> Option<Record> {
        let dir = disk.parent()?;
        let key = Key(dir.file_name()?.to_str()?.parse().ok()?);
        self.record(&key).filter(|_| self.state_dir(&key) == dir)
    }

    /// Where a kernel or initrd is, there or not.
    pub fn blob(&self, digest: &Digest) -> PathBuf {
        self.root.join("blobs").join(digest.to_string())
    }

    /// Whether a blob is there in its full size.
    pub fn has_blob(&self, blob: &Blob) -> bool {
        fs::metadata(self.blob(&blob.digest)).is_ok_and(|m| m.len() == blob.size)
    }

    /// Takes a file of a staging directory over as a blob. The file must hold
    /// what the digest says.
    pub fn commit_blob(&self, file: &Path, blob: &Blob) -> Result<(), StoreError> {
        if self.has_blob(blob) {
            return Ok(());
        }
        let to = self.blob(&blob.digest);
        sync(file)?;
        fs::rename(file, &to).map_err(|e| StoreError::new("write", &to, e))?;
        sync(&self.root.join("blobs"))
    }

    /// Makes a staging directory the state `key`. Once this returns the state
    /// survives a power cut. `false` if a whole state was there already, which
    /// then stays: it is another one, and nothing that lies on the disk that
    /// was to be committed fits it.
    pub fn commit(&self, staging: Staging, record: &Record) -> Result<bool, StoreError> {
        let path = staging.path().join("record.json");
        let bytes =
            serde_json::to_vec_pretty(record).map_err(|e| StoreError::new("write", &path, e.into()))?;
        fs::write(&path, bytes).map_err(|e| StoreError::new("write", &path, e))?;
        let path = staging.path().join("identity");
        std::os::unix::fs::symlink(Identity::from(record).text(), &path)
            .map_err(|e| StoreError::new("write", &path, e))?;
        let to = self.state_dir(&record.key);
        let entries = fs::read_dir(staging.path()).map_err(|e| StoreError::new("read", staging.path(), e))?;
        let keep = [record.disk.kind.file_name(), "record.json", "log.zst"];
        for entry in entries.flatten() {
            if keep.iter().any(|name| entry.file_name() == *name) {
                sync(&entry.path())?;
            } else if entry.file_name() != "identity" {
                remove(&entry.path())?;
            }
        }
        sync(staging.path())?;
        match fs::rename(staging.path(), &to) {
            Ok(()) => staging.forget(),
            Err(_) if self.has(&record.key) => return Ok(false),
            Err(e) if to.exists() => {
                // What is there is damaged, of another version, or lies on a
                // disk that is gone. Out of the way in one step first.
                let away = staging.path().with_extension("old");
                fs::rename(&to, &away).map_err(|e| StoreError::new("replace", &to, e))?;
                remove(&away)?;
                fs::rename(staging.path(), &to).map_err(|_| StoreError::new("write", &to, e))?;
                staging.forget();
            }
            Err(e) => return Err(StoreError::new("write", &to, e)),
        }
        sync(&self.root.join("states"))?;
        Ok(true)
    }

    /// Where `project`'s servers are. These are no cache.
    pub fn servers(&self, root: &Path) -> PathBuf {
        let id = Digest::of(root.as_os_str().as_encoded_bytes()).to_string();
        self.root.join("servers").join(&id[..32])
    }

    /// What `project` last built.
    pub fn project(&self, root: &Path) -> ProjectFiles {
        let id = Digest::of(root.as_os_str().as_encoded_bytes()).to_string();
        ProjectFiles::new(self.root.join("projects").join(&id[..32]))
    }

    /// All states that can be read.
    pub fn states(&self) -> Vec<Record> {
        let Ok(entries) = fs::read_dir(self.root.join("states")) else { return Vec::new() };
        entries
            .flatten()
            .filter_map(|e| Some(Key(e.file_name().to_str()?.parse().ok()?)))
            .filter_map(|key| self.record(&key))
            .collect()
    }

    /// Where the answers of the accelerator probe are kept.
    pub fn probes(&self) -> PathBuf {
        self.root.join("probes")
    }

    /// Where parsed recipes are kept.
    pub fn parsed(&self) -> PathBuf {
        self.root.join("parsed")
    }

    /// A new staging directory. Those that dead processes left are removed.
    pub fn staging(&self) -> Result<Staging, StoreError> {
        Staging::new(&self.root.join("staging"))
    }

    /// Waits for the right to make the state `key`.
    pub async fn lock(&self, key: &Key) -> Result<KeyLock, StoreError> {
        lock(&self.lock_path(key)).await
    }

    /// Takes the right to make the state `key` if nobody has it.
    pub fn try_lock(&self, key: &Key) -> Result<Option<KeyLock>, StoreError> {
        try_lock(&self.lock_path(key))
    }

    fn lock_path(&self, key: &Key) -> PathBuf {
        self.root.join("locks").join(key.to_string())
    }
}

fn sync(path: &Path) -> Result<(), StoreError> {
    File::open(path).and_then(|f| f.sync_all()).map_err(|e| StoreError::new("sync", path, e))
}

fn remove(path: &Path) -> Result<(), StoreError> {
    let result = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    match result {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(StoreError::new("remove", path, e)),
        _ => Ok(()),
    }
}

/// Replaces a small file in one step. For disposable files: it is not synced.
pub fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let new = path.with_extension(format!("new-{}", std::process::id()));
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir)?;
    }
    fs::write(&new, bytes)?;
    fs::rename(&new, path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::Description;

    fn record(key: Key, below: Option<&Record>) -> Record {
        let backing = below.map(|r| (r.key, r.id));
        Record::new(
            key,
            "layer",
            "x@y",
            Description::default(),
            Disk { kind: DiskKind::Qcow2, backing, depth: 0 },
        )
    }

    fn stage(store: &Store, text: &str) -> Staging {
        let staging = store.staging().unwrap();
        fs::write(staging.path().join("disk.qcow2"), text).unwrap();
        staging
    }

    fn key(name: &str) -> Key {
        Key(Digest::of(name.as_bytes()))
    }

    #[test]
    fn a_state_appears_whole_and_stays() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let a = record(key("a"), None);
        assert!(!store.has(&a.key));
        let staging = stage(&store, "first");
        fs::write(staging.path().join("scratch"), "").unwrap();
        assert!(store.commit(staging, &a).unwrap());
        assert!(!store.commit(stage(&store, "second"), &record(a.key, None)).unwrap());
        let disk = store.state_dir(&a.key).join("disk.qcow2");
        assert_eq!(fs::read_to_string(&disk).unwrap(), "first");
        assert!(!store.state_dir(&a.key).join("scratch").exists());
        let b = record(key("b"), Some(&a));
        store.commit(stage(&store, "child"), &b).unwrap();
        assert_eq!(store.chain(&b.key).unwrap().len(), 2);
        assert_eq!(store.states().len(), 2);
        fs::remove_file(disk).unwrap();
        assert_eq!(store.chain(&b.key), None, "a chain with a hole is no chain");
    }

    #[test]
    fn a_damaged_state_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let a = record(key("a"), None);
        store.commit(stage(&store, "first"), &a).unwrap();
        let identity = store.state_dir(&a.key).join("identity");
        fs::remove_file(&identity).unwrap();
        std::os::unix::fs::symlink("0:nothing", &identity).unwrap();
        assert!(!store.has(&a.key));
        assert!(store.commit(stage(&store, "second"), &a).unwrap());
        assert!(store.has(&a.key));
    }

    #[test]
    fn a_state_stands_for_one_that_holds_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let below = record(key("below"), None);
        store.commit(stage(&store, "below"), &below).unwrap();
        let mut new = record(key("new"), Some(&below));
        assert_eq!(store.stands_for(&new.key), new.key, "what is not there stands for itself");
        let old = record(key("old"), Some(&below));
        new.same = Some((old.key, old.id));
        store.commit(stage(&store, "new"), &new).unwrap();
        assert_eq!(store.stands_for(&new.key), old.key, "whether that is there or not");
        store.commit(stage(&store, "old"), &old).unwrap();
        assert_eq!(store.stands_for(&new.key), old.key);
        assert!(store.has(&new.key) && store.record(&new.key).unwrap() == new);
        assert_eq!(store.stands_for(&below.key), below.key);
        fs::remove_dir_all(store.state_dir(&old.key)).unwrap();
        store.commit(stage(&store, "anew"), &record(old.key, Some(&below))).unwrap();
        assert_eq!(store.stands_for(&new.key), new.key, "another build may hold something else");
    }

    /// A rebuilt parent has other blocks, whatever its key says: what was made
    /// on the old one is gone with it.
    #[test]
    fn a_state_does_not_fit_a_rebuilt_parent() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let (old, new) = (record(key("a"), None), record(key("a"), None));
        let child = record(key("b"), Some(&old));
        store.commit(stage(&store, "old"), &old).unwrap();
        store.commit(stage(&store, "child"), &child).unwrap();
        assert!(store.has(&child.key));
        fs::remove_dir_all(store.state_dir(&old.key)).unwrap();
        assert!(!store.has(&child.key));
        store.commit(stage(&store, "new"), &new).unwrap();
        assert!(!store.has(&child.key), "it lies on other blocks");
        let again = record(key("b"), Some(&new));
        assert!(store.commit(stage(&store, "again"), &again).unwrap(), "the old one is replaced");
        assert!(store.has(&child.key));
    }

    #[test]
    fn staging_of_the_dead_is_reaped_and_of_the_living_kept() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let living = store.staging().unwrap();
        let dead = dir.path().join("staging/1-1");
        fs::create_dir(&dead).unwrap();
        fs::write(dir.path().join("staging/1-1.lock"), "").unwrap();
        let _other = store.staging().unwrap();
        assert!(!dead.exists());
        assert!(living.path().exists());
        let path = living.path().to_owned();
        drop(living);
        assert!(!path.exists());
    }
}

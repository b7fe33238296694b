//! The store itself: opens it, and finds and reads states.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::AtFlags;

use super::area::Area;
use super::error::StoreError;
use super::lease::{Lease, enter};
use super::lock::{KeyLock, lock, try_lock};
use super::project::{Last, ProjectFiles};
use super::record::{Identity, Origin, Record, SCHEMA, StateId};
use super::staging::Staging;
use crate::digest::{Blob, Digest, Key};

/// An open store.
#[derive(Debug, Clone)]
pub struct Store {
    root: PathBuf,
    states: Arc<OwnedFd>,
    trusts: OriginTrust,
}

/// Decides whether a state from a cache may be used, by its trust domain and
/// the tag of the key that signed it.
pub type TrustsOrigin = Arc<dyn Fn(&str, &str) -> bool + Send + Sync>;

#[derive(Clone, Default)]
struct OriginTrust(Option<TrustsOrigin>);

impl std::fmt::Debug for OriginTrust {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.0.is_some() { "OriginTrust" } else { "none" })
    }
}

impl Store {
    /// Opens or creates the store at `root`. It is private to its user, because
    /// its contents are worth as much as the user's other files. Without
    /// [`Self::trusting`] only states that were built here are visible.
    pub fn open(root: &Path) -> Result<Self, StoreError> {
        use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
        if root.to_str().is_none() {
            let why = io::Error::new(io::ErrorKind::InvalidInput, "its path is not UTF-8");
            return Err(StoreError::new("open", root, why));
        }
        let make = |dir: &Path| {
            let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
            made.map_err(|e| StoreError::new("create", dir, e))
        };
        make(root)?;
        let root = root.canonicalize().map_err(|e| StoreError::new("open", root, e))?;
        // All directories are created now, so that none gets a mode from the
        // umask later.
        for area in Area::ALL {
            make(&root.join(area.name()))?;
        }
        let states = root.join(Area::States.name());
        let opened = File::open(&states).map_err(|e| StoreError::new("open", &states, e))?;
        // An earlier version created them with the umask's mode. The root may
        // be a directory that contains other things, too: then its mode stays.
        let entries = fs::read_dir(&root).map_err(|e| StoreError::new("read", &root, e))?;
        let all: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
        let own = all.iter().all(|path| {
            path.file_name().is_some_and(|name| Area::ALL.iter().any(|area| name == area.name()))
        });
        let areas: Vec<PathBuf> = Area::ALL.iter().map(|area| root.join(area.name())).collect();
        for dir in areas.iter().chain(own.then_some(&root)) {
            if fs::symlink_metadata(dir).is_ok_and(|m| m.is_dir() && m.permissions().mode() & 0o077 != 0) {
                let _ = fs::set_permissions(dir, fs::Permissions::from_mode(0o700));
            }
        }
        Ok(Self { root, states: Arc::new(opened.into()), trusts: OriginTrust::default() })
    }

    /// Makes states of caches visible that `trusts` accepts.
    pub fn trusting(self, trusts: TrustsOrigin) -> Self {
        Self { trusts: OriginTrust(Some(trusts)), ..self }
    }

    /// Returns the store's directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Returns one of its directories, which exists.
    pub fn dir(&self, area: Area) -> PathBuf {
        self.root.join(area.name())
    }

    /// Whether a state exists, complete, with all states below it.
    pub fn has(&self, key: &Key) -> bool {
        self.complete(key, &mut HashMap::new()).is_some()
    }

    /// Returns the ID of a complete state. `known` remembers results for many
    /// calls.
    pub fn complete(&self, key: &Key, known: &mut HashMap<Key, Option<StateId>>) -> Option<StateId> {
        let mut way = Vec::new();
        let mut next = Some(*key);
        // Down to the lowest disk, or to a known state.
        while let Some(key) = next
            && !known.contains_key(&key)
        {
            let identity = self.identity(&key);
            next = identity.as_ref().and_then(|i| i.backing).map(|(below, _)| below);
            way.push((key, identity));
            if way.len() > 1024 {
                return None;
            }
        }
        // And up again: a disk fits only the build that it was made on.
        for (key, identity) in way.into_iter().rev() {
            let id = identity.filter(|i| match i.backing {
                None => true,
                Some((below, id)) => known.get(&below) == Some(&Some(id)),
            });
            known.insert(key, id.map(|i| i.id));
        }
        known.get(key).copied().flatten()
    }

    /// Reads the identity of a state that is complete and whose origins are
    /// trusted.
    pub(super) fn identity(&self, key: &Key) -> Option<Identity> {
        let name = key.to_string();
        let text = rustix::fs::readlinkat(&*self.states, format!("{name}/identity"), Vec::new()).ok()?;
        let identity = Identity::parse(text.to_str().ok()?)?;
        let size = |file: &str| {
            let stat = rustix::fs::statat(&*self.states, format!("{name}/{file}"), AtFlags::empty()).ok()?;
            u64::try_from(stat.st_size).ok()
        };
        let complete = size("record.json") == Some(identity.record)
            && size(identity.kind.file_name()) == Some(identity.size);
        let trusted = identity
            .origins
            .iter()
            .all(|origin| self.trusts.0.as_ref().is_some_and(|trusts| trusts(&origin.domain, &origin.key)));
        Some(identity).filter(|_| complete && trusted)
    }

    /// The origins of a state and of those below; empty if all of them were
    /// built here.
    pub fn origins(&self, key: &Key) -> Vec<Origin> {
        let mut found = std::collections::BTreeSet::new();
        let mut next = Some(*key);
        while let Some(identity) = next.and_then(|key| self.identity(&key)) {
            found.extend(identity.origins);
            next = identity.backing.map(|(below, _)| below);
        }
        found.into_iter().collect()
    }

    /// The key that nodes above use for this state: that of an earlier
    /// identical state, or its own. If the earlier state was rebuilt since, it
    /// need not be identical any more.
    pub fn stands_for(&self, key: &Key) -> Key {
        let same = self.identity(key).and_then(|identity| identity.same);
        let known = same.filter(|(other, id)| self.identity(other).is_none_or(|there| there.id == *id));
        known.map_or(*key, |(other, _)| other)
    }

    /// Returns the directory of a state, whether it exists or not.
    pub fn state_dir(&self, key: &Key) -> PathBuf {
        self.dir(Area::States).join(key.to_string())
    }

    /// Reads a state's record; `None` if it does not exist or can't be read.
    /// The state must then be built again.
    pub fn record(&self, key: &Key) -> Option<Record> {
        let bytes = fs::read(self.state_dir(key).join("record.json")).ok()?;
        let record: Record = serde_json::from_slice(&bytes).ok()?;
        (record.schema == SCHEMA && record.key == *key).then_some(record)
    }

    /// Returns the disks of a state, the lowest first, its own last. `None` if
    /// one is missing.
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

    /// Returns the disks of a state, if it is still the same build.
    pub fn chain_of(&self, (key, id): &(Key, StateId)) -> Option<Vec<PathBuf>> {
        self.chain(key).filter(|_| self.identity(key).is_some_and(|identity| identity.id == *id))
    }

    /// Finds the state that a disk file belongs to.
    pub fn owner(&self, disk: &Path) -> Option<Record> {
        let dir = disk.parent()?;
        let key = Key(dir.file_name()?.to_str()?.parse().ok()?);
        self.record(&key).filter(|_| self.state_dir(&key) == dir)
    }

    /// Returns the path of a kernel or initrd, whether it exists or not.
    pub fn blob(&self, digest: &Digest) -> PathBuf {
        self.dir(Area::Blobs).join(digest.to_string())
    }

    /// Whether a blob exists in its full size.
    pub fn has_blob(&self, blob: &Blob) -> bool {
        fs::metadata(self.blob(&blob.digest)).is_ok_and(|m| m.len() == blob.size)
    }

    /// Returns the directory of a project's servers. It is not disposable.
    pub fn servers(&self, root: &Path) -> PathBuf {
        let id = Digest::of(root.as_os_str().as_encoded_bytes()).to_string();
        self.dir(Area::Servers).join(&id[..32])
    }

    /// Returns the notes of a project.
    pub fn project(&self, root: &Path) -> ProjectFiles {
        let id = Digest::of(root.as_os_str().as_encoded_bytes()).to_string();
        ProjectFiles::new(self.dir(Area::Projects).join(&id[..32]), Some(root.to_owned()))
    }

    /// Reads a project's last build. It takes as long as reading its states,
    /// and can run while the recipe is read.
    pub fn last(&self, notes: &ProjectFiles) -> Last {
        let nodes = notes.nodes();
        let mut complete = HashMap::with_capacity(nodes.len());
        for key in nodes.values() {
            self.complete(key, &mut complete);
        }
        Last { nodes, complete }
    }

    /// Lists all readable states.
    pub fn states(&self) -> Vec<Record> {
        let Ok(entries) = fs::read_dir(self.dir(Area::States)) else { return Vec::new() };
        entries
            .flatten()
            .filter_map(|e| Some(Key(e.file_name().to_str()?.parse().ok()?)))
            .filter_map(|key| self.record(&key))
            .collect()
    }

    /// Makes a new staging directory. Removes those of dead processes.
    pub fn staging(&self) -> Result<Staging, StoreError> {
        Staging::new(&self.dir(Area::Staging))
    }

    /// Waits for the lock of the key `key`.
    pub async fn lock(&self, key: &Key) -> Result<KeyLock, StoreError> {
        lock(&self.lock_path(key)).await
    }

    /// Takes the lock of the key `key` if it is free.
    pub fn try_lock(&self, key: &Key) -> Result<Option<KeyLock>, StoreError> {
        try_lock(&self.lock_path(key))
    }

    /// Leases states: no garbage collection takes them, or what is below them,
    /// until the lease is dropped. They may not exist yet. To be called before
    /// looking whether they do.
    ///
    /// # Errors
    ///
    /// The lease can't be written.
    pub fn lease(&self, keys: impl IntoIterator<Item = Key>) -> Result<Lease, StoreError> {
        let locks = self.dir(Area::Locks);
        let _gate = enter(&locks)?;
        let lease = Lease::new(&locks)?;
        lease.hold(keys)?;
        Ok(lease)
    }

    /// Adds states to a lease; see [`Self::lease`].
    ///
    /// # Errors
    ///
    /// The lease can't be written.
    pub fn lease_more(&self, lease: &Lease, keys: impl IntoIterator<Item = Key>) -> Result<(), StoreError> {
        let _gate = enter(&self.dir(Area::Locks))?;
        lease.hold(keys)
    }

    fn lock_path(&self, key: &Key) -> PathBuf {
        self.dir(Area::Locks).join(key.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_store_is_its_users_alone() {
        use std::os::unix::fs::PermissionsExt;
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("new");
        // As earlier versions created it.
        fs::create_dir_all(root.join("servers")).unwrap();
        for path in [&root, &root.join("servers")] {
            fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
        }
        Store::open(&root).unwrap();
        let all = ["", "states", "blobs", "servers"].map(|name| mode(&root.join(name)));
        assert_eq!(all, [0o700; 4]);
        // A directory that holds other things, too, keeps its mode.
        let shared = dir.path().join("shared");
        fs::create_dir_all(shared.join("others")).unwrap();
        fs::set_permissions(&shared, fs::Permissions::from_mode(0o1777)).unwrap();
        Store::open(&shared).unwrap();
        assert_eq!((mode(&shared), mode(&shared.join("states"))), (0o777, 0o700));
    }
}

//! States: found, read, and committed in one step.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use rustix::fs::AtFlags;

use super::area::Area;
use super::error::{StoreError, is_damage};
use super::lease::{Lease, enter};
use super::lock::{KeyLock, lock, try_lock};
use super::project::{Last, ProjectFiles};
use super::record::{DiskKind, Identity, Origin, Record, SCHEMA, StateId};
use super::replace::{remove, sync};
use super::staging::Staging;
use crate::digest::{Blob, Digest, Key};
use crate::disk::qcow2;

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
    fn identity(&self, key: &Key) -> Option<Identity> {
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

    /// Marks a damaged state as unusable, so that it is built again.
    pub fn set_aside(&self, key: &Key) {
        let _ = fs::remove_file(self.state_dir(key).join("identity"));
    }

    /// Tests whether a state and those below can be read. Sets damaged ones
    /// aside, and returns the lowest of them. Takes a fraction of a millisecond
    /// per state.
    pub fn unreadable(&self, key: &Key) -> Option<Key> {
        let mut found = None;
        let mut next = Some(*key);
        while let Some(key) = next {
            let Some(identity) = self.identity(&key) else { break };
            let disk = self.state_dir(&key).join(identity.kind.file_name());
            let record = fs::read(self.state_dir(&key).join("record.json"));
            let damaged = match record {
                Ok(bytes) => serde_json::from_slice::<Record>(&bytes).is_err(),
                Err(error) => is_damage(&error),
            } || identity.kind == DiskKind::Qcow2
                && match File::open(&disk) {
                    Ok(_) => qcow2::read(&disk).is_err(),
                    Err(error) => is_damage(&error),
                };
            if damaged {
                self.set_aside(&key);
                found = Some(key);
            }
            next = identity.backing.map(|(below, _)| below);
        }
        found
    }

    /// Whether a state's disk equals the digest from its build. Sets a damaged
    /// state aside. Reads the whole disk.
    pub fn is_sound(&self, key: &Key) -> bool {
        let Some(record) = self.record(key) else {
            self.set_aside(key);
            return false;
        };
        let disk = self.state_dir(key).join(record.disk.kind.file_name());
        let found = File::open(disk).and_then(|file| Blob::copy(file, &mut io::sink()));
        let (sound, damaged) = match found {
            Ok(found) => (record.file == Some(found), record.file != Some(found)),
            Err(error) => (false, is_damage(&error)),
        };
        if damaged {
            self.set_aside(key);
        }
        sound
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

    /// Moves a file of a staging directory to the blobs. The file must match
    /// the digest.
    pub fn commit_blob(&self, file: &Path, blob: &Blob) -> Result<(), StoreError> {
        let to = self.blob(&blob.digest);
        if self.has_blob(blob) {
            // A collection spares young ones: no record may name it yet.
            let _ = File::open(&to).and_then(|file| file.set_modified(SystemTime::now()));
            return Ok(());
        }
        sync(file)?;
        fs::rename(file, &to).map_err(|e| StoreError::new("write", &to, e))?;
        sync(&self.dir(Area::Blobs))
    }

    /// Turns a staging directory into the state `key`. After that the state
    /// survives a power cut. Returns `false` if a complete state exists
    /// already. That one stays; it is another build, and nothing on top of the
    /// rejected disk fits it.
    pub fn commit(&self, staging: Staging, record: &Record) -> Result<bool, StoreError> {
        let disk = staging.path().join(record.disk.kind.file_name());
        let file = File::open(&disk).and_then(|file| Blob::copy(file, &mut io::sink()));
        let file = file.map_err(|e| StoreError::new("read", &disk, e))?;
        let record = &Record { file: Some(file), ..record.clone() };
        let path = staging.path().join("record.json");
        let bytes =
            serde_json::to_vec_pretty(record).map_err(|e| StoreError::new("write", &path, e.into()))?;
        let identity = Identity::of(record, bytes.len() as u64, file.size);
        fs::write(&path, bytes).map_err(|e| StoreError::new("write", &path, e))?;
        let path = staging.path().join("identity");
        std::os::unix::fs::symlink(identity.text(), &path).map_err(|e| StoreError::new("write", &path, e))?;
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
                // The existing directory is damaged, has another version, or
                // lacks its disk below. It is moved away in one step first.
                let away = staging.path().with_extension("old");
                fs::rename(&to, &away).map_err(|e| StoreError::new("replace", &to, e))?;
                remove(&away)?;
                fs::rename(staging.path(), &to).map_err(|_| StoreError::new("write", &to, e))?;
                staging.forget();
            }
            Err(e) => return Err(StoreError::new("write", &to, e)),
        }
        sync(&self.dir(Area::States))?;
        Ok(true)
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
    use std::time::Duration;

    use super::super::gc::Keep;
    use super::super::record::Disk;
    use super::super::replace::replace;
    use super::super::staging::settle;
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

    /// What `docs/how-to/upgrade.md` says about stores.
    #[test]
    fn states_of_another_version_are_ignored_and_replaced() {
        for other in [SCHEMA - 1, SCHEMA + 1] {
            let dir = tempfile::tempdir().unwrap();
            let store = Store::open(dir.path()).unwrap();
            let (a, b) = (record(key("a"), None), record(key("b"), None));
            for state in [&a, &b] {
                store.commit(stage(&store, "theirs"), state).unwrap();
                let at = |name: &str| store.state_dir(&state.key).join(name);
                // The size stays the same, as it may by chance.
                let text = fs::read_to_string(at("record.json")).unwrap();
                let own = format!("\"schema\": {SCHEMA}");
                assert!(text.contains(&own));
                fs::write(at("record.json"), text.replace(&own, &format!("\"schema\": {other}"))).unwrap();
                let identity = fs::read_link(at("identity")).unwrap().to_str().unwrap().to_owned();
                let rest = identity.strip_prefix(&SCHEMA.to_string()).unwrap();
                fs::remove_file(at("identity")).unwrap();
                std::os::unix::fs::symlink(format!("{other}{rest}"), at("identity")).unwrap();
            }
            assert!(!store.has(&a.key) && store.record(&a.key).is_none());
            assert!(store.chain(&a.key).is_none() && store.states().is_empty());
            // It is built again, in the place of the other one.
            assert!(store.commit(stage(&store, "ours"), &a).unwrap());
            let disk = store.state_dir(&a.key).join("disk.qcow2");
            assert_eq!((store.has(&a.key), fs::read_to_string(disk).unwrap().as_str()), (true, "ours"));
            // A collection spares those that are young, if it is asked to.
            let young = Keep { age: Some(Duration::from_secs(3600)), ..Keep::default() };
            store.collect(&young).unwrap();
            assert!(store.state_dir(&b.key).exists());
            store.collect(&Keep::default()).unwrap();
            assert!(!store.state_dir(&b.key).exists());
        }
    }

    #[test]
    fn a_state_that_lost_something_is_not_there_and_heals() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let a = record(key("a"), None);
        let at = |name: &str| store.state_dir(&a.key).join(name);
        let spoil: [&dyn Fn(); 4] = [
            &|| fs::remove_file(at("record.json")).unwrap(),
            &|| fs::write(at("record.json"), "{").unwrap(),
            &|| fs::write(at("disk.qcow2"), "sho").unwrap(),
            &|| fs::remove_file(at("disk.qcow2")).unwrap(),
        ];
        for spoil in spoil {
            assert!(store.commit(stage(&store, "first"), &a).unwrap());
            assert!(store.has(&a.key) && store.is_sound(&a.key));
            spoil();
            assert!(!store.has(&a.key));
        }
        // Damage without a new size is found by reading.
        store.commit(stage(&store, "first"), &a).unwrap();
        assert_eq!(store.unreadable(&a.key), Some(a.key), "this is no qcow2 file");
        assert!(!store.has(&a.key));
        store.commit(stage(&store, "first"), &a).unwrap();
        fs::write(at("disk.qcow2"), "fIrst").unwrap();
        assert!(store.has(&a.key) && !store.is_sound(&a.key) && !store.has(&a.key));
        store.commit(stage(&store, "first"), &a).unwrap();
        let size = fs::metadata(at("record.json")).unwrap().len() as usize;
        fs::write(at("record.json"), "x".repeat(size)).unwrap();
        assert!(store.has(&a.key) && store.unreadable(&a.key).is_some() && !store.has(&a.key));
    }

    #[test]
    fn states_of_caches_are_visible_to_stores_that_trust_their_origin() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let trusting = |domain: &'static str| {
            store.clone().trusting(Arc::new(move |d: &str, k: &str| d == domain && k == "tag"))
        };
        let origin = Some(Origin { domain: "main".into(), key: "tag".into() });
        let below = Record { origin, ..record(key("below"), None) };
        store.commit(stage(&store, "below"), &below).unwrap();
        let above = record(key("above"), Some(&below));
        store.commit(stage(&store, "above"), &above).unwrap();
        for (domain, there) in [("main", true), ("pr-7", false)] {
            let store = trusting(domain);
            assert_eq!((store.has(&below.key), store.has(&above.key)), (there, there), "{domain}");
        }
        assert!(!store.has(&below.key) && !store.has(&above.key));
        // A state that was made from these, but not on top of them, also has
        // their origins.
        let inherited = trusting("main").origins(&above.key);
        assert_eq!(inherited, [below.origin.clone().unwrap()]);
        let made_of = Record { inherited, ..record(key("made of"), None) };
        store.commit(stage(&store, "made of"), &made_of).unwrap();
        assert!(trusting("main").has(&made_of.key) && !trusting("pr-7").has(&made_of.key));
        assert!(!store.has(&made_of.key));
        // A state that is built here replaces it.
        let own = record(key("below"), None);
        assert!(store.commit(stage(&store, "own"), &own).unwrap());
        assert!(store.has(&own.key) && trusting("pr-7").has(&own.key));
    }

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

    #[test]
    fn a_file_is_replaced_as_it_was() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let (file, link) = (dir.path().join("config.kdl"), dir.path().join("link"));
        fs::write(&file, "old").unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).unwrap();
        std::os::unix::fs::symlink("config.kdl", &link).unwrap();
        replace(&link, b"new").unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "new");
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o640);
        replace(&dir.path().join("fresh"), b"x").unwrap();
        let mode = fs::metadata(dir.path().join("fresh")).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode, fs::read_dir(dir.path()).unwrap().count()), (0o600, 3));
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
        assert!(store.has(&new.key) && Record { file: None, ..store.record(&new.key).unwrap() } == new);
        assert_eq!(store.stands_for(&below.key), below.key);
        fs::remove_dir_all(store.state_dir(&old.key)).unwrap();
        store.commit(stage(&store, "anew"), &record(old.key, Some(&below))).unwrap();
        assert_eq!(store.stands_for(&new.key), new.key, "another build may hold something else");
    }

    /// A rebuilt parent has other blocks, although its key is the same: what
    /// was built on the old one is invalid.
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
        settle();
        assert!(!dead.exists());
        assert!(living.path().exists());
        let path = living.path().to_owned();
        drop(living);
        assert!(!path.exists());
    }
}

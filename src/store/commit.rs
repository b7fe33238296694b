//! Adds states to the store in one step, and finds damaged ones.

use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::time::SystemTime;

use super::area::Area;
use super::error::{StoreError, is_damage};
use super::record::{DiskKind, Identity, Record};
use super::replace::{remove, sync};
use super::staging::Staging;
use super::states::Store;
use crate::digest::{Blob, Key};
use crate::disk::qcow2;

impl Store {
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
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use super::super::gc::Keep;
    use super::super::record::{Disk, Origin, SCHEMA};
    use super::*;
    use crate::digest::{Description, Digest};

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
}

//! Garbage collection: removes what nothing needs any more. States are needed
//! by the last build of each project, by running processes (leases), and by
//! states on top of them. Servers own their disks.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::area::Area;
use super::error::StoreError;
use super::lease::{close, leased};
use super::project::ProjectFiles;
use super::record::{Boot, Record};
use super::staging::Staging;
use super::states::Store;
use crate::digest::Key;
use crate::host::namespaces::remove_tree;

/// A kernel that a build has just stored is in no record yet.
const YOUNG: Duration = Duration::from_secs(24 * 60 * 60);

/// What a collection keeps besides what is needed.
#[derive(Debug, Clone, Copy, Default)]
pub struct Keep {
    /// Keep everything that was used within this time.
    pub age: Option<Duration>,
    /// As much as fits in so many bytes, the youngest first. Without it, nothing.
    pub size: Option<u64>,
    /// Everything: only tell what would be removed.
    pub dry_run: bool,
}

/// The kinds of what takes room, in the order in which it is removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// The memory snapshot of a machine or an appliance.
    Snapshot,
    /// The disk of a failed layer.
    Failed,
    /// A state.
    State,
    /// A kernel or initrd.
    Blob,
    /// A server.
    Server,
    /// Anything else.
    Other,
}

/// Something in the store that takes room.
#[derive(Debug, Clone)]
pub struct Item {
    /// What it is.
    pub kind: Kind,
    /// Its name, for people.
    pub name: String,
    /// Where it is.
    pub path: PathBuf,
    /// Its size on disk, in bytes.
    pub bytes: u64,
    /// When it was used last, as far as is known, or made.
    pub used: SystemTime,
    /// What needs it, if anything does.
    pub root: Option<String>,
}

/// What a collection removed, or would remove.
#[derive(Debug, Default)]
pub struct Collected {
    /// In the order of removal.
    pub removed: Vec<Item>,
    /// The size that is left, in bytes.
    pub left: u64,
}

/// Files with several names that were measured, by device and inode.
#[derive(Default)]
struct Measured(HashSet<(u64, u64)>);

impl Measured {
    /// The size on disk of a file or a directory, in bytes. A file that has
    /// several names counts once: its room is free when all of them are gone.
    fn size(&mut self, path: &Path) -> u64 {
        let Ok(meta) = fs::symlink_metadata(path) else { return 0 };
        // st_blocks counts units of 512 bytes.
        let own = meta.blocks() * 512;
        if !meta.is_dir() {
            let is_new = meta.nlink() < 2 || self.0.insert((meta.dev(), meta.ino()));
            return if is_new { own } else { 0 };
        }
        let entries = fs::read_dir(path).into_iter().flatten().flatten();
        own + entries.map(|entry| self.size(&entry.path())).sum::<u64>()
    }
}

fn modified(path: &Path) -> SystemTime {
    fs::symlink_metadata(path).and_then(|meta| meta.modified()).unwrap_or(UNIX_EPOCH)
}

fn entries(dir: &Path) -> impl Iterator<Item = PathBuf> {
    fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path())
}

fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

impl Store {
    /// Lists what takes room, and what needs it.
    ///
    /// # Errors
    ///
    /// The store can't be read.
    pub fn usage(&self) -> Result<Vec<Item>, StoreError> {
        let roots = self.roots()?;
        let mut all = Vec::new();
        let mut measured = Measured::default();
        let mut item = |kind, name, path: PathBuf, root| {
            let (bytes, used) = (measured.size(&path), modified(&path));
            Item { kind, name, path, bytes, used, root }
        };
        // Servers come first: the disks that they share with states are theirs.
        let servers = self.all_servers();
        let served: HashSet<String> = servers.iter().flat_map(|(_, boot)| boot).flat_map(names).collect();
        for (path, _) in servers {
            all.push(item(Kind::Server, name(&path), path, Some("it is a server".into())));
        }
        for area in [Area::Snapshots, Area::Appliances] {
            for path in entries(&self.dir(area)).filter(|path| path.is_dir()) {
                // A fork touches it.
                let used = modified(&path.join("devices"));
                let what = item(Kind::Snapshot, name(&path), path, None);
                all.push(Item { used, ..what });
            }
        }
        for project in entries(&self.dir(Area::Projects)) {
            for path in
                entries(&project.join("failed")).filter(|path| path.extension().is_some_and(|e| e == "qcow2"))
            {
                all.push(item(Kind::Failed, name(&path.with_extension("")), path, None));
            }
        }
        let mut blobs = HashSet::new();
        for path in entries(&self.dir(Area::States)) {
            let key = name(&path).parse().ok().map(Key);
            let record = key.and_then(|key| self.record(&key));
            let root = key.and_then(|key| roots.get(&key).cloned());
            if root.is_some() {
                blobs.extend(record.iter().flat_map(kernels));
            }
            let label = record.as_ref().map_or_else(|| name(&path), |record| record.name.clone());
            // A state of another version of vimg has no record that this one can
            // read.
            let made = |record: Record| UNIX_EPOCH + Duration::from_secs(record.made);
            let made = record.map_or_else(|| modified(&path), made);
            all.push(Item { used: made, ..item(Kind::State, label, path, root) });
        }
        for path in entries(&self.dir(Area::Blobs)) {
            let digest = name(&path);
            let root = if blobs.contains(&digest) {
                Some("a state that is needed".to_owned())
            } else if served.contains(&digest) {
                Some("a server".to_owned())
            } else {
                let is_young = modified(&path).elapsed().is_ok_and(|age| age < YOUNG);
                is_young.then(|| "it is new".to_owned())
            };
            all.push(item(Kind::Blob, digest[..digest.len().min(12)].to_owned(), path, root));
        }
        for area in [Area::Partial, Area::Parsed, Area::Probes, Area::Seen, Area::Staging] {
            all.push(item(Kind::Other, area.name().to_owned(), self.dir(area), Some("it is small".into())));
        }
        Ok(all)
    }

    /// The states that are needed, and by what.
    fn roots(&self) -> Result<BTreeMap<Key, String>, StoreError> {
        let mut roots = BTreeMap::new();
        for key in leased(&self.dir(Area::Locks))? {
            roots.insert(key, "a running vimg".to_owned());
        }
        for path in entries(&self.dir(Area::Projects)) {
            let project = ProjectFiles::new(path, None);
            let Some(root) = project.is_alive() else { continue };
            for key in project.nodes().into_values() {
                roots.entry(key).or_insert_with(|| root.clone());
            }
        }
        // The disk of a failed layer lies on a state, and goes before it.
        let mut next: Vec<Key> = roots.keys().copied().collect();
        while let Some(key) = next.pop() {
            let record = self.record(&key);
            let below = record.as_ref().and_then(|record| record.disk.backing);
            let same = record.as_ref().and_then(|record| record.same);
            for (below, _) in below.into_iter().chain(same) {
                let why = roots[&key].clone();
                if let std::collections::btree_map::Entry::Vacant(entry) = roots.entry(below) {
                    entry.insert(why);
                    next.push(below);
                }
            }
        }
        Ok(roots)
    }

    /// Removes the locks of processes that were killed.
    fn remove_locks(&self) {
        let locks = self.dir(Area::Locks);
        let keys = entries(&locks).filter_map(|path| name(&path).parse().ok().map(Key));
        // A lock removes its file when it ends.
        keys.for_each(|key| drop(self.try_lock(&key)));
    }

    /// Removes what nothing needs: memory snapshots first, then the disks of
    /// failed layers, then states, those that were used longest ago first. Safe
    /// beside running builds, servers and forks.
    ///
    /// # Errors
    ///
    /// The store can't be read or written.
    pub fn collect(&self, keep: &Keep) -> Result<Collected, StoreError> {
        let gate = close(&self.dir(Area::Locks))?;
        let all = self.usage()?;
        let mut left: u64 = all.iter().map(|item| item.bytes).sum();
        let old = |item: &&Item| {
            let age = item.used.elapsed().unwrap_or_default();
            keep.age.is_none_or(|keep| age > keep)
        };
        let mut free: Vec<Item> =
            all.iter().filter(|item| item.root.is_none()).filter(old).cloned().collect();
        free.sort_by_key(|item| (item.kind, item.used));
        let mut removed = Vec::new();
        let staging = match self.staging() {
            _ if keep.dry_run => None,
            Ok(staging) => Some(staging),
            // There is no room for a directory.
            Err(error) if error.is_full() => None,
            Err(error) => return Err(error),
        };
        for item in free {
            if keep.size.is_some_and(|most| left <= most) {
                break;
            }
            if !keep.dry_run {
                match take_away(&item.path, staging.as_ref(), removed.len()) {
                    Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                    taken => taken.map_err(|e| StoreError::new("remove", &item.path, e))?,
                }
            }
            left = left.saturating_sub(item.bytes);
            removed.push(item);
        }
        if !keep.dry_run {
            self.remove_locks();
        }
        drop(gate);
        // The renamed directories are removed here, which may take long.
        drop(staging);
        Ok(Collected { removed, left })
    }
}

/// Moves something out of the way in one step, so that no process finds a part
/// of it. Without a staging directory, also removes it.
fn take_away(path: &Path, staging: Option<&Staging>, number: usize) -> io::Result<()> {
    if let Some(staging) = staging {
        return fs::rename(path, staging.path().join(number.to_string()));
    }
    if !path.is_dir() {
        return fs::remove_file(path);
    }
    // The next collection removes what this one leaves.
    let gone = path.with_file_name(format!(".gone-{}", name(path)));
    fs::rename(path, &gone)?;
    remove_tree(&gone)
}

/// The names of the kernels and initrds of a state.
fn kernels(record: &Record) -> Vec<String> {
    let boots = record.boot.iter().chain(&record.appliance);
    boots.flat_map(names).collect()
}

fn names(boot: &Boot) -> [String; 2] {
    [boot.kernel.digest.to_string(), boot.initrd.digest.to_string()]
}

#[cfg(test)]
mod tests {
    use super::super::record::{Disk, DiskKind};
    use super::super::server::{ServerHome, ServerRecord};
    use super::*;
    use crate::digest::{Blob, Description, Digest};

    fn key(name: &str) -> Key {
        Key(Digest::of(name.as_bytes()))
    }

    /// Commits a state on another one.
    fn state(store: &Store, name: &str, below: Option<&Record>) -> Record {
        let backing = below.map(|record| (record.key, record.id));
        let disk = Disk { kind: DiskKind::Qcow2, backing, depth: 0 };
        let record = Record::new(key(name), "layer", name, Description::default(), disk);
        let staging = store.staging().unwrap();
        fs::write(staging.path().join("disk.qcow2"), vec![1; 8192]).unwrap();
        store.commit(staging, &record).unwrap();
        record
    }

    fn names(done: &Collected) -> Vec<&str> {
        done.removed.iter().map(|item| item.name.as_str()).collect()
    }

    #[test]
    fn what_is_needed_stays() {
        let (dir, project) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let store = Store::open(dir.path()).unwrap();
        let base = state(&store, "base", None);
        let layer = state(&store, "layer", Some(&base));
        let leased = state(&store, "leased", Some(&base));
        state(&store, "old", Some(&layer));
        let notes = store.project(project.path());
        notes.change_nodes(|nodes| nodes.extend([("web@layer".to_owned(), layer.key)])).unwrap();
        let lease = store.lease([leased.key, key("not there yet")]).unwrap();

        let plan = store.collect(&Keep { dry_run: true, ..Keep::default() }).unwrap();
        assert_eq!(names(&plan), ["old"]);
        assert!(store.has(&key("old")), "a dry run removes nothing");
        let kept = store.collect(&Keep { age: Some(Duration::from_secs(3600)), ..Keep::default() }).unwrap();
        // A record without a time is as old as can be.
        assert_eq!(names(&kept), ["old"]);
        assert!(!store.has(&key("old")));
        assert!([base.key, layer.key, leased.key].iter().all(|key| store.has(key)));

        drop(lease);
        assert_eq!(names(&store.collect(&Keep::default()).unwrap()), ["leased"]);
        assert_eq!(names(&store.collect(&Keep::default()).unwrap()), [""; 0]);
        // The project is gone, and with it what it needs.
        drop(project);
        let mut all = names(&store.collect(&Keep::default()).unwrap()).len();
        all += store.states().len();
        assert_eq!((all, store.states().len()), (2, 0));
        assert_eq!(entries(&store.dir(Area::Staging)).count(), 0);
    }

    #[test]
    fn snapshots_go_before_states_and_only_as_much_as_needed() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        state(&store, "state", None);
        for (name, seconds) in [("old", 1000), ("new", 2000)] {
            let snapshot = store.dir(Area::Snapshots).join(name);
            fs::create_dir(&snapshot).unwrap();
            fs::write(snapshot.join("memory"), vec![1; 1 << 20]).unwrap();
            fs::write(snapshot.join("devices"), "").unwrap();
            let devices = fs::File::open(snapshot.join("devices")).unwrap();
            devices.set_modified(UNIX_EPOCH + Duration::from_secs(seconds)).unwrap();
        }
        let all: u64 = store.usage().unwrap().iter().map(|item| item.bytes).sum();
        let done = store.collect(&Keep { size: Some(all - 1), ..Keep::default() }).unwrap();
        assert_eq!(names(&done), ["old"]);
        assert_eq!(names(&store.collect(&Keep::default()).unwrap()), ["new", "state"]);
    }

    #[test]
    fn the_lease_of_a_dead_process_ends() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let state = state(&store, "state", None);
        // Its file is there, and nothing holds it.
        let left = store.dir(Area::Locks).join("lease-1-1");
        fs::write(&left, format!("{}\n", state.key)).unwrap();
        assert_eq!(names(&store.collect(&Keep::default()).unwrap()), ["state"]);
        assert!(!left.exists());
    }

    #[test]
    fn kernels_of_states_and_servers_stay() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let blobs = store.dir(Area::Blobs);
        let old = |name: &str| {
            let digest = Digest::of(name.as_bytes()).to_string();
            fs::write(blobs.join(&digest), name).unwrap();
            fs::File::open(blobs.join(&digest)).unwrap().set_modified(UNIX_EPOCH).unwrap();
            digest
        };
        let (served, free) = (old("served"), old("free"));
        fs::write(blobs.join(Digest::of(b"new").to_string()), "new").unwrap();
        let disk = store.state_dir(&state(&store, "under", None).key).join("disk.qcow2");
        let home = ServerHome::take(&store.dir(Area::Servers).join("project/web")).unwrap();
        fs::create_dir_all(home.dir()).unwrap();
        let blob = |name: &[u8]| Blob::of(name);
        let record = ServerRecord::<String> {
            image: "web".into(),
            root: key("base"),
            since: 0,
            forwards: Vec::new(),
            parts: Vec::new(),
            machine: (1, 1, 1),
            boot: Some(Boot { kernel: blob(b"served"), initrd: blob(b"served") }),
            chain: home.adopt(&[disk]).unwrap(),
            overlay: "disk-0.qcow2".into(),
            changing: false,
            parting: false,
        };
        home.keep(&record).unwrap();
        state(&store, "other", None);
        let done = store.collect(&Keep::default()).unwrap();
        let bytes = |name: &str| done.removed.iter().find(|item| item.name == name).unwrap().bytes;
        // The server has its disk, which takes no less room than before.
        assert_eq!((bytes("under") + 8192, done.removed.len()), (bytes("other"), 3));
        assert!(bytes(&free[..12]) > 0);
        assert!(home.missing(&ServerRecord { overlay: record.chain[0].clone(), ..record }).is_none());
        assert!(blobs.join(served).exists());
    }
}

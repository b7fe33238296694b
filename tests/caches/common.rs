//! Runners: each has a store of its own, whose states are files of random
//! bytes.

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock};

use vimg::cache::gc::Listing;
use vimg::cache::object::Object;
use vimg::cache::remote::Remote;
use vimg::cache::sign::{Signer, Trust};
use vimg::cache::{Caches, Pushed, State};
use vimg::digest::{Description, Key};
use vimg::event::{Event, Sink};
use vimg::store::{Disk, DiskKind, Record, Store};

/// Runs a future to its end. All share one runtime, because connections outlive
/// the call that opened them.
pub(crate) fn wait<T>(work: impl Future<Output = T>) -> T {
    static RUNTIME: OnceLock<tokio::runtime::Runtime> = OnceLock::new();
    let runtime =
        RUNTIME.get_or_init(|| tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap());
    runtime.block_on(work)
}

pub(crate) fn listed(listing: &Listing) -> Vec<String> {
    let name = |entries: &Vec<vimg::cache::entry::Entry>| entries[0].state.name.clone();
    listing.records.iter().map(|r| name(r.entries.as_ref().unwrap())).collect()
}

/// Returns the directory of a cache's objects, below its root.
pub(crate) fn objects() -> String {
    Object::Tombstones.path().strip_suffix("/tombstones").unwrap().to_owned()
}

/// Returns random bytes, which can't be compressed; the same for the same seed.
pub(crate) fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

/// Returns the key that runners sign with by default.
pub(crate) fn signer() -> Signer {
    static SIGNER: OnceLock<Signer> = OnceLock::new();
    SIGNER.get_or_init(|| Signer::generate().unwrap()).clone()
}

pub(crate) struct Runner {
    _dir: tempfile::TempDir,
    pub(crate) store: Store,
    nodes: BTreeMap<Key, String>,
    told: Arc<Mutex<Vec<String>>>,
}

impl Runner {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        // The store accepts all states, because these tests are about caches.
        let store = Store::open(dir.path()).unwrap().trusting(Arc::new(|_, _| true));
        Self { _dir: dir, store, nodes: BTreeMap::new(), told: Arc::default() }
    }

    /// Commits a base, a layer on it, and an output of 8 MiB that is mostly
    /// holes.
    pub(crate) fn project(&mut self, seed: u64) -> (Key, Key, Key) {
        let base = self.state("web:base", "base", DiskKind::Qcow2, None, seed, &[(0, 700_000)]);
        let layer = self.layer("web@site", base, seed + 1);
        let spots = [(0, 400_000), (6 << 20, 600_001)];
        let output = self.state("web:raw", "output", DiskKind::Raw, None, seed + 2, &spots);
        (base, layer, output)
    }

    /// Commits an output that can't be compressed.
    pub(crate) fn large_output(&mut self, length: usize) -> Key {
        self.state("web:raw", "output", DiskKind::Raw, None, 7, &[(0, length)])
    }

    pub(crate) fn layer(&mut self, name: &str, below: Key, seed: u64) -> Key {
        self.state(name, "layer", DiskKind::Qcow2, Some(below), seed, &[(0, 300_000)])
    }

    /// Commits an output that was written from a state.
    pub(crate) fn made_of(&mut self, name: &str, of: Key, seed: u64) -> Key {
        let key = self.state(name, "output", DiskKind::Raw, None, seed, &[(0, 300_000)]);
        let mut record = self.store.record(&key).unwrap();
        record.inherited = self.store.origins(&of);
        let staging = self.store.staging().unwrap();
        for file in ["disk.raw", "log.zst"] {
            std::fs::copy(self.store.state_dir(&key).join(file), staging.path().join(file)).unwrap();
        }
        self.store.set_aside(&key);
        assert!(self.store.commit(staging, &record).unwrap());
        key
    }

    /// Commits a state whose disk differs from that of `of` in one byte.
    pub(crate) fn changed_output(&mut self, of: Key) -> Key {
        let staging = self.store.staging().unwrap();
        let to = staging.path().join("disk.raw");
        std::fs::copy(self.store.state_dir(&of).join("disk.raw"), &to).unwrap();
        let file = std::fs::File::options().write(true).open(&to).unwrap();
        file.write_all_at(b"!", (6 << 20) + 70_000).unwrap();
        std::fs::write(staging.path().join("log.zst"), "a log").unwrap();
        let mut description = Description::default();
        description.value("seed", "changed");
        let disk = Disk { kind: DiskKind::Raw, backing: None, depth: 0 };
        let record = Record::new(description.key(), "output", "web:raw", description, disk);
        let key = record.key;
        self.store.commit(staging, &record).unwrap();
        self.nodes.insert(key, "web:raw".into());
        key
    }

    fn state(
        &mut self,
        name: &str,
        kind: &str,
        disk: DiskKind,
        below: Option<Key>,
        seed: u64,
        spots: &[(u64, usize)],
    ) -> Key {
        let staging = self.store.staging().unwrap();
        let path = staging.path().join(disk.file_name());
        let mut start = 0;
        if disk == DiskKind::Qcow2 {
            let size = (1_u64 << 30).to_string();
            let made = std::process::Command::new("qemu-img")
                .args(["create", "-q", "-f", "qcow2"])
                .arg(&path)
                .arg(size)
                .status()
                .unwrap();
            assert!(made.success());
            start = 1 << 20;
        }
        let file = std::fs::File::options().create(true).truncate(false).write(true).open(&path).unwrap();
        for (n, (at, length)) in spots.iter().enumerate() {
            file.write_all_at(&noise(seed * 10 + n as u64, *length), start + at).unwrap();
        }
        file.set_len(file.metadata().unwrap().len().max(if disk == DiskKind::Raw { 8 << 20 } else { 0 }))
            .unwrap();
        std::fs::write(staging.path().join("log.zst"), format!("the log of {name}")).unwrap();
        let mut description = Description::default();
        description.value("seed", seed);
        description.content("parent", below.map_or(String::new(), |b| b.to_string()));
        let backing = below.map(|below| (below, self.store.record(&below).unwrap().id));
        let depth = u32::from(below.is_some());
        let disk = Disk { kind: disk, backing, depth };
        let record = Record::new(description.key(), kind, name, description, disk);
        let key = record.key;
        assert!(self.store.commit(staging, &record).unwrap());
        self.nodes.insert(key, name.to_owned());
        key
    }

    pub(crate) fn names(&self, keys: &[Key]) -> Vec<(Key, String)> {
        keys.iter().map(|key| (*key, self.nodes.get(key).cloned().unwrap_or_else(|| key.short()))).collect()
    }

    pub(crate) fn sink(&self) -> Sink {
        let told = self.told.clone();
        Arc::new(move |event| {
            if let Event::Notice { text } = event {
                told.lock().unwrap().push(text);
            }
        })
    }

    /// Returns the notices since the last call.
    pub(crate) fn told(&self) -> Vec<String> {
        std::mem::take(&mut *self.told.lock().unwrap())
    }

    pub(crate) fn with(&self, from: &Arc<Remote>, to: Option<&Arc<Remote>>) -> Caches {
        let mut trust = Trust::default();
        trust.add("main", signer().public());
        let mut caches = Caches::new(trust, Some(signer()), "web".into());
        caches.seen = Some(self.store.root().join("seen"));
        caches.from.push(from.clone());
        caches.to.extend(to.cloned());
        caches
    }

    pub(crate) fn try_push(&self, caches: &Caches, to: &Arc<Remote>, keys: &[Key]) -> Result<Pushed, String> {
        let states: Vec<State> =
            self.names(keys).into_iter().map(|(key, name)| State { key, name }).collect();
        let nodes = states.iter().map(|s| (s.name.clone(), s.key)).collect();
        wait(caches.push(to, &states, &nodes, &self.store, &self.sink()))
    }

    pub(crate) fn push(&self, caches: &Caches, to: &Arc<Remote>, keys: &[Key]) -> Pushed {
        self.try_push(caches, to, keys).unwrap()
    }

    /// Finds a state and fetches it. The error says why that failed.
    pub(crate) fn fetch(&self, caches: &Caches, key: Key) -> Result<u64, String> {
        let found = wait(caches.find(&self.names(&[key]), &self.sink()));
        let hit = found.get(&key).ok_or_else(|| format!("not found; {:?}", self.told()))?;
        wait(caches.fetch("web", hit, &self.store, &self.sink())).map(|f| f.bytes)
    }

    fn disk(&self, key: Key) -> PathBuf {
        let record = self.store.record(&key).unwrap();
        self.store.state_dir(&key).join(record.disk.kind.file_name())
    }

    /// Whether both have the same state, byte by byte.
    pub(crate) fn same(&self, other: &Self, key: Key) -> bool {
        let (own, theirs) = (self.store.record(&key).unwrap(), other.store.record(&key).unwrap());
        let log = |runner: &Self| std::fs::read(runner.store.state_dir(&key).join("log.zst")).unwrap();
        assert!(self.store.has(&key));
        own.id == theirs.id
            && own.description == theirs.description
            && log(self) == log(other)
            && self.same_files(other, key, key)
    }

    pub(crate) fn same_files(&self, other: &Self, key: Key, their_key: Key) -> bool {
        std::fs::read(self.disk(key)).unwrap() == std::fs::read(other.disk(their_key)).unwrap()
    }
}

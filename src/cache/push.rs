//! Uploads states to a cache.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use tokio::task::JoinSet;

use super::caches::{Caches, Refusal, now};
use super::chunk::{self, Chunk, blocking};
use super::entry::{self, BLOB, Build, Contents, Entry, Pack, Place, Signed};
use super::object::{GRACE, Meta, Object, sha256};
use super::remote::Remote;
use super::wire::WireState;
use crate::digest::{Digest, Key};
use crate::event::{Event, Sink};
use crate::store::{Record, StateId, Store};

/// Size of a full pack, in bytes: large enough that a disk is a few requests,
/// small enough that one request is soon done.
const FULL: usize = 16 << 20;
/// Parallel uploads of packs.
const AT_ONCE: usize = 4;
/// Bytes of a file that are read and compressed at once.
const BATCH: u64 = 16 << 20;
/// If the chunks of a file are in more packs than this, those in the smallest
/// packs are sent again. This limits fragmentation.
const SCATTERED: usize = 24;

/// A state that may be sent.
#[derive(Debug, Clone)]
pub struct State {
    /// Its key.
    pub key: Key,
    /// Its node's name.
    pub name: String,
}

/// The result of an upload.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pushed {
    /// Sent states.
    pub sent: usize,
    /// States that the cache already had.
    pub there: usize,
    /// States of which the cache has another build. States on top of these are
    /// not sent either.
    pub foreign: Vec<String>,
    /// States that came from another trust domain, or were made from such
    /// states. They are not signed for this domain.
    pub withheld: Vec<String>,
    /// States whose disk is damaged. They are no longer in the store.
    pub damaged: Vec<String>,
    /// Bytes written.
    pub bytes: u64,
}

impl Caches {
    /// Sends states to a cache, each with the disks below, and then the keys of
    /// the build's nodes.
    ///
    /// # Errors
    ///
    /// Why the upload was aborted.
    pub async fn push(
        &self,
        remote: &Arc<Remote>,
        states: &[State],
        nodes: &BTreeMap<String, Key>,
        store: &Store,
        sink: &Sink,
    ) -> Result<Pushed, String> {
        let Some(signer) = &self.signer else {
            return Err("there is no signing key: make one with `vimg cache keygen`".into());
        };
        let Some(domain) = remote.spec.domains.first() else {
            return Err("there is no trust domain to write to".into());
        };
        let mut push = Push {
            caches: self,
            remote,
            domain,
            store,
            sink,
            known: Known::default(),
            signed: HashMap::new(),
            packs: Vec::new(),
            current: Vec::new(),
            sending: JoinSet::new(),
            anew: false,
            looked: HashMap::new(),
            pushed: Pushed::default(),
            start: Instant::now(),
        };
        let before = remote.moved().1;
        let builds = self.builds(remote).await;
        for state in states {
            let previous = builds.iter().find_map(|b| b.nodes.get(&state.name)).filter(|k| **k != state.key);
            push.state(state, previous).await?;
        }
        push.pushed.bytes = remote.moved().1 - before;
        // Nodes that are not part of this build keep their keys.
        let last = builds.iter().find(|b| b.domain == *domain);
        let mut all = last.map(|b| b.nodes.clone()).unwrap_or_default();
        all.extend(nodes.iter().map(|(name, key)| (name.clone(), *key)));
        let name = self.notes_in(remote).swap_remove(0);
        if last.is_none_or(|last| last.nodes != all || last.name != name) {
            let build = Build { domain: domain.clone(), name: name.clone(), written: now(), nodes: all };
            let object = Object::Build { domain: domain.clone(), name };
            // The list only explains changes, so a failure is not an error.
            let put = remote.put(&object, build.write(signer)?, &[]).await;
            if let Err(trouble) = put
                && !trouble.known
                && remote.replaces()
            {
                remote.add_fault(trouble.why);
            }
        }
        Ok(push.pushed)
    }
}

/// Chunks in the cache, by digest: pack, offset and stored length.
type Known = HashMap<[u8; 32], (Slot, u64, u32)>;

/// An upload.
struct Push<'a> {
    caches: &'a Caches,
    remote: &'a Arc<Remote>,
    domain: &'a str,
    store: &'a Store,
    sink: &'a Sink,
    known: Known,
    /// Records in the cache, each with the disks below; `None` if the cache has
    /// another build of the state.
    signed: HashMap<Key, Option<Vec<Signed>>>,
    /// New packs, `None` until they are sent.
    packs: Vec<Option<Pack>>,
    current: Vec<u8>,
    sending: JoinSet<Result<(usize, Pack), String>>,
    /// Write packs even if they seem to exist, because one of them is damaged.
    anew: bool,
    /// Old packs that were checked, and whether they exist.
    looked: HashMap<Pack, bool>,
    pushed: Pushed,
    start: Instant,
}

/// The state of the cache, compared with a state in the store.
enum Found {
    /// The cache has no record.
    Missing,
    /// The cache has an unusable record.
    Useless,
    /// The cache has another build of the state.
    Foreign,
    /// The cache has this build; its entries.
    There(Vec<Signed>),
}

/// The pack of a chunk: one that the cache had, or a new one.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Slot {
    Old(Pack),
    New(usize),
}

impl Push<'_> {
    /// Sends a state and the disks below.
    async fn state(&mut self, state: &State, previous: Option<&Key>) -> Result<(), String> {
        let mut chain = Vec::new();
        let mut next = Some(state.key);
        while let Some(key) = next
            && !self.signed.contains_key(&key)
        {
            let Some(record) = self.store.record(&key).filter(|_| self.store.has(&key)) else {
                return Ok(());
            };
            next = record.disk.backing.map(|(below, _)| below);
            chain.push(record);
        }
        // From the top down: a state that the cache has includes the disks
        // below.
        let mut missing = Vec::new();
        for record in chain {
            if self.signed.contains_key(&record.key) {
                break;
            }
            match self.look(&record).await? {
                Found::Missing => missing.push((record, true)),
                Found::Useless => missing.push((record, false)),
                Found::Foreign => {
                    self.signed.insert(record.key, None);
                    break;
                }
                Found::There(chain) => {
                    for n in 0..chain.len() {
                        let key = chain[n].entry.state.key;
                        self.signed.entry(key).or_insert_with(|| Some(chain[n..].to_vec()));
                    }
                    break;
                }
            }
        }
        for (record, new) in missing.into_iter().rev() {
            // A domain signs only its own states. States that were built here
            // on states of another domain are signed only if the cache reads
            // that domain.
            let read = &self.remote.spec.domains;
            if record.origin.as_ref().is_some_and(|origin| origin.domain != self.domain)
                || record.inherited.iter().any(|origin| !read.contains(&origin.domain))
            {
                self.pushed.withheld.push(record.name.clone());
                self.signed.insert(record.key, None);
                continue;
            }
            let (store, key) = (self.store.clone(), record.key);
            if !blocking(move || store.is_sound(&key)).await? {
                self.pushed.damaged.push(record.name.clone());
                self.signed.insert(record.key, None);
                continue;
            }
            let below = match record.disk.backing {
                None => Some(Vec::new()),
                // A state does not fit another build of the disk below, so it
                // is of no use to readers of that build.
                Some((below, id)) => match self.signed.get(&below) {
                    Some(Some(chain)) if chain[0].entry.state.id == id => Some(chain.clone()),
                    _ => None,
                },
            };
            let signed = match below {
                None => None,
                Some(below) => {
                    let previous = previous.filter(|_| record.key == state.key);
                    if let Some(previous) = previous {
                        self.learn(previous).await;
                    }
                    self.send(&record, below, new).await?
                }
            };
            self.signed.insert(record.key, signed);
        }
        Ok(())
    }

    /// Looks a state up in the cache.
    async fn look(&mut self, record: &Record) -> Result<Found, String> {
        let mut found = Found::Missing;
        let domains = self.remote.spec.domains.clone();
        for domain in &domains {
            // Records of other domains are never replaced.
            let useless = if domain == self.domain { Found::Useless } else { Found::Missing };
            if self.caches.is_broken(self.remote, domain, &record.key) {
                self.distrust();
                found = useless;
                continue;
            }
            match self.caches.record(self.remote, domain, &record.key).await {
                Ok(Some(chain)) if chain[0].entry.state.id == record.id => {
                    if !self.keep_young(domain, &chain).await {
                        self.distrust();
                        found = useless;
                        continue;
                    }
                    self.pushed.there += 1;
                    return Ok(Found::There(chain));
                }
                Ok(Some(_)) if domain == self.domain => {
                    self.is_foreign(record);
                    return Ok(Found::Foreign);
                }
                Ok(_) => {}
                // An unusable record is replaced.
                Err(Refusal::Record(_)) => found = useless,
                Err(Refusal::Cache(trouble)) => return Err(trouble.to_string()),
            }
        }
        if matches!(found, Found::Useless) && !self.remote.replaces() {
            let why = format!("the record of {} can't be used, and can't be replaced there;", record.name);
            self.remote.add_fault(format!("{why} another `version` starts an empty cache"));
            return Ok(Found::Foreign);
        }
        Ok(found)
    }

    /// Notes that the cache has another build of a state.
    fn is_foreign(&mut self, record: &Record) {
        // Nothing is based on these, so the other build is as good as ours.
        if matches!(record.kind.as_str(), "output" | "check") {
            self.pushed.there += 1;
        } else {
            self.pushed.foreign.push(record.name.clone());
        }
    }

    /// Notes that something in the cache is damaged. From now on this upload
    /// refers only to packs that it writes itself.
    fn distrust(&mut self) {
        self.anew = true;
        self.known.retain(|_, (slot, ..)| matches!(slot, Slot::New(_)));
    }

    /// Refreshes the age of what a bucket's expiry rule might delete. `false`
    /// if some of it is gone already.
    async fn keep_young(&mut self, domain: &str, chain: &[Signed]) -> bool {
        let Some(own) = chain.first() else { return false };
        let object = Object::Record { domain: domain.to_owned(), key: own.entry.state.key };
        let Ok(Some(meta)) = self.remote.stat(&object).await else { return true };
        if !self.is_old(meta) {
            return true;
        }
        // Packs first: a record must never be younger than its packs.
        let packs = Pack::distinct(chain.iter().flat_map(|s| s.entry.packs()));
        if !self.are_there(&packs).await {
            return false;
        }
        // Only the writers of a domain refresh its records.
        domain != self.domain || self.touch(&object).await
    }

    fn is_old(&self, meta: Meta) -> bool {
        meta.age().is_some_and(|age| age >= self.remote.spec.touch_refresh)
    }

    /// Refreshes the age of an object. `false` if it does not exist. A missing
    /// right to do so is only noted.
    async fn touch(&self, object: &Object) -> bool {
        self.remote.touch(object).await.unwrap_or_else(|trouble| {
            if !trouble.known {
                self.remote.add_fault(format!("can't refresh the age of objects: {trouble}"));
            }
            true
        })
    }

    /// Whether packs exist, as far as the cache answers. Refreshes old ones.
    async fn are_there(&mut self, all: &[Pack]) -> bool {
        use futures_util::StreamExt;
        let packs = Pack::distinct(all.iter().filter(|p| !self.looked.contains_key(p)));
        let this = &*self;
        let dependencies = packs.into_iter().map(|pack| async move {
            let object = Object::Pack(pack.clone());
            let there = match this.remote.stat(&object).await {
                Ok(Some(meta)) if meta.size == pack.size => !this.is_old(meta) || this.touch(&object).await,
                Ok(_) => false,
                Err(_) => return None,
            };
            Some((pack, there))
        });
        let looked: Vec<Option<(Pack, bool)>> =
            futures_util::stream::iter(dependencies).buffer_unordered(AT_ONCE).collect().await;
        self.looked.extend(looked.into_iter().flatten());
        !all.iter().any(|pack| self.looked.get(pack) == Some(&false))
    }

    /// Learns which chunks an earlier build of a node left in the cache.
    async fn learn(&mut self, key: &Key) {
        if self.anew {
            return;
        }
        let domains = self.remote.spec.domains.clone();
        for domain in domains.iter().filter(|d| !self.caches.is_broken(self.remote, d, key)) {
            let Ok(Some(chain)) = self.caches.record(self.remote, domain, key).await else { continue };
            if self.keep_young(domain, &chain).await {
                for contents in chain.iter().take(1).flat_map(|s| &s.entry.files) {
                    self.learn_file(contents).await;
                }
            }
            return;
        }
    }

    /// Learns the chunks of a file. Ignores errors.
    async fn learn_file(&mut self, contents: &Contents) {
        let Place { pack, from, stored, length, digest } = contents.list.clone();
        let Some(pack) = contents.packs.get(pack as usize) else { return };
        if length > chunk::MAX_LIST || stored > length {
            return;
        }
        let Ok(Some(bytes)) = self.remote.range(pack, from, u64::from(stored)).await else { return };
        let Ok(Some(bytes)) = blocking(move || chunk::unpack(&bytes, length, &digest.0)).await else {
            return;
        };
        let Some(list) = chunk::read_list(&bytes, contents.size, &contents.packs) else { return };
        let mut used: HashMap<u32, u64> = HashMap::new();
        for chunk in &list {
            *used.entry(chunk.pack).or_default() += u64::from(chunk.stored);
        }
        let mut small: Vec<(u64, u32)> = used.into_iter().map(|(pack, bytes)| (bytes, pack)).collect();
        small.sort_unstable();
        let mut again = Vec::new();
        let mut bytes = 0;
        for (used, pack) in &small {
            bytes += used;
            if small.len() <= SCATTERED || bytes > FULL as u64 {
                break;
            }
            again.push(*pack);
        }
        let used: Vec<Pack> = small
            .iter()
            .filter(|(_, pack)| !again.contains(pack))
            .filter_map(|(_, pack)| contents.packs.get(*pack as usize).cloned())
            .collect();
        self.are_there(&used).await;
        for chunk in list.iter().filter(|p| !again.contains(&p.pack)) {
            let pack = contents.packs.get(chunk.pack as usize);
            if let Some(pack) = pack.filter(|pack| self.looked.get(pack) == Some(&true)) {
                let slot = Slot::Old(pack.clone());
                self.known.insert(chunk.digest, (slot, chunk.from, chunk.stored));
            }
        }
    }

    /// Sends the files of a state, then its record. `new` means that the cache
    /// has no record yet. Returns `None` if another writer has just sent
    /// another build of the state.
    async fn send(
        &mut self,
        record: &Record,
        below: Vec<Signed>,
        new: bool,
    ) -> Result<Option<Vec<Signed>>, String> {
        let mut staged = Vec::new();
        let mut files = Vec::new();
        for (name, path, digest) in self.files_of(record) {
            let known = below
                .first()
                .and_then(|b| b.entry.files.iter().find(|f| f.digest.is_some() && f.digest == digest));
            match known {
                // The kernel is usually that of the state below.
                Some(known) => files.push(known.clone()),
                None => staged.push(self.file(&record.name, name, &path, digest).await?),
            }
        }
        self.flush()?;
        self.settle(0).await?;
        for draft in staged {
            files.push(draft.finish(&self.packs)?);
        }
        let signer = self.caches.signer.as_ref().ok_or("there is no signing key")?;
        // Paths of this machine are not sent.
        let signed = Entry::sign(self.domain, now(), WireState::of(record), files, below.first(), signer)?;
        let mut chain = vec![signed];
        chain.extend(below);
        let all: Vec<&Signed> = chain.iter().collect();
        let object = Object::Record { domain: self.domain.to_owned(), key: record.key };
        let packs = Pack::distinct(chain.iter().flat_map(|s| s.entry.packs()));
        let bytes = entry::write(&all)?;
        let put = match new {
            true => self.remote.put_new(&object, bytes, &packs).await,
            false => self.remote.put(&object, bytes, &packs).await,
        };
        if !put.map_err(|e| e.to_string())? {
            // It may be this record, if the response to the first try was lost.
            match self.caches.record(self.remote, self.domain, &record.key).await {
                Ok(Some(theirs)) if theirs[0].entry.state.id == record.id => {}
                _ => {
                    self.is_foreign(record);
                    return Ok(None);
                }
            }
        }
        self.pushed.sent += 1;
        (self.sink)(Event::Sent {
            node: record.name.clone(),
            key: record.key.to_string(),
            to: self.remote.spec.label.clone(),
        });
        Ok(Some(chain))
    }

    /// The files of a state: name, path, and the digest if the store names the
    /// file by it.
    fn files_of(&self, record: &Record) -> Vec<(&'static str, PathBuf, Option<Digest>)> {
        let dir = self.store.state_dir(&record.key);
        let disk = record.disk.kind.file_name();
        let mut files = vec![(disk, dir.join(disk), None)];
        let log = "log.zst";
        if disk != log && dir.join(log).exists() {
            files.push((log, dir.join(log), None));
        }
        let mut blobs: Vec<Digest> = [record.boot, record.appliance]
            .iter()
            .flatten()
            .flat_map(|boot| [boot.kernel.digest, boot.initrd.digest])
            .collect();
        blobs.sort_unstable();
        blobs.dedup();
        files.extend(blobs.into_iter().map(|digest| (BLOB, self.store.blob(&digest), Some(digest))));
        files
    }

    async fn file(
        &mut self,
        node: &str,
        name: &str,
        path: &Path,
        digest: Option<Digest>,
    ) -> Result<Draft, String> {
        let fail = |e: std::io::Error| format!("{}: {e}", path.display());
        let file = Arc::new(File::open(path).map_err(fail)?);
        let length = file.metadata().map_err(fail)?.len();
        let owned = path.to_owned();
        let cut = blocking(move || chunk::cut(&owned)).await?.map_err(fail)?;
        let all: u64 = cut.iter().map(|(_, length)| u64::from(*length)).sum();
        let mut draft = Draft { name: name.to_owned(), size: length, digest, slots: Vec::new(), list: None };
        let mut list: Vec<Chunk> = Vec::new();
        let (mut rest, mut done) = (cut.as_slice(), 0);
        while !rest.is_empty() {
            let mut bytes = 0;
            let count = rest.iter().take_while(|(_, length)| {
                bytes += u64::from(*length);
                bytes <= BATCH
            });
            let count = count.count().max(1);
            let (batch, others) = rest.split_at(count);
            rest = others;
            let (file, chunks, known) = (file.clone(), batch.to_vec(), std::mem::take(&mut self.known));
            let (packed, known) = blocking(move || {
                let packed = chunk::pack(&file, &chunks, &known);
                (packed, known)
            })
            .await?;
            self.known = known;
            for ((at, length), packed) in batch.iter().zip(packed.map_err(fail)?) {
                done += u64::from(*length);
                if packed.zero {
                    continue;
                }
                let (slot, from, stored) = self.place(packed.digest, packed.bytes).await?;
                let pack = draft.slot(slot);
                list.push(Chunk { at: *at, length: *length, digest: packed.digest, pack, from, stored });
            }
            (self.sink)(Event::Moving {
                node: node.to_owned(),
                cache: self.remote.spec.label.clone(),
                sent: true,
                done,
                all,
                seconds: self.start.elapsed().as_secs_f64(),
            });
        }
        let bytes = chunk::write_list(&list).ok_or("a file has too many chunks")?;
        let digest = Digest::of(&bytes);
        let packed = zstd::bulk::compress(&bytes, 3).map_err(|e| e.to_string())?;
        let (length, stored) = (bytes.len() as u32, packed.len().min(bytes.len()) as u32);
        let packed = if packed.len() < bytes.len() { packed } else { bytes };
        let slot = Slot::New(self.packs.len());
        let from = self.current.len() as u64;
        self.add(&packed).await?;
        let pack = draft.slot(slot);
        draft.list = Some(Place { pack, from, stored, length, digest });
        Ok(draft)
    }

    /// Returns the place of a chunk. Adds new chunks to the current pack.
    async fn place(&mut self, digest: [u8; 32], bytes: Option<Vec<u8>>) -> Result<(Slot, u64, u32), String> {
        // The same batch may have contained it before.
        if let Some(known) = self.known.get(&digest) {
            return Ok(known.clone());
        }
        let bytes = bytes.ok_or("a chunk is unknown")?;
        let place = (Slot::New(self.packs.len()), self.current.len() as u64, bytes.len() as u32);
        self.known.insert(digest, place.clone());
        self.add(&bytes).await?;
        Ok(place)
    }

    /// Adds bytes to the current pack.
    async fn add(&mut self, bytes: &[u8]) -> Result<(), String> {
        self.current.extend_from_slice(bytes);
        if self.current.len() >= FULL {
            self.flush()?;
            self.settle(AT_ONCE - 1).await?;
        }
        Ok(())
    }

    /// Sends the current pack.
    fn flush(&mut self) -> Result<(), String> {
        if self.current.is_empty() {
            return Ok(());
        }
        let (bytes, number) = (std::mem::take(&mut self.current), self.packs.len());
        self.packs.push(None);
        let (remote, anew) = (self.remote.clone(), self.anew);
        self.sending.spawn(async move {
            let (bytes, sha256) = blocking(move || {
                let sha256 = sha256(&bytes);
                (bytes, sha256)
            })
            .await?;
            let bytes = Bytes::from(bytes);
            let pack = Pack { sha256, size: bytes.len() as u64 };
            let object = Object::Pack(pack.clone());
            // An interrupted upload may have sent it.
            let there = match anew && remote.replaces() {
                true => None,
                false => remote.stat(&object).await.map_err(|e| e.to_string())?,
            };
            // Garbage collection may be about to remove an old pack.
            let old = there.and_then(|meta| meta.age()).is_some_and(|age| age > GRACE / 2);
            let write = (old && remote.replaces()) || there.is_none_or(|meta| meta.size != pack.size);
            if !write || remote.put(&object, bytes.clone(), &[]).await.map_err(|e| e.to_string())? {
                return Ok((number, pack));
            }
            // Another writer has started to write it, and may never finish.
            let there = remote.stat(&object).await.map_err(|e| e.to_string())?;
            if there.is_some_and(|meta| meta.size == pack.size) {
                return Ok((number, pack));
            }
            let mut bytes = Vec::from(bytes);
            // These extra bytes give the pack another name. No chunk refers to
            // them.
            bytes.extend_from_slice(StateId::new().to_string().as_bytes());
            let pack = Pack { sha256: self::sha256(&bytes), size: bytes.len() as u64 };
            match remote.put(&Object::Pack(pack.clone()), bytes, &[]).await.map_err(|e| e.to_string())? {
                true => Ok((number, pack)),
                false => Err("the cache does not accept new objects".into()),
            }
        });
        Ok(())
    }

    /// Waits until at most `most` packs are being sent.
    async fn settle(&mut self, most: usize) -> Result<(), String> {
        while self.sending.len() > most {
            let Some(done) = self.sending.join_next().await else { return Ok(()) };
            let (number, pack) = done.map_err(|e| e.to_string())??;
            self.packs[number] = Some(pack);
        }
        Ok(())
    }
}

/// A file whose packs are not all sent yet.
struct Draft {
    name: String,
    size: u64,
    digest: Option<Digest>,
    slots: Vec<Slot>,
    list: Option<Place>,
}

impl Draft {
    /// Returns the index of a pack in this file's packs.
    fn slot(&mut self, slot: Slot) -> u32 {
        // It is usually the last one.
        if let Some(n) = self.slots.iter().rposition(|s| *s == slot) {
            return n as u32;
        }
        self.slots.push(slot);
        (self.slots.len() - 1) as u32
    }

    fn finish(self, packs: &[Option<Pack>]) -> Result<Contents, String> {
        let pack = |slot| match slot {
            Slot::Old(pack) => Ok(pack),
            Slot::New(number) => packs.get(number).cloned().flatten().ok_or("a pack was not sent"),
        };
        Ok(Contents {
            name: self.name,
            size: self.size,
            digest: self.digest,
            packs: self.slots.into_iter().map(pack).collect::<Result<_, _>>()?,
            list: self.list.ok_or("a file has no list of chunks")?,
        })
    }
}

//! Uploads states to a cache.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::Arc;

use super::caches::{Caches, Refusal, now};
use super::chunk::{self, blocking};
use super::entry::{self, BLOB, Build, Contents, Entry, Pack, Place, Signed};
use super::object::Object;
use super::remote::Remote;
use super::wire::WireState;
use crate::digest::{Digest, Key};
use crate::event::{Event, Sink};
use crate::store::{Record, Store};

mod ages;
mod packing;

use ages::Ages;
use packing::Packing;

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
            signed: HashMap::new(),
            packing: Packing::new(remote, sink),
            ages: Ages::new(remote),
            pushed: Pushed::default(),
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

/// An upload.
struct Push<'a> {
    caches: &'a Caches,
    remote: &'a Arc<Remote>,
    domain: &'a str,
    store: &'a Store,
    sink: &'a Sink,
    /// Records in the cache, each with the disks below; `None` if the cache has
    /// another build of the state.
    signed: HashMap<Key, Option<Vec<Signed>>>,
    packing: Packing<'a>,
    ages: Ages<'a>,
    pushed: Pushed,
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
                self.packing.distrust();
                found = useless;
                continue;
            }
            match self.caches.record(self.remote, domain, &record.key).await {
                Ok(Some(chain)) if chain[0].entry.state.id == record.id => {
                    if !self.ages.keep_young(domain, domain == self.domain, &chain).await {
                        self.packing.distrust();
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

    /// Learns which chunks an earlier build of a node left in the cache.
    async fn learn(&mut self, key: &Key) {
        if !self.packing.trusts() {
            return;
        }
        let domains = self.remote.spec.domains.clone();
        for domain in domains.iter().filter(|d| !self.caches.is_broken(self.remote, d, key)) {
            let Ok(Some(chain)) = self.caches.record(self.remote, domain, key).await else { continue };
            if self.ages.keep_young(domain, domain == self.domain, &chain).await {
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
        let again = packing::scattered(&list);
        let used: BTreeSet<u32> = list.iter().map(|c| c.pack).filter(|pack| !again.contains(pack)).collect();
        let used: Vec<Pack> =
            used.iter().filter_map(|pack| contents.packs.get(*pack as usize).cloned()).collect();
        self.ages.are_there(&used).await;
        for chunk in list.iter().filter(|p| !again.contains(&p.pack)) {
            let pack = contents.packs.get(chunk.pack as usize);
            if let Some(pack) = pack.filter(|pack| self.ages.has(pack)) {
                self.packing.learn(chunk, pack);
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
                None => staged.push(self.packing.file(&record.name, name, &path, digest).await?),
            }
        }
        files.extend(self.packing.finish(staged).await?);
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
}

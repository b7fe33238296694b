//! Collects garbage in a cache; lists, verifies and copies it.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::caches::{Caches, now};
use super::entry::{self, Entry, Pack};
use super::object::{Meta, Object, Trouble, sha256};
use super::remote::Remote;
use crate::digest::Key;

/// Maximum size of the list of tombstones, in bytes.
const MAX_TOMBSTONES: u64 = 64 << 20;

/// A record in a cache.
#[derive(Debug)]
pub struct Listed {
    /// The trust domain.
    pub domain: String,
    /// The state's key.
    pub key: Key,
    /// When it was last written or refreshed.
    pub modified: Option<SystemTime>,
    /// The entries of the state and of the disks below, with unchecked
    /// signatures; or what is wrong with the record.
    pub entries: Result<Vec<Entry>, String>,
}

impl Listed {
    fn packs(&self) -> impl Iterator<Item = &Pack> {
        self.entries.iter().flatten().flat_map(Entry::packs)
    }

    /// When a build last used it, in seconds since 1970.
    fn used(&self) -> u64 {
        let touched = self.modified.and_then(|t| t.duration_since(UNIX_EPOCH).ok()).map(|d| d.as_secs());
        let written = self.entries.as_ref().ok().and_then(|all| all.first()).map(|e| e.written);
        touched.or(written).unwrap_or_default()
    }
}

/// The contents of a cache.
#[derive(Debug, Default)]
pub struct Listing {
    /// Its records.
    pub records: Vec<Listed>,
    /// Its packs, by their SHA-256.
    pub packs: BTreeMap<String, u64>,
    /// Its builds, and when they were written.
    pub builds: Vec<(Object, Option<SystemTime>)>,
    /// Temporary copies that interrupted refreshes left, and their metadata.
    asides: Vec<(Object, Meta)>,
}

impl Listing {
    /// The size of all packs, in bytes.
    pub fn bytes(&self) -> u64 {
        self.packs.values().sum()
    }
}

/// Lists a cache and reads its records.
pub async fn list(remote: &Remote) -> Result<Listing, Trouble> {
    use futures_util::{StreamExt, TryStreamExt};
    let mut listing = Listing::default();
    let mut records = Vec::new();
    for (object, meta) in remote.list().await? {
        match object {
            Object::Pack(pack) => {
                listing.packs.insert(pack.sha256, pack.size);
            }
            Object::Record { domain, key } => records.push((domain, key, meta)),
            build @ Object::Build { .. } => listing.builds.push((build, meta.modified)),
            aside @ Object::Aside(_) => listing.asides.push((aside, meta)),
            Object::Tombstones => {}
        }
    }
    let read = records.into_iter().map(|(domain, key, Meta { modified, .. })| async move {
        let object = Object::Record { domain: domain.clone(), key };
        let entries = match remote.get(&object, entry::MAX_STORED).await {
            Ok(Some(bytes)) => entry::peek(&bytes),
            // Another process may have deleted it since.
            Ok(None) => return Ok(None),
            Err(trouble) if trouble.content => Err(trouble.why),
            Err(trouble) => return Err(trouble),
        };
        Ok::<_, Trouble>(Some(Listed { domain, key, modified, entries }))
    });
    let read = futures_util::stream::iter(read).buffer_unordered(super::service::AT_ONCE);
    let read: Vec<Option<Listed>> = read.try_collect().await?;
    listing.records = read.into_iter().flatten().collect();
    listing.records.sort_by(|a, b| (&a.domain, a.key).cmp(&(&b.domain, b.key)));
    Ok(listing)
}

/// What garbage collection keeps.
#[derive(Debug, Clone, Copy)]
pub struct Keep {
    /// Remove records that no build used for longer than this.
    pub age: Option<Duration>,
    /// Remove the least recently used records until this size is left, in
    /// bytes.
    pub size: Option<u64>,
    /// How long a pack with a tombstone stays.
    pub grace: Duration,
    /// Only report what would be removed.
    pub dry_run: bool,
}

/// The result of garbage collection.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct Cleaned {
    /// Removed records.
    pub records: usize,
    /// Removed packs.
    pub packs: usize,
    /// The size of the removed packs, in bytes.
    pub bytes: u64,
    /// Packs with a tombstone: the next run removes those that are still
    /// unneeded.
    pub tombstones: usize,
    /// The size that is left, in bytes.
    pub left: u64,
}

/// Removes old records, then unneeded packs. Safe beside builds: records go
/// before their packs, and a pack goes only if two runs, [`Keep::grace`] apart,
/// found it unneeded.
pub async fn clean(remote: &Remote, keep: &Keep) -> Result<Cleaned, Trouble> {
    let mut listing = list(remote).await?;
    let mut cleaned = Cleaned::default();
    let now = now();
    listing.records.sort_by_key(Listed::used);
    let too_old = |used: u64| keep.age.is_some_and(|age| now.saturating_sub(used) > age.as_secs());
    let (mut gone, mut stay): (Vec<Listed>, Vec<Listed>) = std::mem::take(&mut listing.records)
        .into_iter()
        .partition(|r| too_old(r.used()) || r.entries.is_err());
    if let Some(most) = keep.size {
        let mut needed: HashMap<Pack, usize> = HashMap::new();
        for pack in stay.iter().flat_map(Listed::packs) {
            *needed.entry(pack.clone()).or_default() += 1;
        }
        let mut total: u64 = needed.keys().map(|p| p.size).sum();
        let mut oldest = 0;
        while total > most && oldest < stay.len() {
            for pack in stay[oldest].packs() {
                let count = needed.entry(pack.clone()).or_default();
                *count = count.saturating_sub(1);
                if *count == 0 {
                    total -= pack.size;
                }
            }
            oldest += 1;
        }
        gone.extend(stay.drain(..oldest));
    }
    for listed in &gone {
        if !keep.dry_run {
            let object = Object::Record { domain: listed.domain.clone(), key: listed.key };
            remote.delete(&object).await?;
        }
        cleaned.records += 1;
    }
    for (build, modified) in &listing.builds {
        let used = modified.and_then(|t| t.duration_since(UNIX_EPOCH).ok()).map_or(now, |d| d.as_secs());
        if too_old(used) && !keep.dry_run {
            remote.delete(build).await?;
        }
    }
    for (aside, meta) in &listing.asides {
        if meta.age().is_none_or(|age| age >= keep.grace) && !keep.dry_run {
            remote.delete(aside).await?;
        }
    }
    let needed: HashSet<&str> = stay.iter().flat_map(Listed::packs).map(|p| p.sha256.as_str()).collect();
    packs(remote, &listing.packs, &needed, keep, &mut cleaned).await?;
    cleaned.left = listing.bytes() - cleaned.bytes;
    Ok(cleaned)
}

async fn packs(
    remote: &Remote,
    there: &BTreeMap<String, u64>,
    needed: &HashSet<&str>,
    keep: &Keep,
    cleaned: &mut Cleaned,
) -> Result<(), Trouble> {
    let now = now();
    let bytes = remote.get(&Object::Tombstones, MAX_TOMBSTONES).await?.unwrap_or_default();
    // If the list can't be read, there are no tombstones.
    let before: BTreeMap<String, u64> = serde_json::from_slice(&bytes).unwrap_or_default();
    let mut after = BTreeMap::new();
    for (sha256, size) in there.iter().filter(|(sha256, _)| !needed.contains(sha256.as_str())) {
        let since = before.get(sha256).copied().unwrap_or(now);
        let object = Object::Pack(Pack { sha256: sha256.clone(), size: *size });
        if before.contains_key(sha256) && now.saturating_sub(since) >= keep.grace.as_secs() {
            // A build that found the pack in the meantime, and is about to
            // refer to it, has refreshed its age.
            let age = remote.stat(&object).await?.and_then(|meta| meta.age());
            if age.is_some_and(|age| age < keep.grace) {
                after.insert(sha256.clone(), since);
                continue;
            }
            if !keep.dry_run {
                remote.delete(&object).await?;
            }
            cleaned.packs += 1;
            cleaned.bytes += size;
        } else {
            after.insert(sha256.clone(), since);
        }
    }
    cleaned.tombstones = after.len();
    if after != before && !keep.dry_run {
        let bytes = serde_json::to_vec(&after).map_err(|e| Trouble::new(e.to_string()))?;
        remote.put(&Object::Tombstones, bytes, &[]).await?;
    }
    Ok(())
}

/// The result of a copy.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Copied {
    /// Copied records.
    pub records: usize,
    /// Records that were not copied, because they or their packs are damaged or
    /// missing.
    pub damaged: usize,
    /// Bytes written.
    pub bytes: u64,
}

/// The result of a verification.
#[derive(Debug, Default)]
pub struct Verified {
    /// Usable records.
    pub good: usize,
    /// Names of bad records, and what is wrong with each.
    pub wrong: Vec<(String, String)>,
    /// Bytes read.
    pub read: u64,
}

impl Caches {
    /// Checks every record as a build would, and that its packs exist; with
    /// `deep` also the contents of the packs.
    pub async fn verify(&self, remote: &Arc<Remote>, deep: bool) -> Result<Verified, Trouble> {
        let listing = list(remote).await?;
        let mut verified = Verified::default();
        let mut bad: BTreeMap<String, Option<String>> = BTreeMap::new();
        let domains: BTreeSet<String> = listing.records.iter().map(|r| r.domain.clone()).collect();
        let domains: Vec<String> = domains.into_iter().collect();
        for listed in &listing.records {
            let name = listed.entries.as_ref().ok().and_then(|all| all.first());
            let name = name.map_or_else(|| listed.key.short(), |e| e.state.name.clone());
            let name = format!("{} {name}", listed.domain);
            let object = Object::Record { domain: listed.domain.clone(), key: listed.key };
            let bytes = match remote.get(&object, entry::MAX_STORED).await {
                Ok(Some(bytes)) => bytes,
                Ok(None) => continue,
                Err(trouble) if trouble.content => {
                    verified.wrong.push((name, trouble.why));
                    continue;
                }
                Err(trouble) => return Err(trouble),
            };
            let asked = entry::Asked {
                key: listed.key,
                domain: &listed.domain,
                domains: &domains,
                trust: &self.trust,
                now: now(),
                max_age: remote.spec.max_age,
            };
            let chain = match entry::read(&bytes, &asked) {
                Ok(chain) => chain,
                Err(why) => {
                    verified.wrong.push((name, why));
                    continue;
                }
            };
            let mut trouble = None;
            for pack in chain.iter().flat_map(|s| s.entry.packs()) {
                let known = match bad.get(&pack.sha256) {
                    Some(known) => known.clone(),
                    None => {
                        let found = self.pack(remote, pack, &listing, deep, &mut verified.read).await?;
                        bad.insert(pack.sha256.clone(), found.clone());
                        found
                    }
                };
                trouble = trouble.or(known);
            }
            match trouble {
                None => verified.good += 1,
                Some(why) => verified.wrong.push((name, why)),
            }
        }
        Ok(verified)
    }

    async fn pack(
        &self,
        remote: &Arc<Remote>,
        pack: &Pack,
        listing: &Listing,
        deep: bool,
        read: &mut u64,
    ) -> Result<Option<String>, Trouble> {
        let short: String = pack.sha256.chars().take(12).collect();
        match listing.packs.get(&pack.sha256) {
            None => return Ok(Some(format!("the pack {short} is missing"))),
            Some(size) if *size != pack.size => return Ok(Some(format!("the pack {short} is cut short"))),
            Some(_) => {}
        }
        if !deep {
            return Ok(None);
        }
        let bytes = remote.get(&Object::Pack(pack.clone()), pack.size).await?.unwrap_or_default();
        *read += bytes.len() as u64;
        let good = sha256(&bytes) == pack.sha256;
        Ok((!good).then(|| format!("the pack {short} is damaged")))
    }

    /// Copies all records with their packs and signatures. Skips unusable
    /// records, and those that are newer in the target.
    pub async fn copy(&self, from: &Arc<Remote>, to: &Arc<Remote>) -> Result<Copied, Trouble> {
        let listing = list(from).await?;
        let before = to.moved().1;
        let mut copied = Copied::default();
        for listed in &listing.records {
            let object = Object::Record { domain: listed.domain.clone(), key: listed.key };
            let Ok(ours) = &listed.entries else {
                copied.damaged += 1;
                continue;
            };
            let Some(bytes) = from.get(&object, entry::MAX_STORED).await? else { continue };
            let there = to.get(&object, entry::MAX_STORED).await?;
            let written = |entries: &[Entry]| entries.first().map(|e| e.written);
            let newer = there.and_then(|bytes| entry::peek(&bytes).ok());
            if newer.is_some_and(|theirs| written(&theirs) >= written(ours)) {
                continue;
            }
            let packs = Pack::distinct(listed.packs());
            match self.copy_packs(from, to, packs.clone(), false).await {
                Err(trouble) if trouble.content => {
                    copied.damaged += 1;
                    continue;
                }
                done => done?,
            };
            to.put(&object, bytes, &packs).await?;
            copied.records += 1;
        }
        for (build, _) in &listing.builds {
            if let Some(bytes) = from.get(build, entry::MAX_STORED).await? {
                to.put(build, bytes, &[]).await?;
            }
        }
        copied.bytes = to.moved().1 - before;
        Ok(copied)
    }
}

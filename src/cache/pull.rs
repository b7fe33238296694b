//! Downloads states from a cache.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use futures_util::StreamExt;

use super::caches::{Caches, Hit, tell};
use super::chunk::{self, Chunk, blocking};
use super::entry::{BLOB, Contents, Pack, Place, Signed};
use super::object::{Object, Trouble};
use super::remote::Remote;
use super::sign::Writer;
use crate::digest::Blob;
use crate::disk::qcow2;
use crate::event::{Event, Sink};
use crate::store::{Area, DiskKind, Origin, Store};

mod parts;

use parts::{Part, missing, write};

/// Parallel requests per file.
const PARTS: usize = 4;
/// Age at which interrupted downloads are removed.
const STALE: Duration = Duration::from_secs(3 * 24 * 60 * 60);

/// The result of a download.
#[derive(Debug, Clone, PartialEq)]
pub struct Fetched {
    /// Bytes read from the cache.
    pub bytes: u64,
    /// Duration, in seconds.
    pub seconds: f64,
}

impl Caches {
    /// Downloads a state, with the disks below, into the store. Copies it to a
    /// nearer cache first, if there is one.
    ///
    /// # Errors
    ///
    /// Why the state can't be used.
    pub async fn fetch(&self, node: &str, hit: &Hit, store: &Store, sink: &Sink) -> Result<Fetched, String> {
        let fetched = self.fetch_all(node, hit, store, sink).await;
        if fetched.is_err() {
            // Another tier may have it.
            let place = (hit.tier, hit.domain.clone(), hit.chain[0].entry.state.key);
            self.failed.lock().unwrap_or_else(PoisonError::into_inner).insert(place);
        }
        fetched
    }

    async fn fetch_all(&self, node: &str, hit: &Hit, store: &Store, sink: &Sink) -> Result<Fetched, String> {
        let start = Instant::now();
        let mut bytes = 0;
        reap(&partial(store));
        // From the lowest disk up, so that each finished disk can be used.
        for signed in hit.chain.iter().rev() {
            let state = &signed.entry.state;
            let here = store.complete(&state.key, &mut Default::default());
            if here == Some(state.id) {
                continue;
            }
            if here.is_some() {
                return Err(format!("it lies on another build of {} than the one in the store", state.name));
            }
            let remote = self.nearest(node, hit, signed, sink).await;
            let lock = store.lock(&state.key).await.map_err(|e| e.to_string())?;
            // Another process may have built or fetched it in the meantime.
            let here = store.complete(&state.key, &mut Default::default());
            if here.is_some_and(|id| id != state.id) {
                return Err(format!("it lies on another build of {} than the one in the store", state.name));
            }
            if here.is_none() {
                let fetching = Fetching { remote: &remote, node, sink, start, bytes: AtomicU64::new(0) };
                let done = fetching.state(signed, store).await;
                bytes += fetching.bytes.load(Ordering::Relaxed);
                if done.is_err() {
                    self.set_broken(&remote, &hit.domain, &hit.chain[0].entry.state.key);
                }
                done?;
            }
            drop(lock);
        }
        Ok(Fetched { bytes, seconds: start.elapsed().as_secs_f64() })
    }

    /// Chooses the cache to read from: the state is copied to a nearer cache on
    /// this machine, if there is one.
    async fn nearest(&self, node: &str, hit: &Hit, signed: &Signed, sink: &Sink) -> Arc<Remote> {
        let found = &self.from[hit.tier];
        let near =
            self.from[..hit.tier].iter().find(|r| r.spec.kind == super::spec::Kind::Local && !r.is_gone());
        let Some(near) = near else { return found.clone() };
        // A copy that could not be used is overwritten.
        let own = &hit.chain[0];
        let overwrite = self.is_broken(near, &hit.domain, &own.entry.state.key);
        match self.copy_packs(found, near, signed.entry.packs().cloned(), overwrite).await {
            Ok(_) => {}
            Err(trouble) => {
                tell(sink, near, &format!("it can't store a copy: {trouble}"));
                return found.clone();
            }
        }
        // The nearer cache also gets the record, if it has all packs. It has
        // those of disks that were already in the store only if it got them
        // earlier.
        let mut whole = own.digest == signed.digest;
        for pack in hit.chain.iter().skip(1).flat_map(|s| s.entry.packs()) {
            whole = whole && matches!(near.stat(&Object::Pack(pack.clone())).await, Ok(Some(_)));
        }
        if whole {
            let object = Object::Record { domain: hit.domain.clone(), key: own.entry.state.key };
            let all: Vec<&Signed> = hit.chain.iter().collect();
            if let Ok(bytes) = super::entry::write(&all)
                && let Err(trouble) = near.put(&object, bytes, &[]).await
            {
                tell(sink, near, &format!("it can't store the record of {node}: {trouble}"));
            }
        }
        near.clone()
    }

    /// Copies packs that `to` does not have, or all with `overwrite`. Returns the
    /// number of bytes copied.
    pub(super) async fn copy_packs(
        &self,
        from: &Remote,
        to: &Remote,
        packs: impl IntoIterator<Item = Pack>,
        overwrite: bool,
    ) -> Result<u64, Trouble> {
        let mut copied = 0;
        for pack in packs {
            let object = Object::Pack(pack.clone());
            let there = to.stat(&object).await?;
            if !overwrite && there.is_some_and(|meta| meta.size == pack.size) {
                continue;
            }
            let bytes = from.get(&object, pack.size).await?;
            let bytes = bytes.ok_or_else(|| Trouble::content("a pack is missing"))?;
            if super::object::sha256(&bytes) != pack.sha256 {
                return Err(Trouble::content("a pack is damaged"));
            }
            copied += bytes.len() as u64;
            to.put(&object, bytes, &[]).await?;
        }
        Ok(copied)
    }
}

/// A state that is being downloaded.
struct Fetching<'a> {
    remote: &'a Remote,
    node: &'a str,
    sink: &'a Sink,
    start: Instant,
    bytes: AtomicU64,
}

impl Fetching<'_> {
    /// Downloads the files of a state and commits it. Resumes an interrupted
    /// download.
    async fn state(&self, signed: &Signed, store: &Store) -> Result<(), String> {
        let entry = &signed.entry;
        let dir = partial(store).join(signed.digest.to_string());
        let fail = |e: std::io::Error| format!("{}: {e}", dir.display());
        fs::create_dir_all(&dir).map_err(fail)?;
        for contents in &entry.files {
            let blob = contents.digest.map(|digest| Blob { digest, size: contents.size });
            if blob.is_some_and(|blob| store.has_blob(&blob)) {
                continue;
            }
            let path = match blob {
                Some(blob) => dir.join(blob.digest.to_string()),
                None => dir.join(&contents.name),
            };
            self.file(contents, &path).await?;
            let Some(blob) = blob else { continue };
            let file = File::open(&path).map_err(fail)?;
            let found = blocking(move || Blob::copy(file, &mut std::io::sink())).await?.map_err(fail)?;
            if found != blob {
                return Err("a file does not match its digest".into());
            }
            store.commit_blob(&path, &blob).map_err(|e| e.to_string())?;
        }
        let staging = store.staging().map_err(|e| e.to_string())?;
        for contents in entry.files.iter().filter(|c| c.name != BLOB) {
            fs::rename(dir.join(&contents.name), staging.path().join(&contents.name)).map_err(fail)?;
        }
        let mut record = entry.state.record();
        let disk = staging.path().join(record.disk.kind.file_name());
        if record.disk.kind == DiskKind::Qcow2 {
            // A header is checked whoever signed it.
            qcow2::read(&disk).map_err(|why| format!("its disk is refused: {why}"))?;
        }
        record.bytes = on_disk(&disk);
        // The host's kernel mounts only disks that this user made.
        record.trusted_filesystem &= signed.writer == Writer::Own;
        record.origin = Some(Origin { domain: entry.domain.clone(), key: signed.signer.clone() });
        let store = store.clone();
        let committed = blocking(move || store.commit(staging, &record)).await?;
        let _ = fs::remove_dir_all(&dir);
        committed.map(|_| ()).map_err(|e| e.to_string())
    }

    /// Downloads a file in chunks.
    async fn file(&self, contents: &Contents, path: &Path) -> Result<(), String> {
        let list = self.list(contents).await?;
        let fail = |e: std::io::Error| format!("{}: {e}", path.display());
        let there = path.exists();
        let file =
            File::options().read(true).write(true).create(true).truncate(false).open(path).map_err(fail)?;
        file.set_len(contents.size).map_err(fail)?;
        let file = Arc::new(file);
        let list = match there {
            true => {
                let file = file.clone();
                blocking(move || missing(&file, list)).await?
            }
            false => list,
        };
        let parts = parts::group(list);
        let all: u64 = parts.iter().map(|p| p.length).sum();
        let (done, failed) = (AtomicU64::new(0), AtomicBool::new(false));
        let fetched = futures_util::stream::iter(parts).map(|part| {
            let (file, done, failed) = (file.clone(), &done, &failed);
            async move {
                // Requests that have started are finished, so that the next
                // build can resume. No new ones start.
                if failed.load(Ordering::Relaxed) {
                    return Ok(());
                }
                let length = part.length;
                let came = self.part(&contents.packs, part, &file).await;
                failed.fetch_or(came.is_err(), Ordering::Relaxed);
                came?;
                let now = done.fetch_add(length, Ordering::Relaxed) + length;
                (self.sink)(Event::Moving {
                    node: self.node.to_owned(),
                    cache: self.remote.spec.label.clone(),
                    sent: false,
                    done: now,
                    all,
                    seconds: self.start.elapsed().as_secs_f64(),
                });
                Ok::<(), String>(())
            }
        });
        let all: Vec<Result<(), String>> = fetched.buffer_unordered(PARTS).collect().await;
        all.into_iter().collect()
    }

    async fn list(&self, contents: &Contents) -> Result<Vec<Chunk>, String> {
        let Place { pack, from, stored, length, digest } = contents.list.clone();
        let pack = contents.packs.get(pack as usize).ok_or("its list of chunks is missing")?;
        if length > chunk::MAX_LIST || stored > length {
            return Err("its list of chunks is too long".into());
        }
        let bytes = self.read(pack, from, u64::from(stored)).await?;
        let unpacked = blocking(move || chunk::unpack(&bytes, length, &digest.0)).await?;
        let list = unpacked.and_then(|bytes| chunk::read_list(&bytes, contents.size, &contents.packs));
        list.ok_or_else(|| "its list of chunks is damaged".into())
    }

    async fn read(&self, pack: &Pack, from: u64, length: u64) -> Result<Vec<u8>, String> {
        let bytes = self.remote.range(pack, from, length).await.map_err(|e| e.to_string())?;
        let bytes = bytes.ok_or("a pack is missing")?;
        self.bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        match bytes.len() as u64 {
            n if n == length => Ok(bytes),
            n if n < length => Err("a pack is cut short".into()),
            _ => Err("the cache sent more than requested".into()),
        }
    }

    /// Downloads chunks that are together in a pack. Repeats the request once
    /// if they arrive damaged: the connection may have been the cause.
    async fn part(&self, packs: &[Pack], part: Part, file: &Arc<File>) -> Result<(), String> {
        let pack = packs.get(part.pack as usize).ok_or("a pack is missing")?;
        let chunks = Arc::new(part.chunks);
        for again in [false, true] {
            let bytes = match self.read(pack, part.from, part.length).await {
                Err(why) if !again && !self.remote.is_gone() => {
                    tell(self.sink, self.remote, &format!("{why}; retrying"));
                    continue;
                }
                other => other?,
            };
            let (chunks, file) = (chunks.clone(), file.clone());
            let written = blocking(move || write(&bytes, part.from, &chunks, &file)).await?;
            if written.map_err(|e| e.to_string())? {
                return Ok(());
            }
            if !again {
                tell(self.sink, self.remote, "a chunk arrived damaged; retrying");
            }
        }
        Err("a chunk is damaged".into())
    }
}

/// Disk usage of a file, in bytes.
fn on_disk(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    // st_blocks counts units of 512 bytes, whatever the filesystem's.
    fs::metadata(path).map_or(0, |m| m.blocks() * 512)
}

fn partial(store: &Store) -> PathBuf {
    store.dir(Area::Partial)
}

/// Removes interrupted downloads that no build has resumed.
fn reap(dir: &Path) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        let age = entry.metadata().and_then(|m| m.modified()).map(|t| SystemTime::now().duration_since(t));
        if matches!(age, Ok(Ok(age)) if age > STALE) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

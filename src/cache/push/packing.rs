//! Packs: cuts files into chunks, and sends those that a cache does not have.

use std::collections::HashMap;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use tokio::task::JoinSet;

use crate::cache::chunk::{self, Chunk, blocking};
use crate::cache::entry::{Contents, Pack, Place};
use crate::cache::object::{GRACE, Object, sha256};
use crate::cache::remote::Remote;
use crate::digest::Digest;
use crate::event::{Event, Sink};
use crate::store::StateId;

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

/// Chunks in the cache, by digest: pack, offset and stored length.
type Known = HashMap<[u8; 32], (Slot, u64, u32)>;

/// The pack of a chunk: one that the cache had, or a new one.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Slot {
    Old(Pack),
    New(usize),
}

/// The packs of an upload.
pub(super) struct Packing<'a> {
    remote: &'a Arc<Remote>,
    sink: &'a Sink,
    known: Known,
    /// New packs, `None` until they are sent.
    packs: Vec<Option<Pack>>,
    current: Vec<u8>,
    sending: JoinSet<Result<(usize, Pack), String>>,
    /// Write packs even if they seem to exist, because one of them is damaged.
    rewrites: bool,
    start: Instant,
}

impl<'a> Packing<'a> {
    pub(super) fn new(remote: &'a Arc<Remote>, sink: &'a Sink) -> Self {
        Self {
            remote,
            sink,
            known: Known::default(),
            packs: Vec::new(),
            current: Vec::new(),
            sending: JoinSet::new(),
            rewrites: false,
            start: Instant::now(),
        }
    }
}

impl Packing<'_> {
    /// Whether packs of the cache may be referred to.
    pub(super) fn trusts(&self) -> bool {
        !self.rewrites
    }

    /// Notes that a pack of the cache has a chunk.
    pub(super) fn learn(&mut self, chunk: &Chunk, pack: &Pack) {
        self.known.insert(chunk.digest, (Slot::Old(pack.clone()), chunk.from, chunk.stored));
    }

    /// Sends the last pack, and waits until all are sent. Returns the contents
    /// of the files, for their record.
    pub(super) async fn finish(&mut self, drafts: Vec<Draft>) -> Result<Vec<Contents>, String> {
        self.flush()?;
        self.settle(0).await?;
        drafts.into_iter().map(|draft| draft.finish(&self.packs)).collect()
    }

    /// Refers from now on only to packs that this upload writes itself, because
    /// something in the cache is damaged.
    pub(super) fn distrust(&mut self) {
        self.rewrites = true;
        self.known.retain(|_, (slot, ..)| matches!(slot, Slot::New(_)));
    }

    /// Sends the chunks of a file that the cache does not have.
    pub(super) async fn file(
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
        let (remote, rewrites) = (self.remote.clone(), self.rewrites);
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
            let there = match rewrites && remote.replaces() {
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

/// Chooses the packs whose chunks are sent again, because the chunks of a file
/// are in too many packs.
pub(super) fn scattered(list: &[Chunk]) -> Vec<u32> {
    let mut used: HashMap<u32, u64> = HashMap::new();
    for chunk in list {
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
    again
}

/// A file whose packs are not all sent yet.
pub(super) struct Draft {
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

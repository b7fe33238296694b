//! Cuts files into chunks that are known by their digests.
//!
//! Cuts of a disk follow its clusters, so that the same content in a machine
//! gives the same chunk, wherever it is in the file.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::fs::SeekFrom;
use serde::{Deserialize, Serialize};

use crate::disk::qcow2;

/// The usual length of a chunk, in bytes: QEMU's default cluster size of a
/// qcow2. Compressed clusters end elsewhere.
const LENGTH: u64 = 64 << 10;
/// Maximum length of a chunk, in bytes.
const MAX_LENGTH: u64 = 2 * LENGTH;
/// Maximum size of an uncompressed list of chunks, in bytes: enough for about
/// 370 GB of data.
pub(super) const MAX_LIST: u32 = 256 << 20;
/// Compression level of zstd. Higher levels take more time than they save here.
const LEVEL: i32 = 3;

/// A chunk in the list of a file's chunks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Chunk {
    /// Offset in the file, in bytes.
    pub at: u64,
    /// Length in the file, in bytes.
    pub length: u32,
    /// Digest of its content.
    pub digest: [u8; 32],
    /// Index of its pack in the file's packs.
    pub pack: u32,
    /// Offset in the pack, in bytes.
    pub from: u64,
    /// Stored length, in bytes. The chunk is compressed if this is less than
    /// `length`.
    pub stored: u32,
}

/// Returns offsets and lengths of a file's chunks. Holes have no chunks.
pub(super) fn cut(path: &Path) -> io::Result<Vec<(u64, u32)>> {
    let file = File::open(path)?;
    let length = file.metadata()?.len();
    // A raw disk holds what a machine wrote, which may look like another
    // format.
    let clusters = match path.extension().is_some_and(|e| e == "qcow2") {
        true => qcow2::compressed_clusters(path).unwrap_or_default(),
        false => Vec::new(),
    };
    let mut chunks = Vec::new();
    let mut at = 0;
    while at < length {
        let Some((start, end)) = extent(&file, at)? else { break };
        // Takes whole blocks, so that the chunks do not depend on where the
        // filesystem has holes.
        let mut next = start.max(at) / LENGTH * LENGTH;
        if let Some(last) = chunks.last() {
            let (at, length): &(u64, u32) = last;
            next = next.max(at + u64::from(*length));
        }
        while next < end {
            let stop = (next / LENGTH + 1) * LENGTH;
            let index = clusters.partition_point(|c| *c <= next);
            let following = clusters.get(index).copied();
            let starts_here = index > 0 && clusters[index - 1] == next;
            let stop = match following {
                Some(following) if starts_here && following - next <= MAX_LENGTH => following,
                Some(following) if !starts_here => stop.min(following),
                _ => stop,
            };
            let stop = stop.min(length);
            chunks.push((next, (stop - next) as u32));
            next = stop;
        }
        at = end.max(next);
    }
    Ok(chunks)
}

/// Finds the next extent of data at or after `at`.
fn extent(file: &File, at: u64) -> io::Result<Option<(u64, u64)>> {
    let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
        Ok(start) => start,
        Err(rustix::io::Errno::NXIO) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    Ok(Some((start, rustix::fs::seek(file, SeekFrom::Hole(start))?)))
}

/// A chunk that was read and compressed. It has no bytes if it is all zeros or
/// already known.
pub(super) struct Packed {
    /// Digest of its content.
    pub digest: [u8; 32],
    /// Its bytes as they are stored, if they must be.
    pub bytes: Option<Vec<u8>>,
    /// Whether it is all zeros.
    pub zero: bool,
}

/// Reads and compresses chunks on all CPUs. Digests in `known` need no bytes.
pub(super) fn pack<T: Sync>(
    file: &File,
    chunks: &[(u64, u32)],
    known: &HashMap<[u8; 32], T>,
) -> io::Result<Vec<Packed>> {
    let next = AtomicUsize::new(0);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let done: Vec<io::Result<Vec<(usize, Packed)>>> = std::thread::scope(|scope| {
        let work = || -> io::Result<Vec<(usize, Packed)>> {
            let mut packer = zstd::bulk::Compressor::new(LEVEL)?;
            let mut buffer = Vec::new();
            let mut done = Vec::new();
            loop {
                let n = next.fetch_add(1, Ordering::Relaxed);
                let Some((at, length)) = chunks.get(n) else { return Ok(done) };
                buffer.resize(*length as usize, 0);
                file.read_exact_at(&mut buffer, *at)?;
                done.push((n, one(&buffer, &mut packer, known)?));
            }
        };
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        let ended = |worker: std::thread::ScopedJoinHandle<'_, io::Result<Vec<(usize, Packed)>>>| {
            worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        workers.into_iter().map(ended).collect()
    });
    let mut all = Vec::with_capacity(chunks.len());
    for part in done {
        all.extend(part?);
    }
    all.sort_unstable_by_key(|(n, _)| *n);
    Ok(all.into_iter().map(|(_, packed)| packed).collect())
}

fn one<T>(
    bytes: &[u8],
    packer: &mut zstd::bulk::Compressor<'_>,
    known: &HashMap<[u8; 32], T>,
) -> io::Result<Packed> {
    let digest = *blake3::hash(bytes).as_bytes();
    if bytes.iter().all(|b| *b == 0) {
        return Ok(Packed { digest, bytes: None, zero: true });
    }
    if known.contains_key(&digest) {
        return Ok(Packed { digest, bytes: None, zero: false });
    }
    let packed = packer.compress(bytes)?;
    // Already compressed data only grows.
    let bytes = if packed.len() < bytes.len() { packed } else { bytes.to_vec() };
    Ok(Packed { digest, bytes: Some(bytes), zero: false })
}

/// Decompresses a chunk and compares it with its digest. Never decompresses
/// more than `length` bytes.
pub(super) fn unpack(stored: &[u8], length: u32, digest: &[u8; 32]) -> Option<Vec<u8>> {
    let bytes = if stored.len() < length as usize {
        let mut bytes = Vec::new();
        let decoder = zstd::stream::read::Decoder::new(stored).ok()?;
        decoder.take(u64::from(length) + 1).read_to_end(&mut bytes).ok()?;
        bytes
    } else {
        stored.to_vec()
    };
    (bytes.len() == length as usize && blake3::hash(&bytes).as_bytes() == digest).then_some(bytes)
}

/// Encodes a list of chunks; `None` if it is too large.
pub(super) fn write_list(chunks: &[Chunk]) -> Option<Vec<u8>> {
    postcard::to_stdvec(chunks).ok().filter(|bytes| bytes.len() <= MAX_LIST as usize)
}

/// Decodes the list of chunks of a file of `size` bytes in `packs`. `None` if a
/// chunk is outside the file or its pack, or overlaps the previous chunk.
pub(super) fn read_list(bytes: &[u8], size: u64, packs: &[super::entry::Pack]) -> Option<Vec<Chunk>> {
    let chunks: Vec<Chunk> = postcard::from_bytes(bytes).ok()?;
    let mut end = 0;
    for chunk in &chunks {
        let pack = packs.get(chunk.pack as usize)?;
        let fits = chunk.from.checked_add(u64::from(chunk.stored))? <= pack.size
            && chunk.at >= end
            && u64::from(chunk.length) <= MAX_LENGTH
            && chunk.stored <= chunk.length;
        end = chunk.at.checked_add(u64::from(chunk.length))?;
        if !fits || end > size {
            return None;
        }
    }
    Some(chunks)
}

/// Runs blocking work on another thread.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, String> {
    tokio::task::spawn_blocking(work).await.map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use super::super::entry::Pack;
    use super::*;

    fn write(text: &[(u64, &[u8])], length: u64) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(length).unwrap();
        for (at, bytes) in text {
            file.as_file().write_all_at(bytes, *at).unwrap();
        }
        file
    }

    #[test]
    fn holes_have_no_chunks() {
        let file = write(&[(3 * LENGTH + 9, b"x"), (9 * LENGTH, b"y")], 9 * LENGTH + 100);
        let chunks = cut(file.path()).unwrap();
        assert!(chunks.contains(&(3 * LENGTH, LENGTH as u32)), "{chunks:?}");
        assert_eq!(*chunks.last().unwrap(), (9 * LENGTH, 100));
        assert!(chunks.len() <= 4);
        assert!(cut(write(&[], 10 * LENGTH).path()).unwrap().is_empty());
    }

    #[test]
    fn what_is_packed_comes_back() {
        let noise: Vec<u8> = (0..LENGTH as u32)
            .flat_map(|n| blake3::hash(&n.to_le_bytes()).as_bytes()[..1].to_vec())
            .collect();
        let file = write(&[(0, &noise), (LENGTH, &[7; 100])], 3 * LENGTH);
        let chunks = [(0, LENGTH as u32), (LENGTH, LENGTH as u32), (2 * LENGTH, LENGTH as u32)];
        let packed = pack::<()>(file.as_file(), &chunks, &HashMap::new()).unwrap();
        let bytes = packed[0].bytes.as_ref().unwrap();
        assert_eq!(bytes.len(), LENGTH as usize, "noise is stored as it is");
        assert_eq!(unpack(bytes, LENGTH as u32, &packed[0].digest).unwrap(), noise);
        let bytes = packed[1].bytes.as_ref().unwrap();
        assert!(bytes.len() < 200);
        assert_eq!(
            &unpack(bytes, LENGTH as u32, &packed[1].digest).unwrap()[..101],
            [&[7; 100][..], &[0]].concat()
        );
        assert!(packed[2].zero && packed[2].bytes.is_none());
        let known = HashMap::from([(packed[1].digest, ())]);
        assert!(pack(file.as_file(), &chunks, &known).unwrap()[1].bytes.is_none());
        // A changed byte, a missing byte, and a chunk that decompresses to
        // more.
        let mut bad = bytes.clone();
        *bad.last_mut().unwrap() ^= 1;
        assert!(unpack(&bad, LENGTH as u32, &packed[1].digest).is_none());
        assert!(unpack(&bytes[1..], LENGTH as u32, &packed[1].digest).is_none());
        let bomb = zstd::bulk::compress(&vec![0; 64 << 20], 3).unwrap();
        assert!(unpack(&bomb, LENGTH as u32, &packed[1].digest).is_none());
    }

    #[test]
    fn lists_that_reach_outside_are_refused() {
        let packs = [Pack { sha256: "a".into(), size: 1000 }];
        let good = Chunk { at: 0, length: 100, digest: [0; 32], pack: 0, from: 900, stored: 100 };
        let read = |chunks: &[Chunk]| read_list(&write_list(chunks).unwrap(), 200, &packs);
        assert_eq!(read(&[good, Chunk { at: 100, ..good }]).unwrap().len(), 2);
        assert!(read(&[good, Chunk { at: 101, ..good }]).is_none(), "beyond the file");
        assert!(read(&[good, Chunk { at: 99, ..good }]).is_none(), "over another");
        assert!(read(&[Chunk { from: 901, ..good }]).is_none(), "beyond the pack");
        assert!(read(&[Chunk { pack: 1, ..good }]).is_none());
        assert!(read(&[Chunk { from: u64::MAX, ..good }]).is_none());
        assert!(read(&[Chunk { at: u64::MAX, ..good }]).is_none());
        assert!(read(&[Chunk { stored: 101, ..good }]).is_none());
        assert!(read_list(b"\xff\xff\xff", 200, &packs).is_none());
    }
}

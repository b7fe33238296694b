//! The parts of a file that one request reads.

use std::fs::File;
use std::os::unix::fs::FileExt;

use crate::cache::chunk::{self, Chunk};

/// Maximum gap between two chunks of one request, in bytes: a request costs as
/// much as this much data.
const GAP: u64 = 256 << 10;
/// Maximum size of a request, in bytes.
const MAX_RANGE: u64 = 8 << 20;

/// Chunks that are together in a pack: one request.
pub(super) struct Part {
    pub(super) pack: u32,
    pub(super) from: u64,
    pub(super) length: u64,
    pub(super) chunks: Vec<Chunk>,
}

/// Groups chunks into requests.
pub(super) fn group(mut chunks: Vec<Chunk>) -> Vec<Part> {
    chunks.sort_unstable_by_key(|p| (p.pack, p.from, p.at));
    let mut parts: Vec<Part> = Vec::new();
    for chunk in chunks {
        let end = chunk.from + u64::from(chunk.stored);
        match parts.last_mut() {
            Some(part)
                if part.pack == chunk.pack
                    && chunk.from <= part.from + part.length + GAP
                    && end - part.from <= MAX_RANGE =>
            {
                part.length = part.length.max(end - part.from);
                part.chunks.push(chunk);
            }
            _ => parts.push(Part {
                pack: chunk.pack,
                from: chunk.from,
                length: u64::from(chunk.stored),
                chunks: vec![chunk],
            }),
        }
    }
    parts
}

/// Decompresses chunks into their file. Stops and returns `false` at the first
/// damaged chunk.
pub(super) fn write(bytes: &[u8], from: u64, chunks: &[Chunk], file: &File) -> std::io::Result<bool> {
    // The same chunk may be in several places of the file. These are neighbours
    // here.
    let (mut known, mut unpacked) = (None, Vec::new());
    for chunk in chunks {
        let place = (chunk.from, chunk.digest);
        if known != Some(place) {
            let start = (chunk.from - from) as usize;
            let stored = bytes.get(start..start + chunk.stored as usize);
            let found = stored.and_then(|stored| chunk::unpack(stored, chunk.length, &chunk.digest));
            let Some(found) = found else { return Ok(false) };
            (known, unpacked) = (Some(place), found);
        }
        file.write_all_at(&unpacked, chunk.at)?;
    }
    Ok(true)
}

/// Returns the chunks that the file does not have yet.
pub(super) fn missing(file: &File, chunks: Vec<Chunk>) -> Vec<Chunk> {
    let mut buffer = Vec::new();
    let mut lacks = |chunk: &Chunk| {
        buffer.resize(chunk.length as usize, 0);
        file.read_exact_at(&mut buffer, chunk.at).is_err()
            || *blake3::hash(&buffer).as_bytes() != chunk.digest
    };
    chunks.into_iter().filter(|chunk| lacks(chunk)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk(at: u64, pack: u32, from: u64) -> Chunk {
        Chunk { at, length: 10, digest: [0; 32], pack, from, stored: 10 }
    }

    #[test]
    fn neighbours_come_in_one_request() {
        let far = GAP + 100;
        let list =
            vec![chunk(0, 0, 0), chunk(10, 1, 5), chunk(20, 0, 10), chunk(30, 0, 10), chunk(40, 0, 20 + far)];
        let parts: Vec<_> =
            group(list).into_iter().map(|p| (p.pack, p.from, p.length, p.chunks.len())).collect();
        assert_eq!(parts, [(0, 0, 20, 3), (0, 20 + far, 10, 1), (1, 5, 10, 1)]);
    }
}

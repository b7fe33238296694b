//! Headers and tables of a qcow2 file.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

/// The contents of a plain header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// Size of the disk, in bytes.
    pub virtual_size: u64,
}

/// Maximum size of a disk, in bytes.
const MAX_SIZE: u64 = 16 << 40;
/// Incompatible features that are harmless: a compression type other than
/// deflate (bit 3) and extended L2 entries (bit 4). Bit 0 (dirty) and bit 1
/// (corrupt) need a repair, bit 2 is an external data file.
const HARMLESS: u64 = 1 << 3 | 1 << 4;

/// Reads and checks a header. The error says what is wrong with it.
pub fn read(path: &Path) -> Result<Header, String> {
    let mut file = File::open(path).map_err(|e| e.to_string())?;
    let length = file.metadata().map_err(|e| e.to_string())?.len();
    let mut head = [0; 112];
    let mut filled = 0;
    while filled < head.len() {
        match file.read(&mut head[filled..]).map_err(|e| e.to_string())? {
            0 => break,
            n => filled += n,
        }
    }
    if filled < 72 || head[..4] != *b"QFI\xfb" {
        return Err("it is not a qcow2 file".into());
    }
    let header = check(&head, length)?;
    if header.version == 3 {
        extensions(&mut file, be32(&head, 100))?;
    }
    Ok(header)
}

/// Whether a file begins like a qcow2 file.
pub fn is_qcow2(path: &Path) -> bool {
    let mut magic = [0; 4];
    File::open(path).and_then(|mut f| f.read_exact(&mut magic)).is_ok() && magic == *b"QFI\xfb"
}

/// Returns the offsets of compressed clusters in a file, in ascending order.
/// The bytes between two offsets are one compressed cluster, the same wherever
/// it is in the file, followed by zeros where another one was freed. Empty for
/// a file that is not plain qcow2. Reads only tables, whose sizes a plain
/// header limits, and compares their entries with the length of the file.
pub fn compressed_clusters(path: &Path) -> std::io::Result<Vec<u64>> {
    use std::os::unix::fs::FileExt;
    /// Flag of an L1 or L2 entry: the cluster is not shared.
    const COPIED: u64 = 1 << 63;
    const COMPRESSED: u64 = 1 << 62;
    let mut found = Vec::new();
    if read(path).is_err() {
        return Ok(found);
    }
    let file = File::open(path)?;
    let length = file.metadata()?.len();
    let mut head = [0; 72];
    file.read_exact_at(&mut head, 0)?;
    let cluster_bits = be32(&head, 20);
    let cluster = 1_usize << cluster_bits;
    // The offset has 62 bits, minus those that count the sectors.
    let offset_bits = 62 - (cluster_bits - 8);
    // A hostile file may have any numbers here.
    let (at, size) = (be64(&head, 40), u64::from(be32(&head, 36)) * 8);
    if at.saturating_add(size) > length {
        return Ok(found);
    }
    let mut l1 = vec![0; size as usize];
    file.read_exact_at(&mut l1, at)?;
    let mut tables: Vec<u64> = (0..l1.len()).step_by(8).map(|at| be64(&l1, at) & !COPIED).collect();
    tables.sort_unstable();
    tables.dedup();
    let mut table = vec![0; cluster];
    for entry in tables {
        // A cluster takes at least a sector, compressed or not.
        let too_many = found.len() as u64 > length / 512;
        if entry == 0 || too_many || entry.saturating_add(cluster as u64) > length {
            continue;
        }
        file.read_exact_at(&mut table, entry)?;
        let entries = (0..cluster).step_by(8).map(|at| be64(&table, at));
        let compressed = entries.filter(|e| e & COPIED == 0 && e & COMPRESSED != 0);
        found.extend(compressed.map(|e| e & ((1 << offset_bits) - 1)).filter(|at| *at < length));
    }
    found.sort_unstable();
    found.dedup();
    Ok(found)
}

pub(super) fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

pub(super) fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from(be32(bytes, at)) << 32 | u64::from(be32(bytes, at + 4))
}

fn check(head: &[u8; 112], length: u64) -> Result<Header, String> {
    let version = be32(head, 4);
    if !(2..=3).contains(&version) {
        return Err(format!("its version {version} is not supported"));
    }
    if be64(head, 8) != 0 || be32(head, 16) != 0 {
        return Err("it names a backing file; flatten it with `qemu-img convert`".into());
    }
    let cluster_bits = be32(head, 20);
    if !(9..=21).contains(&cluster_bits) {
        return Err(format!("its cluster size of 2^{cluster_bits} is invalid"));
    }
    let virtual_size = be64(head, 24);
    if virtual_size == 0 || virtual_size > MAX_SIZE {
        return Err(format!("its size of {virtual_size} bytes is not between 1 and {MAX_SIZE}"));
    }
    if be32(head, 32) != 0 {
        return Err("it is encrypted".into());
    }
    // An L1 entry is 8 bytes and points to one cluster of L2 entries.
    let per_l1 = u128::from(1_u64 << cluster_bits) * u128::from(1_u64 << (cluster_bits - 3));
    let l1 = u128::from(be32(head, 36));
    if l1 > u128::from(virtual_size).div_ceil(per_l1) * 4 + 64 {
        return Err(format!("its L1 table of {l1} entries is too large for its size"));
    }
    let refcount_clusters = u64::from(be32(head, 56));
    if refcount_clusters << cluster_bits > 64 << 20 {
        return Err("its refcount table is larger than 64 MiB".into());
    }
    for (what, offset) in [("L1 table", be64(head, 40)), ("refcount table", be64(head, 48))] {
        if offset >= length || offset % (1 << cluster_bits) != 0 {
            return Err(format!("its {what} is outside the file, or not aligned"));
        }
    }
    if be32(head, 60) != 0 {
        return Err("it contains internal snapshots; flatten it with `qemu-img convert`".into());
    }
    if version == 3 {
        let incompatible = be64(head, 72);
        if incompatible & 1 << 2 != 0 {
            return Err("it names an external data file".into());
        }
        if incompatible & 0b11 != 0 {
            return Err("it was not closed properly; repair it with `qemu-img check -r all`".into());
        }
        if incompatible & !HARMLESS != 0 {
            return Err(format!("it needs unknown features ({incompatible:#x})"));
        }
        let length = be32(head, 100);
        if !(104..=1024).contains(&length) {
            return Err(format!("its header length of {length} bytes is invalid"));
        }
    }
    Ok(Header { version, virtual_size })
}

/// Refuses header extensions that name files.
fn extensions(file: &mut File, header_length: u32) -> Result<(), String> {
    const END: u32 = 0;
    const BACKING_FORMAT: u32 = 0xE279_2ACA;
    const DATA_FILE: u32 = 0x4441_5441;
    let mut at = u64::from(header_length);
    for _ in 0..64 {
        let mut head = [0; 8];
        file.seek(SeekFrom::Start(at)).and_then(|_| file.read_exact(&mut head)).map_err(|e| e.to_string())?;
        match be32(&head, 0) {
            END => return Ok(()),
            BACKING_FORMAT => return Err("it names the format of a backing file".into()),
            DATA_FILE => return Err("it names an external data file".into()),
            _ => at += 8 + u64::from(be32(&head, 4)).next_multiple_of(8),
        }
        if at > 1 << 21 {
            break;
        }
    }
    Err("its header extensions do not end".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A plain header as `qemu-img create -f qcow2 x 1G` writes it.
    fn plain() -> Vec<u8> {
        let mut h = vec![0; 0x30000];
        h[..4].copy_from_slice(b"QFI\xfb");
        h[4..8].copy_from_slice(&3_u32.to_be_bytes());
        h[20..24].copy_from_slice(&16_u32.to_be_bytes());
        h[24..32].copy_from_slice(&(1_u64 << 30).to_be_bytes());
        h[36..40].copy_from_slice(&2_u32.to_be_bytes());
        h[40..48].copy_from_slice(&0x30000_u64.to_be_bytes());
        h[48..56].copy_from_slice(&0x10000_u64.to_be_bytes());
        h[56..60].copy_from_slice(&1_u32.to_be_bytes());
        h[96..100].copy_from_slice(&4_u32.to_be_bytes());
        h[100..104].copy_from_slice(&112_u32.to_be_bytes());
        h.resize(0x40000, 0);
        h
    }

    fn try_header(change: impl FnOnce(&mut Vec<u8>)) -> Result<Header, String> {
        let mut bytes = plain();
        change(&mut bytes);
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        read(file.path())
    }

    #[test]
    fn plain_headers_pass() {
        assert_eq!(try_header(|_| {}), Ok(Header { version: 3, virtual_size: 1 << 30 }));
        assert!(try_header(|h| h[79] = 1 << 3).is_ok(), "zstd");
    }

    #[test]
    fn everything_that_names_a_file_is_refused() {
        let refused = |change: fn(&mut Vec<u8>), why: &str| {
            let error = try_header(change).unwrap_err();
            assert!(error.contains(why), "{error}");
        };
        refused(|h| h[15] = 1, "backing file");
        refused(|h| h[19] = 9, "backing file");
        refused(|h| h[79] = 1 << 2, "external data file");
        refused(|h| h[112..116].copy_from_slice(&0x4441_5441_u32.to_be_bytes()), "external data file");
        refused(|h| h[112..116].copy_from_slice(&0xE279_2ACA_u32.to_be_bytes()), "backing file");
        refused(|h| h[72] = 1, "unknown features");
        refused(|h| h[79] = 1, "not closed properly");
        refused(|h| h[35] = 1, "encrypted");
        refused(|h| h[63] = 1, "snapshots");
        refused(|h| h[24] = 0xff, "size");
        refused(|h| h[36] = 0xff, "table");
        refused(|h| h[40] = 0xff, "outside");
        refused(|h| h[56] = 0xff, "refcount");
        refused(|h| h[23] = 40, "cluster size");
        refused(|h| h[7] = 9, "version");
        refused(|h| h.truncate(50), "not a qcow2");
        refused(|h| h[0] = 0, "not a qcow2");
    }

    #[test]
    fn no_header_makes_it_panic() {
        use proptest::prelude::*;
        proptest!(|(changes in prop::collection::vec((0_usize..200, any::<u8>()), 0..12))| {
            let _ = try_header(|h| for (at, byte) in changes { h[at] = byte; });
        });
    }
}

//! Reads a disk that is a chain of qcow2 files, without any program of QEMU.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use super::header::{be32, be64, read};

/// Flags of an L2 entry: the cluster is compressed, or reads as zeros.
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;
/// Mask of the offset in an L1 or L2 entry.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Maximum number of L1 entries: enough for 16 TiB in clusters of 64 KiB.
const L1: u64 = 32 << 10;
/// Maximum number of cached L2 tables per file.
const TABLES: usize = 64;
/// The compression type zstd, in byte 104 of the header.
const ZSTD: u8 = 1;

/// A disk.
pub struct Chain {
    /// Its files, the lowest first.
    files: Vec<Qcow2>,
    size: u64,
}

/// One file of a chain.
pub(super) struct Qcow2 {
    file: File,
    pub(super) size: u64,
    /// The size of a cluster, as a power of two.
    pub(super) bits: u32,
    /// Whether clusters are compressed with zstd.
    pub(super) zstd: bool,
    l1: Vec<u64>,
    /// Cached L2 tables, by index in L1.
    l2: BTreeMap<u64, Arc<[u8]>>,
}

/// The place of a cluster.
pub(super) enum Cluster {
    /// In the file below.
    Below,
    Zero,
    At(u64),
    Compressed {
        at: u64,
        most: usize,
    },
}

pub(super) fn odd(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

impl Chain {
    /// Opens a chain, given with the lowest file first.
    ///
    /// # Errors
    ///
    /// Errors of the system, and what is wrong with a file.
    pub fn open(paths: &[impl AsRef<Path>]) -> io::Result<Self> {
        let files: Vec<Qcow2> =
            paths.iter().map(|path| Qcow2::open(path.as_ref())).collect::<Result<_, _>>()?;
        let size = files.last().ok_or_else(|| odd("there is no disk"))?.size;
        Ok(Self { files, size })
    }

    /// Returns the disk's size, in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Fills the buffer from offset `at`.
    ///
    /// # Errors
    ///
    /// Errors of the system, and what is wrong with a file.
    pub fn read_at(&mut self, at: u64, buffer: &mut [u8]) -> io::Result<()> {
        if at.checked_add(buffer.len() as u64).is_none_or(|end| end > self.size) {
            return Err(odd("beyond the end of the disk"));
        }
        read_from(&mut self.files, at, buffer)
    }

    /// Whether `length` bytes at `at` are not stored, so that they read as
    /// zeros. If it is `false`, they may be zeros all the same.
    pub(super) fn is_clear(&mut self, at: u64, length: u64) -> io::Result<bool> {
        for file in self.files.iter_mut().rev() {
            if at >> file.bits != (at + length - 1) >> file.bits {
                return Ok(false);
            }
            match file.cluster(at >> file.bits)? {
                Cluster::Below => {}
                Cluster::Zero => return Ok(true),
                Cluster::At(_) | Cluster::Compressed { .. } => return Ok(false),
            }
        }
        Ok(true)
    }

    /// Returns the ranges that the files from index `from` on have written, in
    /// ascending order.
    ///
    /// # Errors
    ///
    /// As for [`Self::read_at`].
    pub fn written(&mut self, from: usize) -> io::Result<Vec<Range<u64>>> {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for file in self.files.iter_mut().skip(from) {
            file.written(&mut ranges)?;
        }
        Ok(join(ranges))
    }
}

/// Sorts ranges, and joins those that overlap or touch.
pub fn join(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.sort_by_key(|range| range.start);
    let mut joined: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match joined.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    joined
}

fn read_from(files: &mut [Qcow2], mut at: u64, mut buffer: &mut [u8]) -> io::Result<()> {
    let Some((top, below)) = files.split_last_mut() else {
        buffer.fill(0);
        return Ok(());
    };
    while !buffer.is_empty() {
        let size = 1_u64 << top.bits;
        let inside = at % size;
        let length = (size - inside).min(buffer.len() as u64) as usize;
        let (piece, rest) = buffer.split_at_mut(length);
        match top.cluster(at >> top.bits)? {
            Cluster::Below => read_from(below, at, piece)?,
            Cluster::Zero => piece.fill(0),
            Cluster::At(offset) => top.file.read_exact_at(piece, offset + inside)?,
            Cluster::Compressed { at, most } => {
                let cluster = top.unpack(at, most)?;
                piece.copy_from_slice(&cluster[inside as usize..inside as usize + length]);
            }
        }
        at += length as u64;
        buffer = rest;
    }
    Ok(())
}

impl Qcow2 {
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let header = read(path).map_err(|why| odd(&why))?;
        let file = File::open(path)?;
        let mut head = [0; 112];
        file.read_exact_at(&mut head[..72], 0)?;
        if header.version == 3 {
            file.read_exact_at(&mut head[72..], 72)?;
        }
        // Extended L2 entries also describe parts of a cluster.
        if be64(&head, 72) & 1 << 4 != 0 {
            return Err(odd("it has extended L2 entries"));
        }
        let entries = u64::from(be32(&head, 36));
        if entries > L1 {
            return Err(odd("its L1 table is too large"));
        }
        let mut l1 = vec![0; entries as usize * 8];
        file.read_exact_at(&mut l1, be64(&head, 40))?;
        Ok(Self {
            file,
            size: header.virtual_size,
            bits: be32(&head, 20),
            zstd: be32(&head, 100) > 104 && head[104] == ZSTD,
            l1: (0..l1.len()).step_by(8).map(|at| be64(&l1, at) & OFFSET).collect(),
            l2: BTreeMap::new(),
        })
    }

    /// Returns the L2 table at an index of L1; `None` if nothing was written
    /// there.
    pub(super) fn table(&mut self, index: u64) -> io::Result<Option<Arc<[u8]>>> {
        let at = usize::try_from(index).ok().and_then(|n| self.l1.get(n)).copied().unwrap_or(0);
        if at == 0 {
            return Ok(None);
        }
        if let Some(table) = self.l2.get(&index) {
            return Ok(Some(table.clone()));
        }
        let mut table = vec![0; 1 << self.bits];
        self.file.read_exact_at(&mut table, at)?;
        if self.l2.len() >= TABLES {
            self.l2.clear();
        }
        let table: Arc<[u8]> = table.into();
        self.l2.insert(index, table.clone());
        Ok(Some(table))
    }

    pub(super) fn cluster(&mut self, number: u64) -> io::Result<Cluster> {
        let per_table = self.bits - 3;
        let Some(table) = self.table(number >> per_table)? else { return Ok(Cluster::Below) };
        let entry = be64(&table, (number & ((1 << per_table) - 1)) as usize * 8);
        if entry & COMPRESSED != 0 {
            let bits = 62 - (self.bits - 8);
            let at = entry & ((1 << bits) - 1);
            // It ends at the end of its last sector.
            let sectors = (entry & (COMPRESSED - 1)) >> bits;
            let most = (sectors + 1) * 512 - at % 512;
            return Ok(Cluster::Compressed { at, most: most as usize });
        }
        Ok(match entry & OFFSET {
            _ if entry & ZERO != 0 => Cluster::Zero,
            0 => Cluster::Below,
            at => Cluster::At(at),
        })
    }

    /// Reads the sectors of a compressed cluster.
    fn packed(&self, at: u64, most: usize) -> io::Result<Vec<u8>> {
        let mut packed = vec![0; most];
        // The file may end before the sector does.
        let mut filled = 0;
        while filled < packed.len() {
            match self.file.read_at(&mut packed[filled..], at + filled as u64)? {
                0 => break,
                n => filled += n,
            }
        }
        packed.truncate(filled);
        Ok(packed)
    }

    fn unpack(&self, at: u64, most: usize) -> io::Result<Vec<u8>> {
        if !self.zstd {
            return Err(odd("its compression is not zstd"));
        }
        let packed = self.packed(at, most)?;
        let mut cluster = vec![0; 1 << self.bits];
        zstd::Decoder::with_buffer(packed.as_slice())?.single_frame().read_exact(&mut cluster)?;
        Ok(cluster)
    }

    fn written(&mut self, ranges: &mut Vec<Range<u64>>) -> io::Result<()> {
        let per_table = 1_u64 << (self.bits - 3);
        for index in 0..self.l1.len() as u64 {
            let Some(table) = self.table(index)? else { continue };
            for n in
                (0..per_table).filter(|n| be64(&table, *n as usize * 8) & (OFFSET | COMPRESSED | ZERO) != 0)
            {
                let start = (index * per_table + n) << self.bits;
                match ranges.last_mut() {
                    Some(last) if last.end == start => last.end = start + (1 << self.bits),
                    _ => ranges.push(start..start + (1 << self.bits)),
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    /// Runs a program of QEMU.
    fn qemu(args: &[&str], dir: &Path) {
        let (program, args) = args.split_first().unwrap();
        let output = Command::new(program).args(args).current_dir(dir).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    #[test]
    fn it_reads_what_qemu_wrote() {
        let dir = tempfile::tempdir().unwrap();
        let raw: Vec<u8> = (0..3_u32 << 20).map(|n| if n % 70_000 < 9 { n as u8 } else { 7 }).collect();
        std::fs::write(dir.path().join("raw"), &raw).unwrap();
        let packed = "qemu-img convert -c -O qcow2 -o compression_type=zstd raw base.qcow2";
        qemu(&packed.split(' ').collect::<Vec<_>>(), dir.path());
        qemu(&["qemu-img", "create", "-q", "-f", "qcow2", "top.qcow2", "3M"], dir.path());
        let write = ["-c", "write -P 9 100k 5k", "-c", "write -z 1M 128k", "top.qcow2"];
        qemu(&[["qemu-io", "-f", "qcow2"].as_slice(), &write].concat(), dir.path());
        let mut chain = Chain::open(&["base.qcow2", "top.qcow2"].map(|name| dir.path().join(name))).unwrap();
        let mut wanted = raw;
        // The rest of a cluster that the top has written is zeros, because its
        // file names no backing file.
        wanted[64 << 10..128 << 10].fill(0);
        wanted[100 << 10..105 << 10].fill(9);
        wanted[1 << 20..(1 << 20) + (128 << 10)].fill(0);
        let mut read = vec![0; 3 << 20];
        chain.read_at(0, &mut read).unwrap();
        assert!(read == wanted);
        let mut some = vec![0; 70_001];
        chain.read_at(60_007, &mut some).unwrap();
        assert!(some == wanted[60_007..130_008]);
        assert_eq!(chain.written(1).unwrap(), [64 << 10..128 << 10, 1 << 20..(1 << 20) + (128 << 10)]);
        assert_eq!(chain.written(0).unwrap(), vec![Range { start: 0, end: 3 << 20 }]);
        assert!(chain.read_at(3 << 20, &mut some[..1]).is_err());
    }

    #[test]
    fn ranges_are_joined() {
        assert_eq!(join(vec![5..7, 0..2, 6..9, 2..3]), [0..3, 5..9]);
    }
}

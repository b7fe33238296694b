//! Writes a disk as one compressed qcow2 file, and takes over what an earlier
//! one holds of it: what did not change is neither unpacked nor packed again.
//! Format: QEMU's `docs/interop/qcow2.txt`.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufWriter, Seek, Write};
use std::ops::Range;
use std::path::Path;

use super::chain::{Chain, Cluster, Qcow2, odd};

/// The size of a cluster, as a power of two: QEMU's default.
const BITS: u32 = 16;
const CLUSTER: u64 = 1 << BITS;
/// Entries of a table in one cluster, and counts of references in one.
const ENTRIES: u64 = CLUSTER / 8;
const COUNTS: u64 = CLUSTER / 2;
/// Bits of an entry: nothing else refers to it, and it is compressed.
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
/// Below these bits of an entry of a compressed cluster its place begins.
const PLACE: u32 = 62 - (BITS - 8);
/// What a header is, in bytes, and its bit for another compression than
/// deflate, which is then zstd.
const HEADER: u32 = 112;
const OTHER_COMPRESSION: u64 = 1 << 3;

/// The most that is packed beside what is taken over, in bytes.
const MOST_NEW: u64 = 256 << 20;

/// A file that was written before.
pub struct Earlier<'a> {
    /// It.
    pub file: &'a Path,
    /// Where the disk may hold something else by now.
    pub changed: &'a [Range<u64>],
}

/// Writes `disk` to a new file.
///
/// # Errors
///
/// What the system says, what of the earlier file makes no sense, and that too
/// little of it is of use.
pub fn pack(disk: &mut Chain, earlier: &Earlier<'_>, to: &Path) -> io::Result<()> {
    let mut old = Qcow2::open(earlier.file)?;
    if (old.size, old.bits, old.zstd) != (disk.size(), BITS, true) {
        return Err(odd("the earlier file is of another kind"));
    }
    let mut packer = Packer::new(File::create_new(to)?)?;
    let mut compressor = zstd::bulk::Compressor::new(zstd::DEFAULT_COMPRESSION_LEVEL)?;
    let mut changed = earlier.changed.iter().peekable();
    let mut left = MOST_NEW;
    for number in 0..disk.size().div_ceil(CLUSTER) {
        let start = number << BITS;
        while changed.next_if(|range| range.end <= start).is_some() {}
        if changed.peek().is_some_and(|range| range.start < start + CLUSTER) {
            let length = CLUSTER.min(disk.size() - start);
            if disk.is_clear(start, length)? {
                continue;
            }
            let mut cluster = vec![0; CLUSTER as usize];
            disk.read_at(start, &mut cluster[..length as usize])?;
            if cluster.iter().any(|byte| *byte != 0) {
                // Many processors pack faster than one.
                left = left.checked_sub(CLUSTER).ok_or_else(|| odd("too much of it is new"))?;
                match compressor.compress(&cluster)? {
                    packed if packed.len() < cluster.len() => packer.compressed(number, &packed)?,
                    _ => packer.plain(number, &cluster)?,
                }
            }
            continue;
        }
        match old.cluster(number)? {
            Cluster::Below | Cluster::Zero => {}
            Cluster::At(at) => {
                let mut cluster = vec![0; CLUSTER as usize];
                old.read_plain(at, &mut cluster)?;
                packer.plain(number, &cluster)?;
            }
            Cluster::Compressed { at, most } => {
                let packed = old.packed(at, most)?;
                // What follows in the last sector belongs to others.
                let length = zstd::zstd_safe::find_frame_compressed_size(&packed)
                    .map_err(|_| odd("a compressed cluster is damaged"))?;
                if length as u64 > CLUSTER {
                    return Err(odd("a compressed cluster is too long"));
                }
                packer.compressed(number, &packed[..length])?;
            }
        }
    }
    packer.finish(disk.size())
}

/// A file that grows.
struct Packer {
    file: BufWriter<File>,
    /// Its end, in bytes.
    end: u64,
    /// How many refer to each of its clusters.
    counts: Vec<u16>,
    /// The tables that have entries, by their place.
    tables: BTreeMap<u64, Box<[u64]>>,
}

impl Packer {
    fn new(file: File) -> io::Result<Self> {
        let mut file = BufWriter::with_capacity(1 << 20, file);
        file.write_all(&[0; CLUSTER as usize])?;
        Ok(Self { file, end: CLUSTER, counts: vec![1], tables: BTreeMap::new() })
    }

    /// Fills up to the end of a cluster.
    fn align(&mut self) -> io::Result<()> {
        let gap = self.end.next_multiple_of(CLUSTER) - self.end;
        self.file.write_all(&vec![0; gap as usize])?;
        self.end += gap;
        Ok(())
    }

    /// Writes at the end; says where that is.
    fn write(&mut self, bytes: &[u8]) -> io::Result<u64> {
        let at = self.end;
        self.file.write_all(bytes)?;
        self.end += bytes.len() as u64;
        self.counts.resize(self.end.div_ceil(CLUSTER) as usize, 0);
        for cluster in at >> BITS..self.end.div_ceil(CLUSTER) {
            let count = &mut self.counts[cluster as usize];
            *count = count.checked_add(1).ok_or_else(|| odd("too much is in one cluster"))?;
        }
        Ok(at)
    }

    fn enter(&mut self, number: u64, entry: u64) {
        let table = self
            .tables
            .entry(number / ENTRIES)
            .or_insert_with(|| vec![0; ENTRIES as usize].into_boxed_slice());
        table[(number % ENTRIES) as usize] = entry;
    }

    fn plain(&mut self, number: u64, cluster: &[u8]) -> io::Result<()> {
        self.align()?;
        let at = self.write(cluster)?;
        self.enter(number, at | COPIED);
        Ok(())
    }

    fn compressed(&mut self, number: u64, packed: &[u8]) -> io::Result<()> {
        let at = self.write(packed)?;
        // How many sectors it goes on for after its first.
        let sectors = (self.end - 1) / 512 - at / 512;
        self.enter(number, at | sectors << PLACE | COMPRESSED);
        Ok(())
    }

    /// Writes whole clusters of big-endian numbers.
    fn table(&mut self, entries: &[u64]) -> io::Result<u64> {
        let mut bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        bytes.resize(bytes.len().next_multiple_of(CLUSTER as usize).max(CLUSTER as usize), 0);
        self.write(&bytes)
    }

    fn finish(mut self, size: u64) -> io::Result<()> {
        self.align()?;
        let mut l1 = vec![0; size.div_ceil(CLUSTER * ENTRIES) as usize];
        for (index, table) in std::mem::take(&mut self.tables) {
            l1[index as usize] = self.table(&table)? | COPIED;
        }
        let l1_at = self.table(&l1)?;
        // The counts count themselves and their table.
        let (mut blocks, mut tables) = (0, 0);
        loop {
            let all = self.end / CLUSTER + blocks + tables;
            let enough = (all.div_ceil(COUNTS), all.div_ceil(COUNTS).div_ceil(ENTRIES));
            if enough == (blocks, tables) {
                break;
            }
            (blocks, tables) = enough;
        }
        let counts_at = self.end;
        let table_at = counts_at + blocks * CLUSTER;
        self.counts.resize(((table_at >> BITS) + tables) as usize, 1);
        let mut counts: Vec<u8> = self.counts.iter().flat_map(|count| count.to_be_bytes()).collect();
        counts.resize((blocks * CLUSTER) as usize, 0);
        self.file.write_all(&counts)?;
        let entries: Vec<u8> = (0..tables * ENTRIES)
            .map(|n| if n < blocks { counts_at + n * CLUSTER } else { 0 })
            .flat_map(u64::to_be_bytes)
            .collect();
        self.file.write_all(&entries)?;

        let mut header = Vec::new();
        header.extend(b"QFI\xfb");
        header.extend(3_u32.to_be_bytes());
        header.extend([0; 12]);
        header.extend(BITS.to_be_bytes());
        header.extend(size.to_be_bytes());
        header.extend(0_u32.to_be_bytes());
        header.extend((l1.len() as u32).to_be_bytes());
        header.extend(l1_at.to_be_bytes());
        header.extend(table_at.to_be_bytes());
        header.extend((tables as u32).to_be_bytes());
        header.extend([0; 12]);
        header.extend(OTHER_COMPRESSION.to_be_bytes());
        header.extend([0; 16]);
        // Counts of 16 bits.
        header.extend(4_u32.to_be_bytes());
        header.extend(HEADER.to_be_bytes());
        header.push(1);
        header.resize(HEADER as usize, 0);
        self.file.rewind()?;
        self.file.write_all(&header)?;
        self.file.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    fn qemu(dir: &Path, line: &str) -> String {
        let mut words = line.split(' ');
        let output = Command::new(words.next().unwrap()).args(words).current_dir(dir).output().unwrap();
        let said = |bytes| String::from_utf8_lossy(bytes).into_owned();
        assert!(output.status.success(), "{line}: {}{}", said(&output.stdout), said(&output.stderr));
        said(&output.stdout)
    }

    /// Bytes that can't be compressed, and bytes that can.
    fn content() -> Vec<u8> {
        let mut state = 1_u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) as u8
        };
        let mut bytes: Vec<u8> = (0..3 << 20).map(|n: u32| if n % 7000 < 9 { n as u8 } else { 7 }).collect();
        bytes.iter_mut().skip(1 << 20).take(300_000).for_each(|byte| *byte = next());
        bytes[2 << 20..(2 << 20) + 500_000].fill(0);
        // No whole number of clusters.
        bytes.truncate((3 << 20) - 512);
        bytes
    }

    #[test]
    fn what_is_taken_over_is_what_would_be_packed() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        std::fs::write(dir.join("raw"), content()).unwrap();
        qemu(dir, "qemu-img convert -O qcow2 raw base");
        qemu(dir, "qemu-img convert -c -W -O qcow2 -o compression_type=zstd raw first");
        qemu(dir, "qemu-img create -q -f qcow2 top 3145216");
        for write in
            ["write -P 9 100k 70k", "write -z 1M 128k", "write -P 0 2M 64k", "write -P 5 3145000 216"]
        {
            let args = ["-f", "qcow2", "-c", write, "top"];
            assert!(Command::new("qemu-io").args(args).current_dir(dir).output().unwrap().status.success());
        }
        let mut disk = Chain::open(&[dir.join("base"), dir.join("top")]).unwrap();
        let changed = disk.written(1).unwrap();
        let earlier = Earlier { file: &dir.join("first"), changed: &changed };
        pack(&mut disk, &earlier, &dir.join("second")).unwrap();
        qemu(dir, "qemu-img rebase -u -F qcow2 -b base top");
        assert!(qemu(dir, "qemu-img compare -f qcow2 -F qcow2 second top").contains("identical"));
        assert!(qemu(dir, "qemu-img check -f qcow2 second").contains("No errors"));
        let size = |name: &str| std::fs::metadata(dir.join(name)).unwrap().len();
        assert!(size("second") < size("first") + 200_000, "{} after {}", size("second"), size("first"));

        // One that was written here is as good, and what did not change is
        // written as it was.
        let earlier = Earlier { file: &dir.join("second"), changed: &[] };
        pack(&mut disk, &earlier, &dir.join("third")).unwrap();
        let read = |name: &str| std::fs::read(dir.join(name)).unwrap();
        assert!(read("third") == read("second"));
    }

    #[test]
    fn what_makes_no_sense_is_not_taken_over() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        std::fs::write(dir.join("raw"), content()).unwrap();
        qemu(dir, "qemu-img convert -O qcow2 raw base");
        let mut disk = Chain::open(&[dir.join("base")]).unwrap();
        let pack = |disk: &mut Chain, name: &str| {
            let _ = std::fs::remove_file(dir.join("to"));
            pack(disk, &Earlier { file: &dir.join(name), changed: &[] }, &dir.join("to"))
        };
        for (name, options) in [("deflate", ""), ("large", "-o compression_type=zstd,cluster_size=128k ")] {
            qemu(dir, &format!("qemu-img convert -c -O qcow2 {options}raw {name}"));
            assert_eq!(pack(&mut disk, name).unwrap_err().to_string(), "the earlier file is of another kind");
        }
        qemu(dir, "qemu-img convert -c -O qcow2 -o compression_type=zstd raw first");
        let good = std::fs::read(dir.join("first")).unwrap();
        for n in 0..400 {
            let mut bad = good.clone();
            let at = n * 7919 % bad.len();
            bad[at] ^= 1 << (n % 8);
            std::fs::write(dir.join("bad"), bad).unwrap();
            // It may be noticed or not, and ends.
            let _ = pack(&mut disk, "bad");
        }
    }
}

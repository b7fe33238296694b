//! Changes a compressed qcow2 file so that it holds another disk. Only the
//! blocks in which the disks differ are compressed; the rest stays as it is.
//! Format: QEMU's `docs/interop/qcow2.txt`.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::chain::{Chain, Cluster, Qcow2, odd};
use super::header::{be32, be64};

/// The size of a cluster, as a power of two: QEMU's default.
const BITS: u32 = 16;
const CLUSTER: u64 = 1 << BITS;
/// Table entries in one cluster, and reference counts in one cluster.
const ENTRIES: u64 = CLUSTER / 8;
const COUNTS: u64 = CLUSTER / 2;
/// The width of a reference count in bits, as a power of two.
const COUNT: u32 = 4;
/// Flags of an entry: nothing else refers to the cluster, and it is compressed.
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
/// In the entry of a compressed cluster, the place is below this bit.
const PLACE: u32 = 62 - (BITS - 8);
/// Mask of the offset in an L1 or refcount table entry.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const SECTOR: u64 = 512;

/// Maximum amount of new data, in bytes of the disk. Beyond that a conversion
/// is faster, because it uses all CPUs.
const MOST_NEW: u64 = 256 << 20;
/// Limit of unused space: one byte in so many of the file, and the bytes that
/// are allowed in any case.
const MOST_CLEAR: u64 = 4;
const SOME_CLEAR: u64 = 1 << 20;

/// The writes that change a file so that it holds another disk.
pub struct Revision {
    /// Offsets and bytes, in the order of writing.
    writes: Vec<(u64, Vec<u8>)>,
    length: u64,
}

impl Revision {
    /// Computes how to change `file` so that it holds `disk`, which may differ
    /// from its contents in `changed` (ascending).
    ///
    /// # Errors
    ///
    /// Errors of the system, a file that vimg can't change, and changes so
    /// large that a conversion is better.
    pub fn of(file: &Path, disk: &mut Chain, changed: &[Range<u64>]) -> io::Result<Self> {
        let mut old = Layout::read(file, disk.size())?;
        let (keep, go): (Vec<_>, Vec<_>) = old
            .clusters
            .drain(..)
            .partition(|one| !touches(changed, one.number << BITS..(one.number + 1) << BITS));
        old.taken.extend(keep.into_iter().map(|one| one.place));
        if go.iter().map(|one| one.place.end - one.place.start).sum::<u64>() > MOST_NEW {
            return Err(odd("too many clusters changed"));
        }
        let mut draft = Draft {
            free: gaps(&mut old.taken, old.end),
            end: old.end,
            taken: Vec::new(),
            tables: BTreeMap::new(),
            // Old data must not stay in the file, so it is overwritten.
            writes: go.iter().map(|one| (one.place.start, vec![0; one.length()])).collect(),
        };
        for one in go {
            draft.enter(&mut old, one.number, 0)?;
        }
        draft.pack(&mut old, disk, changed)?;
        draft.finish(old)
    }

    /// Changes a copy of the file.
    ///
    /// # Errors
    ///
    /// Errors of the system.
    pub fn make(&self, copy: &File) -> io::Result<()> {
        copy.set_len(self.length)?;
        self.writes.iter().try_for_each(|(at, bytes)| copy.write_all_at(bytes, *at))
    }
}

/// Whether one of the ranges, ascending and disjoint, overlaps `range`.
fn touches(ranges: &[Range<u64>], range: Range<u64>) -> bool {
    let next = ranges.partition_point(|one| one.end <= range.start);
    ranges.get(next).is_some_and(|one| one.start < range.end)
}

/// Returns the gaps between extents, up to `end`. Sorts the extents.
fn gaps(extents: &mut [Range<u64>], end: u64) -> Vec<Range<u64>> {
    extents.sort_by_key(|extent| extent.start);
    let ends = std::iter::once(0).chain(extents.iter().map(|extent| extent.end));
    let starts = extents.iter().map(|extent| extent.start).chain([end]);
    ends.zip(starts).filter(|(from, to)| from < to).map(|(from, to)| from..to).collect()
}

/// A cluster of the disk that is stored in the file.
struct Stored {
    number: u64,
    place: Range<u64>,
    compressed: bool,
}

impl Stored {
    fn length(&self) -> usize {
        (self.place.end - self.place.start) as usize
    }
}

/// The layout of a file.
struct Layout {
    file: Qcow2,
    clusters: Vec<Stored>,
    /// All other ranges that are in use.
    taken: Vec<Range<u64>>,
    /// The file's end, a multiple of a cluster.
    end: u64,
    l1_at: u64,
    l1: Vec<u64>,
    /// Offsets of the refcount blocks, in order.
    counts: Vec<u64>,
}

impl Layout {
    fn read(path: &Path, size: u64) -> io::Result<Self> {
        let mut qcow2 = Qcow2::open(path)?;
        let file = File::open(path)?;
        let length = file.metadata()?.len();
        let mut head = [0; 112];
        file.read_exact_at(&mut head, 0)?;
        // Unknown autoclear features may use clusters, too.
        let plain = be32(&head, 96) == COUNT && be64(&head, 88) == 0;
        // An output may be larger than the disk that it holds.
        if qcow2.size < size || (qcow2.bits, qcow2.zstd) != (BITS, true) || !plain {
            return Err(odd("the previous file has another format"));
        }
        let end = length.next_multiple_of(CLUSTER);
        let within = |at: u64, length: u64| match at.checked_add(length) {
            Some(last) if at >= CLUSTER && last <= end => Ok(at..last),
            _ => Err(odd("a cluster is outside the file")),
        };
        let whole = |at: u64, length: u64| match at % CLUSTER {
            0 => within(at, length),
            _ => Err(odd("a cluster is not aligned")),
        };
        let table = |at: u64, entries: u64| -> io::Result<(Range<u64>, Vec<u64>)> {
            let place = whole(at, (entries * 8).next_multiple_of(CLUSTER))?;
            let mut bytes = vec![0; entries as usize * 8];
            file.read_exact_at(&mut bytes, at)?;
            Ok((place, (0..bytes.len()).step_by(8).map(|at| be64(&bytes, at) & OFFSET).collect()))
        };
        let l1_at = be64(&head, 40);
        let (l1_place, l1) = table(l1_at, u64::from(be32(&head, 36)))?;
        let (counts_place, counts) = table(be64(&head, 48), u64::from(be32(&head, 56)) * ENTRIES)?;
        let mut taken = vec![0..CLUSTER, l1_place, counts_place];
        for at in l1.iter().chain(&counts).filter(|at| **at != 0) {
            taken.push(whole(*at, CLUSTER)?);
        }
        let mut clusters = Vec::new();
        for index in (0..l1.len()).filter(|index| l1[*index] != 0) {
            let first = index as u64 * ENTRIES;
            for number in first..(first + ENTRIES).min(size.div_ceil(CLUSTER)) {
                let (place, compressed) = match qcow2.cluster(number)? {
                    Cluster::Below => continue,
                    Cluster::At(at) => (whole(at, CLUSTER)?, false),
                    Cluster::Compressed { at, most } => (within(at, most as u64)?, true),
                    Cluster::Zero => return Err(odd("the previous file has another format")),
                };
                clusters.push(Stored { number, place, compressed });
            }
        }
        let mut layout = Self { file: qcow2, clusters, taken, end, l1_at, l1, counts };
        layout.part()?;
        Ok(layout)
    }

    /// Cuts compressed clusters where the next one begins: their entries count
    /// whole sectors, and the next cluster may begin in the last one.
    fn part(&mut self) -> io::Result<()> {
        let clusters = self.clusters.iter_mut().map(|one| (&mut one.place, one.compressed));
        let mut all: Vec<(&mut Range<u64>, bool)> =
            self.taken.iter_mut().map(|place| (place, false)).chain(clusters).collect();
        all.sort_by_key(|(place, _)| place.start);
        for n in 1..all.len() {
            let start = all[n].0.start;
            let (before, compressed) = &mut all[n - 1];
            if before.end > start {
                if !*compressed || before.end - start >= SECTOR || before.start == start {
                    return Err(odd("two clusters overlap"));
                }
                before.end = start;
            }
        }
        Ok(())
    }
}

/// A revision in progress.
struct Draft {
    /// Free ranges, in ascending order.
    free: Vec<Range<u64>>,
    end: u64,
    /// Newly used ranges.
    taken: Vec<Range<u64>>,
    /// Changed L2 tables, by index in L1.
    tables: BTreeMap<u64, Box<[u64]>>,
    writes: Vec<(u64, Vec<u8>)>,
}

impl Draft {
    /// Allocates `length` bytes at a multiple of `step`.
    fn take(&mut self, length: u64, step: u64) -> u64 {
        let fits = |gap: &Range<u64>| gap.start.next_multiple_of(step) + length <= gap.end;
        let at = match self.free.iter().position(fits) {
            Some(n) => {
                let gap = self.free.remove(n);
                let at = gap.start.next_multiple_of(step);
                let rest = [gap.start..at, at + length..gap.end];
                self.free.splice(n..n, rest.into_iter().filter(|part| !part.is_empty()));
                at
            }
            None => {
                let at = self.end.next_multiple_of(step);
                if self.end < at {
                    self.free.push(self.end..at);
                }
                self.end = at + length;
                at
            }
        };
        self.taken.push(at..at + length);
        at
    }

    fn enter(&mut self, old: &mut Layout, number: u64, entry: u64) -> io::Result<()> {
        let index = number / ENTRIES;
        let table = match self.tables.entry(index) {
            std::collections::btree_map::Entry::Occupied(table) => table.into_mut(),
            std::collections::btree_map::Entry::Vacant(place) => {
                let entries = match old.file.table(index)? {
                    Some(bytes) => (0..bytes.len()).step_by(8).map(|at| be64(&bytes, at)).collect(),
                    None if entry == 0 => return Ok(()),
                    None => vec![0; ENTRIES as usize].into_boxed_slice(),
                };
                place.insert(entries)
            }
        };
        table[(number % ENTRIES) as usize] = entry;
        Ok(())
    }

    /// Compresses and allocates the clusters that may have changed.
    fn pack(&mut self, old: &mut Layout, disk: &mut Chain, changed: &[Range<u64>]) -> io::Result<()> {
        let mut compressor = zstd::bulk::Compressor::new(zstd::DEFAULT_COMPRESSION_LEVEL)?;
        let mut left = MOST_NEW;
        let mut next = 0;
        for range in changed {
            let last = range.end.min(disk.size()).div_ceil(CLUSTER);
            for number in next.max(range.start >> BITS)..last {
                let start = number << BITS;
                let length = CLUSTER.min(disk.size() - start);
                if disk.is_clear(start, length)? {
                    continue;
                }
                let mut cluster = vec![0; CLUSTER as usize];
                disk.read_at(start, &mut cluster[..length as usize])?;
                if cluster.iter().all(|byte| *byte == 0) {
                    continue;
                }
                left = left.checked_sub(CLUSTER).ok_or_else(|| odd("too many clusters changed"))?;
                let (at, entry, bytes) = match compressor.compress(&cluster)? {
                    packed if packed.len() < cluster.len() => {
                        let at = self.take(packed.len() as u64, 1);
                        // The number of sectors after the first.
                        let sectors = (at + packed.len() as u64 - 1) / SECTOR - at / SECTOR;
                        (at, at | sectors << PLACE | COMPRESSED, packed)
                    }
                    _ => {
                        let at = self.take(CLUSTER, CLUSTER);
                        (at, at | COPIED, cluster)
                    }
                };
                self.enter(old, number, entry)?;
                self.writes.push((at, bytes));
            }
            next = next.max(last);
        }
        Ok(())
    }

    /// Writes the tables and the reference counts.
    fn finish(mut self, mut old: Layout) -> io::Result<Revision> {
        for (index, table) in std::mem::take(&mut self.tables) {
            let known =
                old.l1.get(index as usize).copied().ok_or_else(|| odd("the L1 table is too small"))?;
            let at = if known == 0 { self.take(CLUSTER, CLUSTER) } else { known };
            old.l1[index as usize] = at;
            self.writes.push((at, table.iter().flat_map(|entry| entry.to_be_bytes()).collect()));
        }
        let copied = |at: &u64| if *at == 0 { 0 } else { at | COPIED };
        self.writes.push((old.l1_at, old.l1.iter().map(copied).flat_map(u64::to_be_bytes).collect()));
        let end = self.end.next_multiple_of(CLUSTER);
        let clear: u64 = self.free.iter().map(|gap| gap.end - gap.start).sum();
        if clear > SOME_CLEAR.max(end / MOST_CLEAR) {
            return Err(odd("the file has too much unused space"));
        }
        let mut counts = vec![0_u16; (end >> BITS) as usize];
        for extent in old.taken.iter().chain(&self.taken) {
            for cluster in extent.start >> BITS..extent.end.div_ceil(CLUSTER) {
                let count = &mut counts[cluster as usize];
                *count = count.checked_add(1).ok_or_else(|| odd("a reference count overflows"))?;
            }
        }
        for (n, block) in counts.chunks(COUNTS as usize).enumerate() {
            let at = old.counts.get(n).copied().filter(|at| *at != 0);
            let at = at.ok_or_else(|| odd("the refcount table is too small"))?;
            let mut bytes: Vec<u8> = block.iter().flat_map(|count| count.to_be_bytes()).collect();
            bytes.resize(CLUSTER as usize, 0);
            self.writes.push((at, bytes));
        }
        Ok(Revision { writes: self.writes, length: end })
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
        // Not a whole number of clusters.
        bytes.truncate((3 << 20) - 512);
        bytes
    }

    /// Revises a file so that it holds `disk`.
    fn revised(dir: &Path, name: &str, disk: &mut Chain, from: usize) -> io::Result<()> {
        let changed = disk.written(from)?;
        let revision = Revision::of(&dir.join(name), disk, &changed)?;
        revision.make(&File::options().write(true).open(dir.join(name))?)
    }

    fn write(dir: &Path, name: &str, write: &str) {
        let args = ["-f", "qcow2", "-c", write, name];
        let output = Command::new("qemu-io").args(args).current_dir(dir).output().unwrap();
        assert!(output.status.success(), "{write}: {}", String::from_utf8_lossy(&output.stdout));
    }

    /// The revised file is valid, and holds the disk.
    fn assert_holds(dir: &Path, disk: &mut Chain, when: &str) {
        let mut wanted = vec![0; disk.size() as usize];
        disk.read_at(0, &mut wanted).unwrap();
        std::fs::write(dir.join("wanted"), wanted).unwrap();
        let compared = qemu(dir, "qemu-img compare -f raw -F qcow2 wanted out");
        assert!(compared.contains("identical"), "{when}: {compared}");
        let checked = qemu(dir, "qemu-img check -f qcow2 out");
        assert!(checked.contains("No errors"), "{when}: {checked}");
    }

    #[test]
    fn a_file_that_is_revised_holds_the_other_disk() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        std::fs::write(dir.join("raw"), content()).unwrap();
        qemu(dir, "qemu-img convert -O qcow2 raw base");
        qemu(dir, "qemu-img convert -c -W -O qcow2 -o compression_type=zstd raw out");
        let size = || std::fs::metadata(dir.join("out")).unwrap().len();
        let first = size();
        let mut chain = vec![dir.join("base")];
        let cutoff = [
            vec!["write -P 9 100k 70k", "write -z 1M 128k", "write -P 0 2M 64k", "write -P 5 3145000 216"],
            // Zeros, compressed clusters, and incompressible ones.
            vec!["write -s raw 2M 300k", "write -P 3 0 3145216", "write -s raw 1200k 100k"],
            vec!["write -s raw 0 3145216"],
            vec![],
            vec!["write -s raw 64k 3000k", "write -P 1 512 512"],
        ];
        for (n, writes) in cutoff.iter().enumerate() {
            let top = format!("top{n}");
            qemu(dir, &format!("qemu-img create -q -f qcow2 {top} 3145216"));
            for one in writes {
                write(dir, &top, one);
            }
            chain.push(dir.join(&top));
            let mut disk = Chain::open(&chain).unwrap();
            revised(dir, "out", &mut disk, n + 1).unwrap();
            assert_holds(dir, &mut disk, &format!("round {n}"));
        }
        // Freed ranges are used again.
        assert!(size() < first + (1 << 20), "{} after {first}", size());
    }

    #[test]
    fn random_revisions_hold_what_was_written() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        std::fs::write(dir.join("raw"), content()).unwrap();
        qemu(dir, "qemu-img convert -O qcow2 raw base");
        let mut state = 7_u64;
        let mut below = |most: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) % most
        };
        for image in 0..4 {
            qemu(dir, "qemu-img convert -c -W -O qcow2 -o compression_type=zstd raw out");
            let mut chain = vec![dir.join("base")];
            for n in 0..8 {
                let top = format!("top{n}");
                qemu(dir, &format!("qemu-img create -q -f qcow2 {top} 3145216"));
                for _ in 0..below(5) {
                    let most = [8, 200, 3000][below(3) as usize];
                    let (at, length) = (below(6000), 1 + below(most));
                    let length = length.min(6143 - at);
                    let kind = ["-P 1", "-z", "-s raw", "-s raw", "-P 200"][below(5) as usize];
                    write(dir, &top, &format!("write {kind} {} {}", at * 512, length * 512));
                }
                chain.push(dir.join(&top));
                let mut disk = Chain::open(&chain).unwrap();
                // Sometimes skip a disk, so that the next revision covers two.
                if below(4) > 0 {
                    revised(dir, "out", &mut disk, 1).unwrap();
                    assert_holds(dir, &mut disk, &format!("image {image}, round {n}"));
                }
            }
        }
    }

    #[test]
    fn what_is_gone_is_not_in_the_file_any_more() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let secret = &content()[1 << 20..(1 << 20) + 1000];
        std::fs::write(dir.join("raw"), content()).unwrap();
        qemu(dir, "qemu-img convert -O qcow2 raw base");
        qemu(dir, "qemu-img convert -c -O qcow2 -o compression_type=zstd raw out");
        let has = || std::fs::read(dir.join("out")).unwrap().windows(1000).any(|bytes| bytes == secret);
        assert!(has(), "it can't be packed");
        qemu(dir, "qemu-img create -q -f qcow2 top 3145216");
        write(dir, "top", "write -P 7 1M 64k");
        let mut disk = Chain::open(&[dir.join("base"), dir.join("top")]).unwrap();
        revised(dir, "out", &mut disk, 1).unwrap();
        assert!(!has());
    }

    #[test]
    fn what_makes_no_sense_is_not_revised() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        std::fs::write(dir.join("raw"), content()).unwrap();
        qemu(dir, "qemu-img convert -O qcow2 raw base");
        let mut disk = Chain::open(&[dir.join("base")]).unwrap();
        for (name, options) in [("deflate", ""), ("large", "-o compression_type=zstd,cluster_size=128k ")] {
            qemu(dir, &format!("qemu-img convert -c -O qcow2 {options}raw {name}"));
            let error = Revision::of(&dir.join(name), &mut disk, &[]).err().unwrap();
            assert_eq!(error.to_string(), "the previous file has another format");
        }
        qemu(dir, "qemu-img convert -c -O qcow2 -o compression_type=zstd raw first");
        let good = std::fs::read(dir.join("first")).unwrap();
        // Damage in the header, in tables, and anywhere.
        let end = good.len();
        let places = (0..400).map(|n| n * 7919 % end).chain((0..600).map(|n| end - 1 - n * 331 % (5 << 16)));
        for (n, at) in places.enumerate() {
            let mut bad = good.clone();
            bad[at] ^= 1 << (n % 8);
            std::fs::write(dir.join("bad"), bad).unwrap();
            // The damage may be noticed or not, but it must end.
            let _ = revised(dir, "bad", &mut disk, 0);
        }
    }
}

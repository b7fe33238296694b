//! Superblock, inodes, extents and directories of an ext4 filesystem.

use std::collections::BTreeMap;
use std::io;

use vimg_agent::protocol::Time;

/// Maximum size of a file or directory that is read, in bytes.
const MOST: u64 = 64 << 20;
/// Maximum number of bytes read from one filesystem, so that overlapping tables
/// and cyclic trees come to an end. The contents of files that are copied do not
/// count.
const BUDGET: u64 = 2 << 30;
/// Maximum number of names in a directory.
const NAMES: usize = 1 << 20;

/// Random access to bytes.
pub trait Source {
    /// Fills the buffer from offset `at`.
    ///
    /// # Errors
    ///
    /// It can't read that much.
    fn read_at(&mut self, at: u64, buffer: &mut [u8]) -> io::Result<()>;
}

impl Source for crate::disk::qcow2::Chain {
    fn read_at(&mut self, at: u64, buffer: &mut [u8]) -> io::Result<()> {
        Self::read_at(self, at, buffer)
    }
}

pub(super) fn odd(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// Supported incompatible features: `filetype`, `extents`, `64bit`, `flex_bg`
/// and `metadata_csum_seed`. Not `recover`, which means that the journal must
/// be replayed first.
const KNOWN: u32 = 0x2 | 0x40 | 0x80 | 0x200 | 0x2000;
const BITS_64: u32 = 0x80;
/// The feature `orphan_file`: a file lists inodes that were deleted while they
/// were open.
const ORPHANS: u32 = 0x10000;

/// The root directory.
pub(super) const ROOT: u32 = 2;

/// A filesystem.
pub(super) struct Ext4<'a, S> {
    pub(super) source: &'a mut S,
    /// Its offset on the disk, in bytes.
    pub(super) start: u64,
    /// Whether it lists inodes that were deleted while they were open.
    pub(super) has_orphans: bool,
    pub(super) superblock: [u8; 1024],
    pub(super) block: u64,
    pub(super) inodes: u32,
    pub(super) per_group: u32,
    pub(super) inode_size: u64,
    /// The first block of each group's inode table.
    pub(super) tables: Vec<u64>,
    /// How many bytes may still be read.
    pub(super) budget: u64,
}

impl<'a, S: Source> Ext4<'a, S> {
    pub(super) fn open(source: &'a mut S, start: u64) -> io::Result<Self> {
        let mut s = [0; 1024];
        source.read_at(start + 1024, &mut s)?;
        if u16_at(&s, 0x38) != 0xEF53 {
            return Err(odd("it is not an ext4 filesystem"));
        }
        let (incompat, ro_compat) = (u32_at(&s, 0x60), u32_at(&s, 0x64));
        if incompat & !KNOWN != 0 {
            return Err(odd("the ext4 filesystem has features that vimg can't read"));
        }
        let (inodes, per_group) = (u32_at(&s, 0), u32_at(&s, 0x28));
        let (log, inode_size) = (u32_at(&s, 0x18), u64::from(u16_at(&s, 0x58)));
        // A bitmap of one block says which inodes of a group are used. This
        // architecture can't use blocks larger than a page.
        let legal = log <= 2 && (1..=8192 << log).contains(&per_group) && inode_size.is_power_of_two();
        if !legal || !(256..=1024).contains(&inode_size) {
            return Err(odd("the filesystem has an invalid superblock"));
        }
        let block = 1024 << log;
        let groups = inodes.div_ceil(per_group);
        let size = if incompat & BITS_64 != 0 { u64::from(u16_at(&s, 0xFE)) } else { 32 };
        if groups > 1 << 17 || !(32..=64).contains(&size) {
            return Err(odd("the filesystem has an invalid superblock"));
        }
        let mut descriptors = vec![0; (u64::from(groups) * size) as usize];
        let first = u64::from(u32_at(&s, 0x14)) + 1;
        source.read_at(start + first * block, &mut descriptors)?;
        let table = |d: &[u8]| {
            let high = if size >= 64 { u32_at(d, 0x28) } else { 0 };
            u64::from(high) << 32 | u64::from(u32_at(d, 8))
        };
        let tables = descriptors.chunks_exact(size as usize).map(table).collect();
        Ok(Self {
            source,
            start,
            has_orphans: ro_compat & ORPHANS != 0,
            superblock: s,
            block,
            inodes,
            per_group,
            inode_size,
            tables,
            budget: BUDGET,
        })
    }

    /// Reads from the disk, within the budget. Even a short read costs
    /// something.
    pub(super) fn read_at(&mut self, at: u64, buffer: &mut [u8]) -> io::Result<()> {
        let cost = buffer.len() as u64 + 64;
        self.budget = self.budget.checked_sub(cost).ok_or_else(|| odd("there is too much to read"))?;
        self.source.read_at(at, buffer)
    }

    /// Returns the offset of a block on the disk, in bytes.
    fn place(&self, block: u64) -> io::Result<u64> {
        let at = block.checked_mul(self.block).and_then(|at| at.checked_add(self.start));
        at.ok_or_else(|| odd("a block number is out of range"))
    }

    pub(super) fn inode(&mut self, number: u32) -> io::Result<Inode> {
        if number == 0 || number > self.inodes {
            return Err(odd("an inode number is out of range"));
        }
        let (group, index) = ((number - 1) / self.per_group, (number - 1) % self.per_group);
        let table = self.tables[group as usize].saturating_mul(self.block);
        let mut bytes = vec![0; self.inode_size as usize];
        let at = table.saturating_add(u64::from(index) * self.inode_size);
        self.read_at(self.start.saturating_add(at), &mut bytes)?;
        Ok(Inode(bytes))
    }

    /// Reads the content of a file or directory.
    pub(super) fn content(&mut self, inode: &Inode) -> io::Result<Vec<u8>> {
        if inode.size() > MOST {
            return Err(odd("a file is too large to read"));
        }
        // The memory for the content also counts, because holes use it, too.
        let left = self.budget.checked_sub(inode.size());
        self.budget = left.ok_or_else(|| odd("there is too much to read"))?;
        let mut content = vec![0; inode.size() as usize];
        if !inode.has_extents() {
            return Err(odd("a file has no extents"));
        }
        let end = content.len() as u64;
        self.extents(inode.map().to_vec(), 5, &mut |fs, extent| {
            let from = extent.first.min(end) as usize;
            let to = (extent.first + extent.length).min(end) as usize;
            fs.read_at(extent.place, &mut content[from..to])
        })?;
        Ok(content)
    }

    /// Calls `each` for the extents below a node of an extent tree, at most
    /// `depth` levels above its leaves. Leaves out extents that were allocated
    /// and never written.
    pub(super) fn extents(
        &mut self,
        node: Vec<u8>,
        depth: u16,
        each: &mut dyn FnMut(&mut Self, Extent) -> io::Result<()>,
    ) -> io::Result<()> {
        let (magic, entries, height) = (u16_at(&node, 0), u16_at(&node, 2), u16_at(&node, 6));
        if magic != 0xF30A || height > depth || 12 * (usize::from(entries) + 1) > node.len() {
            return Err(odd("an extent tree is invalid"));
        }
        for entry in node[12..].chunks_exact(12).take(entries.into()) {
            if height > 0 {
                let child = u64::from(u16_at(entry, 8)) << 32 | u64::from(u32_at(entry, 4));
                let mut node = vec![0; self.block as usize];
                let at = self.place(child)?;
                self.read_at(at, &mut node)?;
                // Each level is one nearer to the leaves.
                self.extents(node, height - 1, each)?;
                continue;
            }
            let (first, length) = (u64::from(u32_at(entry, 0)), u16_at(entry, 4));
            // A larger length means allocated blocks that were never written.
            if length > 1 << 15 {
                continue;
            }
            let block = u64::from(u16_at(entry, 6)) << 32 | u64::from(u32_at(entry, 8));
            let place = self.place(block)?;
            let length = u64::from(length) * self.block;
            each(self, Extent { first: first * self.block, place, length })?;
        }
        Ok(())
    }

    /// Returns the entries of a directory, without `.` and `..`.
    pub(super) fn entries(&mut self, inode: &Inode) -> io::Result<BTreeMap<Vec<u8>, u32>> {
        let content = self.content(inode)?;
        let mut entries = BTreeMap::new();
        for block in content.chunks(self.block as usize) {
            let mut rest = block;
            while rest.len() >= 8 {
                let (number, length) = (u32_at(rest, 0), usize::from(u16_at(rest, 4)));
                let name = rest.get(8..8 + usize::from(rest[6]));
                let (Some(name), 8..) = (name, length) else {
                    return Err(odd("a directory is invalid"));
                };
                if number != 0 && name != b"." && name != b".." {
                    entries.insert(name.to_vec(), number);
                }
                if entries.len() > NAMES {
                    return Err(odd("a directory has too many entries"));
                }
                rest = rest.get(length..).ok_or_else(|| odd("a directory is invalid"))?;
            }
        }
        Ok(entries)
    }
}

/// Blocks of a file that are next to each other on the disk, in bytes.
pub(super) struct Extent {
    /// The offset in the file.
    pub(super) first: u64,
    /// The offset on the disk.
    pub(super) place: u64,
    pub(super) length: u64,
}

/// An inode as it is on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Inode(pub(super) Vec<u8>);

/// The type of an inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    File,
    Dir,
    Link,
    /// A device, socket or FIFO.
    Other,
}

impl Inode {
    /// Whether a file uses it.
    pub(super) fn lives(&self) -> bool {
        self.mode() != 0 && self.links() != 0
    }

    pub(super) fn mode(&self) -> u16 {
        u16_at(&self.0, 0)
    }

    pub(super) fn kind(&self) -> Kind {
        match self.mode() & 0xF000 {
            0x8000 => Kind::File,
            0x4000 => Kind::Dir,
            0xA000 => Kind::Link,
            _ => Kind::Other,
        }
    }

    pub(super) fn links(&self) -> u16 {
        u16_at(&self.0, 26)
    }

    pub(super) fn flags(&self) -> u32 {
        u32_at(&self.0, 32)
    }

    pub(super) fn has_extents(&self) -> bool {
        self.flags() & 0x80000 != 0
    }

    pub(super) fn size(&self) -> u64 {
        u64::from(u32_at(&self.0, 108)) << 32 | u64::from(u32_at(&self.0, 4))
    }

    pub(super) fn generation(&self) -> u32 {
        u32_at(&self.0, 100)
    }

    /// The extent tree, the target of a short symbolic link, or the device
    /// number.
    pub(super) fn map(&self) -> &[u8] {
        &self.0[40..100]
    }

    /// When its content was last changed. Two bits of the field for nanoseconds
    /// belong to the seconds (`fs/ext4/ext4.h`).
    pub(super) fn modified(&self) -> Time {
        let seconds = i64::from(u32_at(&self.0, 16).cast_signed());
        let extra = if self.extra() >= 12 { u32_at(&self.0, 136) } else { 0 };
        Time { seconds: seconds + (i64::from(extra & 3) << 32), nanoseconds: extra >> 2 }
    }

    /// The numbers of its user and group.
    pub(super) fn owner(&self) -> (u32, u32) {
        let number = |low: usize, high: usize| {
            u32::from(u16_at(&self.0, high)) << 16 | u32::from(u16_at(&self.0, low))
        };
        (number(2, 120), number(24, 122))
    }

    /// The number of bytes of fields after the first 128.
    pub(super) fn extra(&self) -> usize {
        usize::from(u16_at(&self.0, 128)).min(self.0.len() - 128)
    }

    /// The extended attributes in the inode itself.
    pub(super) fn attributes(&self) -> &[u8] {
        let attributes = &self.0[128 + self.extra()..];
        // Without the magic number there are none.
        if attributes.len() >= 4 && u32_at(attributes, 0) == 0xEA02_0000 { attributes } else { &[] }
    }

    /// Whether extended attributes have a block of their own.
    pub(super) fn has_block(&self) -> bool {
        u32_at(&self.0, 104) != 0 || u16_at(&self.0, 118) != 0
    }

    /// All metadata that a program sees, except size and times. The link count
    /// of a directory is left out: the names in it determine it.
    pub(super) fn outside(&self) -> (u16, [u16; 4], u16, u32, &[u8]) {
        let owner = [2, 24, 120, 122].map(|at| u16_at(&self.0, at));
        let links = if self.kind() == Kind::Dir { 0 } else { self.links() };
        (self.mode(), owner, links, self.flags(), self.attributes())
    }
}

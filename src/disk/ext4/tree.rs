//! Finds and reads files of one filesystem by their paths.

use std::collections::BTreeMap;
use std::io;

use vimg_agent::protocol::Time;

use super::tables::{Ext4, Inode, Kind, ROOT, Source, odd};

/// Maximum number of symbolic links on the way to a file, as in Linux.
const LINKS: u32 = 40;
/// Maximum length of the target of a symbolic link, in bytes.
const TARGET: u64 = 4096;
/// Size of a read of a file's content, in bytes.
const PIECE: u64 = 1 << 20;

/// A filesystem whose files are read one by one.
pub struct Tree<'a, S>(Ext4<'a, S>);

/// A file, directory, link or special file.
#[derive(Debug, Clone)]
pub struct Entry {
    number: u32,
    inode: Inode,
}

/// The beginning of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Head {
    /// The size of the file, in bytes.
    pub size: u64,
    /// Its permission bits.
    pub mode: u16,
    /// Its first bytes.
    pub bytes: Vec<u8>,
}

/// The type of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EntryKind {
    /// A regular file.
    File,
    /// A directory.
    Dir,
    /// A symbolic link.
    Link,
    /// A device, socket or FIFO.
    Special,
}

impl Entry {
    /// Returns the number of its inode.
    pub fn number(&self) -> u32 {
        self.number
    }

    /// Returns its type.
    pub fn kind(&self) -> EntryKind {
        match self.inode.kind() {
            Kind::File => EntryKind::File,
            Kind::Dir => EntryKind::Dir,
            Kind::Link => EntryKind::Link,
            Kind::Other => EntryKind::Special,
        }
    }

    /// Returns its permissions, with the set-ID bits and the sticky bit.
    pub fn permissions(&self) -> u32 {
        u32::from(self.inode.mode() & 0o7777)
    }

    /// Returns the numbers of its user and its group.
    pub fn owner(&self) -> (u32, u32) {
        self.inode.owner()
    }

    /// Returns the time at which its content was last changed.
    pub fn modified(&self) -> Time {
        self.inode.modified()
    }

    /// Returns the size of its content, in bytes.
    pub fn size(&self) -> u64 {
        self.inode.size()
    }

    /// Whether it has more than one name.
    pub fn has_several_names(&self) -> bool {
        self.inode.links() > 1
    }
}

impl<'a, S: Source> Tree<'a, S> {
    /// Opens the filesystem at offset `start` of a disk, in bytes.
    ///
    /// # Errors
    ///
    /// It can't be read, is not ext4, or has features that vimg can't read.
    pub fn open(source: &'a mut S, start: u64) -> io::Result<Self> {
        Ok(Self(Ext4::open(source, start)?))
    }

    fn entry(&mut self, number: u32) -> io::Result<Entry> {
        let inode = self.0.inode(number)?;
        if !inode.lives() {
            return Err(odd("a name has no file"));
        }
        Ok(Entry { number, inode })
    }

    /// Finds the file that an absolute path names in the machine: links are
    /// followed from the root of this filesystem, the last one included. `None`
    /// if there is none.
    ///
    /// # Errors
    ///
    /// Something can't be read or is invalid, or there are too many links.
    pub fn find(&mut self, path: &[u8]) -> io::Result<Option<Entry>> {
        // The directories above, so that `..` stays below the root.
        let mut way = vec![self.entry(ROOT)?];
        let mut left = parts(path);
        let mut links = 0;
        while let Some(part) = left.pop() {
            let here = way.last().ok_or_else(|| odd("there is no root"))?;
            if here.kind() != EntryKind::Dir {
                return Ok(None);
            }
            if part == b".." {
                way.truncate((way.len() - 1).max(1));
                continue;
            }
            let here = here.clone();
            let Some(number) = self.entries(&here)?.remove(&part) else { return Ok(None) };
            let entry = self.entry(number)?;
            if entry.kind() != EntryKind::Link {
                way.push(entry);
                continue;
            }
            links += 1;
            if links > LINKS {
                return Err(odd("the path has too many symbolic links"));
            }
            let target = self.target(&entry)?;
            if target.first() == Some(&b'/') {
                way.truncate(1);
            }
            left.extend(parts(&target));
        }
        Ok(way.pop())
    }

    /// Returns the names in a directory, without `.` and `..`, with their
    /// inodes.
    ///
    /// # Errors
    ///
    /// It can't be read or is invalid.
    pub fn entries(&mut self, dir: &Entry) -> io::Result<BTreeMap<Vec<u8>, u32>> {
        self.0.entries(&dir.inode)
    }

    /// Returns the file with the number of an inode that a directory names.
    ///
    /// # Errors
    ///
    /// It can't be read or is invalid.
    pub fn named(&mut self, number: u32) -> io::Result<Entry> {
        self.entry(number)
    }

    /// Returns the target of a symbolic link.
    ///
    /// # Errors
    ///
    /// It can't be read or is invalid.
    pub fn target(&mut self, link: &Entry) -> io::Result<Vec<u8>> {
        let size = link.size();
        let target = match link.inode.has_extents() {
            _ if size == 0 || size >= TARGET => return Err(odd("a symbolic link has an invalid target")),
            true => self.0.content(&link.inode)?,
            false => {
                let short = link.inode.map().get(..size as usize);
                short.ok_or_else(|| odd("a symbolic link has an invalid target"))?.to_vec()
            }
        };
        if target.contains(&0) {
            return Err(odd("a symbolic link has an invalid target"));
        }
        Ok(target)
    }

    /// Calls `each` for the content of a file, piece by piece, with the offset
    /// of each piece in bytes. Leaves out holes, which read as zeros.
    ///
    /// # Errors
    ///
    /// It can't be read or is invalid, and errors of `each`.
    pub fn content(
        &mut self,
        file: &Entry,
        each: &mut dyn FnMut(u64, &[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        self.begin(file, file.size(), each)
    }

    /// Reads at most the first `most` bytes of the file at an absolute path.
    /// Follows symbolic links. `None` if there is no file.
    ///
    /// # Errors
    ///
    /// Something can't be read or is invalid.
    pub fn head(&mut self, path: &str, most: usize) -> io::Result<Option<Head>> {
        let file = self.find(path.as_bytes())?.filter(|entry| entry.kind() == EntryKind::File);
        let Some(file) = file else { return Ok(None) };
        let mut bytes = vec![0; file.size().min(most as u64) as usize];
        self.begin(&file, bytes.len() as u64, &mut |at, piece| {
            let at = at as usize;
            bytes[at..at + piece.len()].copy_from_slice(piece);
            Ok(())
        })?;
        Ok(Some(Head { size: file.size(), mode: file.inode.mode() & 0o7777, bytes }))
    }

    /// Calls `each` for the first `size` bytes of a file; see [`Self::content`].
    fn begin(
        &mut self,
        file: &Entry,
        size: u64,
        each: &mut dyn FnMut(u64, &[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        if !file.inode.has_extents() {
            return Err(odd("a file has no extents"));
        }
        let mut buffer = Vec::new();
        self.0.extents(file.inode.map().to_vec(), 5, &mut |fs, extent| {
            let end = (extent.first + extent.length).min(size);
            let mut at = extent.first;
            while at < end {
                let length = (end - at).min(PIECE);
                buffer.resize(length as usize, 0);
                fs.source.read_at(extent.place.saturating_add(at - extent.first), &mut buffer)?;
                each(at, &buffer)?;
                at += length;
            }
            Ok(())
        })
    }
}

/// Splits a path at its slashes, the last part first.
fn parts(path: &[u8]) -> Vec<Vec<u8>> {
    let parts = path.split(|byte| *byte == b'/').rev();
    parts.filter(|part| !part.is_empty() && *part != b".").map(<[u8]>::to_vec).collect()
}

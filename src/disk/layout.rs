//! Finds the root filesystem of a disk. Nothing else says which partition it
//! is in.

use std::io;
use std::ops::Range;
use std::path::Path;

use super::gpt::{self, Partition};
use super::qcow2::Chain;

/// Where the root filesystem of a disk is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// The number of its partition; the first one is 1.
    pub number: usize,
    /// Its place on the disk, in bytes.
    pub root: Range<u64>,
}

impl Layout {
    /// Reads the partition table of a disk. The root is the partition of the
    /// type "root for x86-64" of the Discoverable Partitions Specification, or
    /// else the only partition for Linux, or that with the name `root`.
    ///
    /// # Errors
    ///
    /// Errors of the system, and what is wrong with the table.
    pub fn of(disk: &mut Chain) -> io::Result<Self> {
        let size = disk.size();
        let partitions = gpt::read(size, |at, buffer| disk.read_at(at, buffer))?;
        Self::among(&partitions)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "the disk has no root partition"))
    }

    /// Reads the partition table of a chain of disks, the lowest first.
    ///
    /// # Errors
    ///
    /// As [`Self::of`].
    pub fn of_chain(chain: &[impl AsRef<Path>]) -> io::Result<Self> {
        Self::of(&mut Chain::open(chain)?)
    }

    fn among(partitions: &[Partition]) -> Option<Self> {
        let only = |of: &dyn Fn(&Partition) -> bool| {
            let mut found = partitions.iter().filter(|p| of(p));
            found.next().filter(|_| found.next().is_none())
        };
        let linux = |p: &Partition| p.kind == gpt::LINUX;
        let root = only(&|p| p.kind == gpt::ROOT_X86_64)
            .or_else(|| only(&linux))
            .or_else(|| only(&|p| linux(p) && p.name == "root"))?;
        Some(Self { number: root.number, root: root.place.clone() })
    }

    /// Returns the kernel's name of the root, if the disk is the only one of a
    /// machine and a virtio disk.
    pub fn device(&self) -> String {
        format!("/dev/vda{}", self.number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(all: &[([u8; 16], &str)]) -> Option<usize> {
        let place = |n: u64| n << 20..(n + 1) << 20;
        let partitions: Vec<Partition> = all
            .iter()
            .enumerate()
            .map(|(n, (kind, name))| Partition {
                number: n + 1,
                kind: *kind,
                guid: [n as u8; 16],
                name: (*name).into(),
                place: place(n as u64 + 1),
            })
            .collect();
        Layout::among(&partitions).map(|layout| layout.number)
    }

    #[test]
    fn the_root_is_found_by_type_and_then_by_name() {
        let (esp, linux, root) = (gpt::ESP, gpt::LINUX, gpt::ROOT_X86_64);
        assert_eq!(found(&[(gpt::BIOS_BOOT, "bios"), (esp, "esp"), (linux, "root")]), Some(3));
        assert_eq!(found(&[(esp, ""), (linux, "data"), (root, "")]), Some(3));
        assert_eq!(found(&[(linux, "root"), (linux, "data")]), Some(1));
        assert_eq!(found(&[(linux, ""), (linux, "")]), None, "nothing tells them apart");
        assert_eq!(found(&[(root, ""), (root, "")]), None);
        assert_eq!(found(&[(esp, "root")]), None);
    }
}

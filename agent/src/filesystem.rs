//! Finds and mounts the filesystems of a disk. This happens only in a virtual machine,
//! never in the host's kernel.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, mount};

use crate::modules;

/// How long the disk may take to appear.
const DISK_WAIT: Duration = Duration::from_secs(10);

/// GPT's type of an EFI system partition, as it is stored on disk (UEFI specification,
/// "GPT Partition Entry").
const ESP: [u8; 16] =
    [0x28, 0x73, 0x2a, 0xc1, 0x1f, 0xf8, 0xd2, 0x11, 0xba, 0x4b, 0x00, 0xa0, 0xc9, 0x3e, 0xc9, 0x3b];

/// How much of a filesystem is read to find its kind, in bytes.
const HEAD: u64 = 0x10048;

/// The supported kinds of filesystems.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Ext4,
    Xfs,
    Btrfs,
    Vfat,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
            Self::Btrfs => "btrfs",
            Self::Vfat => "vfat",
        }
    }

    /// Finds the kind from the first bytes. Source of the magic numbers and their offsets:
    /// the kernel's `include/uapi/linux/magic.h` and the superblocks.
    fn of(head: &[u8]) -> Option<Self> {
        let at = |offset: usize, magic: &[u8]| head.get(offset..offset + magic.len()) == Some(magic);
        if at(1080, &[0x53, 0xef]) {
            Some(Self::Ext4)
        } else if at(0, b"XFSB") {
            Some(Self::Xfs)
        } else if at(0x10040, b"_BHRfS_M") {
            Some(Self::Btrfs)
        } else if at(510, &[0x55, 0xaa]) && (at(82, b"FAT32") || at(54, b"FAT")) {
            Some(Self::Vfat)
        } else {
            None
        }
    }
}

/// A filesystem on a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) device: String,
    pub(crate) kind: Kind,
    size: u64,
    esp: bool,
}

/// Finds all filesystems of the disk. The largest comes first.
pub(crate) fn find(disk: &str) -> io::Result<Vec<Found>> {
    let sys = Path::new("/sys/class/block").join(disk);
    let start = Instant::now();
    while !sys.exists() || !Path::new("/dev").join(disk).exists() {
        if start.elapsed() > DISK_WAIT {
            return Err(io::Error::other("timed out waiting for the disk"));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    let mut parts: Vec<String> = fs::read_dir(&sys)?
        .flatten()
        .filter_map(|e| e.file_name().into_string().ok())
        .filter(|name| name.starts_with(disk))
        .collect();
    if parts.is_empty() {
        // A disk may have a filesystem and no partition table.
        parts.push(disk.to_owned());
    }
    let types = gpt_types(&Path::new("/dev").join(disk)).unwrap_or_default();
    let mut found = Vec::new();
    for part in parts {
        let device = format!("/dev/{part}");
        let mut file = File::open(&device)?;
        let size = file.seek(SeekFrom::End(0))?;
        file.seek(SeekFrom::Start(0))?;
        let mut head = Vec::new();
        file.take(HEAD).read_to_end(&mut head)?;
        let number = part[disk.len()..].parse::<usize>().unwrap_or(0);
        let esp = number > 0 && types.get(number - 1) == Some(&ESP);
        if let Some(kind) = Kind::of(&head) {
            found.push(Found { device, kind, size, esp });
        }
    }
    found.sort_by_key(|f| std::cmp::Reverse(f.size));
    Ok(found)
}

/// Reads the types of the partitions, by number. Returns none if there is no GPT.
fn gpt_types(disk: &Path) -> io::Result<Vec<[u8; 16]>> {
    let mut file = File::open(disk)?;
    let mut header = [0; 512];
    file.seek(SeekFrom::Start(512))?;
    file.read_exact(&mut header)?;
    if !header.starts_with(b"EFI PART") {
        return Ok(Vec::new());
    }
    let number = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    // Usually 128 entries of 128 bytes at sector 2. Imported disks may have fewer
    // entries; tables of another layout are ignored.
    let (count, size) = (number(80).min(128), number(84));
    if size != 128 || header[72..80] != 2_u64.to_le_bytes() {
        return Ok(Vec::new());
    }
    let mut table = vec![0; count as usize * 128];
    file.seek(SeekFrom::Start(1024))?;
    file.read_exact(&mut table)?;
    Ok(table
        .chunks_exact(128)
        .map(|entry| {
            let mut kind = [0; 16];
            kind.copy_from_slice(&entry[..16]);
            kind
        })
        .collect())
}

/// Mounts a filesystem.
pub(crate) fn attach(found: &Found, at: &str, options: &str) -> io::Result<()> {
    modules::load(found.kind.name())?;
    let options = std::ffi::CString::new(options)?;
    mount(found.device.as_str(), at, found.kind.name(), MountFlags::NOATIME, options.as_c_str())
        .map_err(|e| io::Error::other(format!("can't mount {}: {e}", found.device)))
}

/// Mounts the root filesystem of the disk at `at`.
pub(crate) fn mount_root(all: &[Found], at: &str) -> io::Result<()> {
    let mut why = None;
    for found in all.iter().filter(|f| f.kind != Kind::Vfat) {
        // Subvolumes that distributions use for the root filesystem.
        let ways: &[&str] = if found.kind == Kind::Btrfs {
            &["discard", "discard,subvol=@", "discard,subvol=root", "discard,subvol=@rootfs"]
        } else {
            &["discard"]
        };
        for options in ways {
            if let Err(error) = attach(found, at, options) {
                why = Some(error);
                continue;
            }
            if Path::new(at).join("etc").is_dir() && Path::new(at).join("usr").is_dir() {
                return Ok(());
            }
            rustix::mount::unmount(at, rustix::mount::UnmountFlags::empty())?;
        }
    }
    Err(why.unwrap_or_else(|| {
        io::Error::other("the disk has no root filesystem of a supported kind (ext4, xfs, btrfs)")
    }))
}

/// Finds the EFI system partition, if the disk has one.
pub(crate) fn esp(all: &[Found]) -> Option<&Found> {
    all.iter().find(|f| f.kind == Kind::Vfat && f.esp)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_known_by_their_magic() {
        let with = |offset: usize, magic: &[u8]| {
            let mut head = vec![0; 0x10048];
            head[offset..offset + magic.len()].copy_from_slice(magic);
            Kind::of(&head)
        };
        assert_eq!(with(1080, &[0x53, 0xef]), Some(Kind::Ext4));
        assert_eq!(with(0, b"XFSB"), Some(Kind::Xfs));
        assert_eq!(with(0x10040, b"_BHRfS_M"), Some(Kind::Btrfs));
        let mut fat = vec![0; 512];
        fat[82..87].copy_from_slice(b"FAT32");
        assert_eq!(Kind::of(&fat), None);
        fat[510..].copy_from_slice(&[0x55, 0xaa]);
        assert_eq!(Kind::of(&fat), Some(Kind::Vfat));
        assert_eq!(Kind::of(&[]), None);
    }
}

//! What the filesystems on a disk are called: their UUIDs and labels, and those
//! of their partitions. Offsets are those of the kernel's headers of ext4, XFS,
//! btrfs and swap, and of Microsoft's specification of FAT.

use std::io;

use super::gpt::{self, Partition};
use super::qcow2::Chain;

/// A filesystem or swap area on a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    /// Its partition.
    pub partition: Partition,
    /// Its UUID as text, in lower case.
    pub uuid: Option<String>,
    /// Its label.
    pub label: Option<String>,
}

impl Volume {
    /// Lists the partitions of a disk with what is in them.
    ///
    /// # Errors
    ///
    /// The disk or its partition table can't be read.
    pub fn of(disk: &mut Chain) -> io::Result<Vec<Self>> {
        let size = disk.size();
        let partitions = gpt::read(size, |at, buffer| disk.read_at(at, buffer))?;
        partitions
            .into_iter()
            .map(|partition| {
                let (uuid, label) = names(disk, &partition)?;
                Ok(Self { partition, uuid, label })
            })
            .collect()
    }

    /// Whether `spec` names it, as fstab(5) and `root=` of the kernel's command
    /// line name devices. `None` if a spec of this form may name anything.
    pub fn is_named(&self, spec: &str) -> Option<bool> {
        let spec = spec.replace('"', "");
        let (tag, value) = match spec.strip_prefix("/dev/disk/by-") {
            Some(link) => link.split_once('/')?,
            None => match spec.split_once('=') {
                Some(pair) => pair,
                None => return self.is_device(&spec),
            },
        };
        let same = |own: Option<&str>| own.is_some_and(|own| own.eq_ignore_ascii_case(value));
        let plain = |own: Option<&str>| own == Some(value);
        match tag.to_ascii_lowercase().as_str() {
            "uuid" => Some(same(self.uuid.as_deref())),
            "label" => Some(plain(self.label.as_deref())),
            "partuuid" => Some(same(Some(&guid(&self.partition.guid)))),
            "partlabel" => Some(plain(Some(&self.partition.name))),
            _ => None,
        }
    }

    /// Whether a path is that of its partition, whatever its controller calls the
    /// disk. A partition of another disk is not.
    fn is_device(&self, path: &str) -> Option<bool> {
        let first = ["/dev/vda", "/dev/sda", "/dev/xvda", "/dev/nvme0n1p"];
        let disks = ["/dev/vd", "/dev/sd", "/dev/xvd", "/dev/nvme"];
        let number = first.iter().find_map(|disk| path.strip_prefix(disk));
        let is_disk = disks.iter().any(|disk| path.starts_with(disk));
        is_disk.then(|| number.is_some_and(|number| number.parse() == Ok(self.partition.number)))
    }
}

/// Returns UUID and label of what is in a partition.
fn names(disk: &mut Chain, partition: &Partition) -> io::Result<(Option<String>, Option<String>)> {
    let length = partition.place.end - partition.place.start;
    let mut bytes = vec![0; length.min(0x11000) as usize];
    disk.read_at(partition.place.start, &mut bytes)?;
    Ok(known(&bytes))
}

/// Reads UUID and label from the first bytes of a filesystem.
fn known(bytes: &[u8]) -> (Option<String>, Option<String>) {
    let at = |from: usize, length: usize| bytes.get(from..from + length);
    let is = |from: usize, magic: &[u8]| at(from, magic.len()) == Some(magic);
    let text = |from: usize, length: usize| {
        let bytes = at(from, length)?.split(|b| *b == 0).next()?;
        let text = String::from_utf8_lossy(bytes).trim_end().to_owned();
        (!text.is_empty()).then_some(text)
    };
    let plain = |from: usize| Some(uuid(at(from, 16)?));
    if is(0x438, &[0x53, 0xEF]) {
        (plain(0x468), text(0x478, 16))
    } else if is(0, b"XFSB") {
        (plain(32), text(108, 12))
    } else if is(0x10040, b"_BHRfS_M") {
        (plain(0x10020), text(0x1012b, 256))
    } else if is(0xFF6, b"SWAPSPACE2") {
        (plain(0x40c), text(0x41c, 16))
    } else if is(510, &[0x55, 0xAA]) && is(82, b"FAT32") {
        let serial = at(67, 4).map(|s| format!("{:02x}{:02x}-{:02x}{:02x}", s[3], s[2], s[1], s[0]));
        (serial, text(71, 11))
    } else {
        (None, None)
    }
}

/// Writes a UUID whose bytes are in the order of its text.
fn uuid(bytes: &[u8]) -> String {
    let hex: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
    format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}

/// Writes a GUID of a partition table, whose first three fields are
/// little-endian.
fn guid(bytes: &[u8; 16]) -> String {
    let mut ordered = *bytes;
    ordered[..4].reverse();
    ordered[4..6].reverse();
    ordered[6..8].reverse();
    uuid(&ordered)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_has_many_names() {
        let mut bytes = vec![0; 0x1000];
        bytes[0x438..0x43a].copy_from_slice(&[0x53, 0xEF]);
        bytes[0x468..0x478].copy_from_slice(&std::array::from_fn::<u8, 16, _>(|n| n as u8));
        bytes[0x478..0x47c].copy_from_slice(b"data");
        let (uuid, label) = known(&bytes);
        assert_eq!(uuid.as_deref(), Some("00010203-0405-0607-0809-0a0b0c0d0e0f"));
        let partition = Partition {
            number: 3,
            kind: gpt::LINUX,
            guid: std::array::from_fn(|n| n as u8),
            name: "root".into(),
            place: 0..1,
        };
        let volume = Volume { partition, uuid, label };
        for (spec, named) in [
            ("UUID=00010203-0405-0607-0809-0A0B0C0D0E0F", Some(true)),
            ("UUID=\"00010203-0405-0607-0809-0a0b0c0d0e0f\"", Some(true)),
            ("/dev/disk/by-uuid/00010203-0405-0607-0809-0a0b0c0d0e0f", Some(true)),
            ("UUID=11111111-0405-0607-0809-0a0b0c0d0e0f", Some(false)),
            ("LABEL=data", Some(true)),
            ("LABEL=Data", Some(false)),
            ("PARTUUID=03020100-0504-0706-0809-0a0b0c0d0e0f", Some(true)),
            ("PARTLABEL=root", Some(true)),
            ("/dev/vda3", Some(true)),
            ("/dev/nvme0n1p3", Some(true)),
            ("/dev/sda4", Some(false)),
            ("/dev/sdb3", Some(false)),
            ("/dev/mapper/vg-root", None),
            ("server:/export", None),
        ] {
            assert_eq!(volume.is_named(spec), named, "{spec}");
        }
        assert_eq!(known(&[0; 600]), (None, None));
    }
}

//! Reads a disk's partition table, and writes it with BIOS boot code, without
//! other tools: these need block devices, and block devices need root.
//!
//! Layout: GPT as in UEFI 2.10, chapter 5; where GRUB's `boot.img` and
//! `core.img` keep their block lists, as in its `grub-core/boot/i386/pc/`.

use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::ops::Range;

/// Size of a sector, in bytes.
pub const SECTOR: u64 = 512;
/// The first sector of GRUB's core, in the BIOS boot partition.
const CORE: u64 = 34;
/// The first sector of the EFI system partition.
pub const ESP_START: u64 = 2048;
/// The sectors of the EFI system partition: 64 MiB.
pub const ESP_SECTORS: u64 = 131_072;
/// The first sector of the root filesystem.
pub const ROOT_START: u64 = ESP_START + ESP_SECTORS;

/// One past the last sector of the root filesystem, on a disk of `disk` bytes.
pub fn root_end(disk: u64) -> u64 {
    // The last 33 sectors hold the second table.
    (disk / SECTOR - 34) / 2048 * 2048
}

// Types of partitions: GUIDs as stored on disk, the first three fields
// little-endian. Source of the last one: the Discoverable Partitions
// Specification of the UAPI group.

/// Holds the core of GRUB.
pub const BIOS_BOOT: [u8; 16] = *b"Hah!IdontNeedEFI";
/// The EFI system partition.
pub const ESP: [u8; 16] =
    [0x28, 0x73, 0x2A, 0xC1, 0x1F, 0xF8, 0xD2, 0x11, 0xBA, 0x4B, 0x00, 0xA0, 0xC9, 0x3E, 0xC9, 0x3B];
/// Any filesystem of Linux.
pub const LINUX: [u8; 16] =
    [0xAF, 0x3D, 0xC6, 0x0F, 0x83, 0x84, 0x72, 0x47, 0x8E, 0x79, 0x3D, 0x69, 0xD8, 0x47, 0x7D, 0xE4];
/// The root filesystem of an x86-64 machine.
pub const ROOT_X86_64: [u8; 16] =
    [0xE3, 0xBC, 0x68, 0x4F, 0xCD, 0xE8, 0xB1, 0x4D, 0x96, 0xE7, 0xFB, 0xCA, 0xF9, 0x84, 0xB7, 0x09];

/// The most entries of a table that are read; tools make 128.
const MOST_ENTRIES: u64 = 1024;

/// A partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Partition {
    /// Its number; the first one is 1.
    pub number: usize,
    /// The GUID of its type, as stored on disk.
    pub kind: [u8; 16],
    /// Its own GUID, as stored on disk.
    pub guid: [u8; 16],
    /// Its name.
    pub name: String,
    /// Its place on the disk, in bytes.
    pub place: Range<u64>,
}

/// Reads the partition table of a disk of `size` bytes. `read` fills a buffer
/// from a place on the disk.
///
/// # Errors
///
/// Errors of `read`, and what is wrong with the table.
pub fn read(size: u64, mut read: impl FnMut(u64, &mut [u8]) -> io::Result<()>) -> io::Result<Vec<Partition>> {
    let odd = |what| io::Error::new(io::ErrorKind::InvalidData, what);
    if size < 4 * SECTOR {
        return Err(odd("the disk is too small for a partition table"));
    }
    let mut header = [0; SECTOR as usize];
    read(SECTOR, &mut header)?;
    if &header[..8] != b"EFI PART" {
        return Err(odd("the disk has no GPT"));
    }
    let (table, count, length) = (le64(&header, 72), le32(&header, 80), le32(&header, 84));
    if count > MOST_ENTRIES || !(128..=4096).contains(&length) || table < 2 {
        return Err(odd("the disk's partition table is damaged"));
    }
    let end = table.checked_mul(SECTOR).and_then(|start| start.checked_add(count * length));
    if end.is_none_or(|end| end > size) {
        return Err(odd("the disk's partition table is damaged"));
    }
    let mut entries = vec![0; (count * length) as usize];
    read(table * SECTOR, &mut entries)?;
    let mut partitions = Vec::new();
    for (n, entry) in entries.chunks_exact(length as usize).enumerate() {
        let mut kind = [0; 16];
        kind.copy_from_slice(&entry[..16]);
        if kind == [0; 16] {
            continue;
        }
        let (first, last) = (le64(entry, 32), le64(entry, 40));
        if first < 2 || first > last || last >= size / SECTOR {
            return Err(odd("a partition is not on its disk"));
        }
        let units = entry[56..128].chunks_exact(2).map(|unit| u16::from_le_bytes([unit[0], unit[1]]));
        let name: Vec<u16> = units.take_while(|unit| *unit != 0).collect();
        partitions.push(Partition {
            number: n + 1,
            kind,
            guid: std::array::from_fn(|n| entry[16 + n]),
            name: String::from_utf16_lossy(&name),
            place: first * SECTOR..(last + 1) * SECTOR,
        });
    }
    Ok(partitions)
}

fn le64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(std::array::from_fn(|n| bytes[at + n]))
}

fn le32(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32::from_le_bytes(std::array::from_fn(|n| bytes[at + n])))
}

/// Writes boot code and both tables. `id` is the disk's GUID; the GUIDs of the
/// partitions differ from it in the last byte.
pub fn write(disk: &mut File, id: [u8; 16], boot: &[u8], core: &[u8]) -> io::Result<()> {
    let total = disk.metadata()?.len() / SECTOR;
    let core = patched_core(core)?;
    let partitions = [
        (BIOS_BOOT, CORE, ESP_START - 1, "bios"),
        (ESP, ESP_START, ROOT_START - 1, "esp"),
        (LINUX, ROOT_START, root_end(total * SECTOR) - 1, "root"),
    ];
    let mut table = vec![0; 128 * 128];
    for (n, (kind, first, last, name)) in partitions.into_iter().enumerate() {
        let entry = &mut table[n * 128..(n + 1) * 128];
        let mut own = id;
        own[15] = own[15].wrapping_add(n as u8 + 1);
        entry[..16].copy_from_slice(&kind);
        entry[16..32].copy_from_slice(&own);
        entry[32..40].copy_from_slice(&first.to_le_bytes());
        entry[40..48].copy_from_slice(&last.to_le_bytes());
        for (at, unit) in name.encode_utf16().enumerate() {
            entry[56 + at * 2..58 + at * 2].copy_from_slice(&unit.to_le_bytes());
        }
    }
    let mut put = |sector: u64, bytes: &[u8]| {
        disk.seek(SeekFrom::Start(sector * SECTOR))?;
        disk.write_all(bytes)
    };
    put(0, &mbr(boot, total)?)?;
    put(1, &header(1, total - 1, 2, total, id, &table))?;
    put(2, &table)?;
    put(CORE, &core)?;
    put(total - 33, &table)?;
    put(total - 1, &header(total - 1, 1, total - 33, total, id, &table))
}

fn header(own: u64, other: u64, table_at: u64, total: u64, id: [u8; 16], table: &[u8]) -> Vec<u8> {
    let mut h = vec![0; SECTOR as usize];
    h[..8].copy_from_slice(b"EFI PART");
    h[8..12].copy_from_slice(&0x0001_0000_u32.to_le_bytes());
    h[12..16].copy_from_slice(&92_u32.to_le_bytes());
    h[24..32].copy_from_slice(&own.to_le_bytes());
    h[32..40].copy_from_slice(&other.to_le_bytes());
    h[40..48].copy_from_slice(&34_u64.to_le_bytes());
    h[48..56].copy_from_slice(&(total - 34).to_le_bytes());
    h[56..72].copy_from_slice(&id);
    h[72..80].copy_from_slice(&table_at.to_le_bytes());
    h[80..84].copy_from_slice(&128_u32.to_le_bytes());
    h[84..88].copy_from_slice(&128_u32.to_le_bytes());
    h[88..92].copy_from_slice(&crc32fast::hash(table).to_le_bytes());
    let sum = crc32fast::hash(&h[..92]);
    h[16..20].copy_from_slice(&sum.to_le_bytes());
    h
}

/// GRUB's first sector, with a protective partition table.
fn mbr(boot: &[u8], total: u64) -> io::Result<Vec<u8>> {
    if boot.len() < 440 {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "GRUB's boot.img is too short"));
    }
    let mut mbr = vec![0; SECTOR as usize];
    mbr[..440].copy_from_slice(&boot[..440]);
    // As grub-install does: sets where the core begins, takes the drive from
    // the BIOS, and skips the check for floppies.
    mbr[0x5c..0x64].copy_from_slice(&CORE.to_le_bytes());
    mbr[0x64] = 0xff;
    mbr[0x66..0x68].copy_from_slice(&[0x90, 0x90]);
    mbr[447..450].copy_from_slice(&[0, 2, 0]);
    mbr[450] = 0xee;
    mbr[451..454].copy_from_slice(&[0xff; 3]);
    mbr[454..458].copy_from_slice(&1_u32.to_le_bytes());
    let sectors = u32::try_from(total - 1).unwrap_or(u32::MAX);
    mbr[458..462].copy_from_slice(&sectors.to_le_bytes());
    mbr[510..].copy_from_slice(&[0x55, 0xaa]);
    Ok(mbr)
}

/// GRUB's core, whose first sector has the place of the second.
fn patched_core(core: &[u8]) -> io::Result<Vec<u8>> {
    let mut core = core.to_vec();
    core.resize(core.len().next_multiple_of(SECTOR as usize), 0);
    let sectors = core.len() as u64 / SECTOR;
    if sectors < 2 || CORE + sectors > ESP_START {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "GRUB's core.img does not fit its partition"));
    }
    core[0x1f4..0x1fc].copy_from_slice(&(CORE + 1).to_le_bytes());
    core[0x1fc..0x1fe].copy_from_slice(&(sectors as u16 - 1).to_le_bytes());
    core[0x1fe..0x200].copy_from_slice(&0x820_u16.to_le_bytes());
    Ok(core)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn both_tables_have_right_sums_and_point_to_each_other() {
        let mut disk = tempfile::tempfile().unwrap();
        disk.set_len(1 << 30).unwrap();
        write(&mut disk, [7; 16], &[0; 512], &[1; 100_000]).unwrap();
        let total = (1_u64 << 30) / SECTOR;
        let mut read = |sector: u64, n: usize| {
            let mut bytes = vec![0; n];
            disk.seek(SeekFrom::Start(sector * SECTOR)).unwrap();
            disk.read_exact(&mut bytes).unwrap();
            bytes
        };
        for (at, other) in [(1, total - 1), (total - 1, 1)] {
            let mut h = read(at, 92);
            assert_eq!(&h[..8], b"EFI PART");
            assert_eq!(u64::from_le_bytes(h[32..40].try_into().unwrap()), other);
            let sum = u32::from_le_bytes(h[16..20].try_into().unwrap());
            h[16..20].fill(0);
            assert_eq!(crc32fast::hash(&h), sum);
            let table_at = u64::from_le_bytes(h[72..80].try_into().unwrap());
            let table_sum = u32::from_le_bytes(h[88..92].try_into().unwrap());
            assert_eq!(crc32fast::hash(&read(table_at, 128 * 128)), table_sum);
        }
        assert_eq!(read(0, 512)[510..], [0x55, 0xaa]);
    }

    #[test]
    fn what_was_written_is_read_and_what_is_damaged_is_refused() {
        let mut disk = tempfile::tempfile().unwrap();
        disk.set_len(1 << 30).unwrap();
        write(&mut disk, [7; 16], &[0; 512], &[1; 100_000]).unwrap();
        let mut start = vec![0; 64 << 10];
        disk.seek(SeekFrom::Start(0)).unwrap();
        disk.read_exact(&mut start).unwrap();
        let parts = |bytes: &[u8], size: u64| {
            read(size, |at, buffer| {
                let at = usize::try_from(at).unwrap();
                buffer.copy_from_slice(&bytes[at..at + buffer.len()]);
                Ok(())
            })
        };
        let all = parts(&start, 1 << 30).unwrap();
        let names: Vec<&str> = all.iter().map(|p| p.name.as_str()).collect();
        assert_eq!((names, all[2].number), (vec!["bios", "esp", "root"], 3));
        assert_eq!(all[2].place, ROOT_START * SECTOR..root_end(1 << 30) * SECTOR);
        assert!(parts(&start, 1 << 20).is_err(), "a partition ends behind the disk");
        assert!(parts(&start, 1024).is_err());
        // The table's place, the number of entries, the length of one, and the
        // first sector of the first partition.
        for (at, value) in [(512 + 72, u64::MAX), (512 + 80, 1 << 31), (512 + 84, 1), (1024 + 32, u64::MAX)] {
            let mut damaged = start.clone();
            damaged[at..at + 8].copy_from_slice(&value.to_le_bytes());
            assert!(parts(&damaged, 1 << 30).is_err(), "{at}");
        }
    }

    #[test]
    fn a_core_that_does_not_fit_is_refused() {
        let mut disk = tempfile::tempfile().unwrap();
        disk.set_len(1 << 30).unwrap();
        assert!(write(&mut disk, [7; 16], &[0; 512], &vec![1; 2 << 20]).is_err());
        assert!(write(&mut disk, [7; 16], &[0; 100], &[1; 2000]).is_err());
    }
}

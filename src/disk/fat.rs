//! Finds a file in a FAT32 filesystem: enough for an EFI system partition.
//! Format: Microsoft's "FAT32 File System Specification".

use std::io;

use super::ext4::Source;

/// Maximum number of clusters of a directory that are read.
const MOST_CLUSTERS: u32 = 256;

fn odd(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

fn u16_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u16::from_le_bytes([bytes[at], bytes[at + 1]]))
}

fn u32_at(bytes: &[u8], at: usize) -> u64 {
    u16_at(bytes, at) | u16_at(bytes, at + 2) << 16
}

/// Returns the size in bytes of the file at `path`, given by its short names
/// (`EFI/BOOT/BOOTX64.EFI`). `None` if there is none, or the filesystem at
/// offset `start` is no FAT32.
///
/// # Errors
///
/// Something can't be read or is invalid.
pub fn size_of<S: Source>(disk: &mut S, start: u64, path: &str) -> io::Result<Option<u64>> {
    let mut boot = [0; 512];
    disk.read_at(start, &mut boot)?;
    if boot[510..] != [0x55, 0xAA] || boot[82..87] != *b"FAT32" {
        return Ok(None);
    }
    let (sector, per_cluster) = (u16_at(&boot, 11), u64::from(boot[13]));
    if !(512..=4096).contains(&sector) || per_cluster == 0 {
        return Err(odd("the filesystem has an invalid first sector"));
    }
    let table = start + u16_at(&boot, 14) * sector;
    let data = table + u64::from(boot[16]) * u32_at(&boot, 36) * sector;
    let volume = Volume { table, data, cluster: sector * per_cluster };
    let mut cluster = u32_at(&boot, 44);
    let mut parts = path.split('/').peekable();
    while let Some(part) = parts.next() {
        let Some(entry) = volume.find(disk, cluster, &short_name(part))? else { return Ok(None) };
        let is_dir = entry[11] & 0x10 != 0;
        if is_dir != parts.peek().is_some() {
            return Ok(None);
        }
        if !is_dir {
            return Ok(Some(u32_at(&entry, 28)));
        }
        cluster = u16_at(&entry, 20) << 16 | u16_at(&entry, 26);
    }
    Ok(None)
}

/// Where the parts of a filesystem are, in bytes.
struct Volume {
    table: u64,
    data: u64,
    cluster: u64,
}

impl Volume {
    /// Finds an entry in the directory that begins with a cluster.
    fn find<S: Source>(&self, disk: &mut S, first: u64, name: &[u8; 11]) -> io::Result<Option<[u8; 32]>> {
        let mut cluster = first;
        for _ in 0..MOST_CLUSTERS {
            // The end of a chain, or a mark.
            if !(2..0x0FFF_FFF7).contains(&cluster) {
                return Ok(None);
            }
            let mut bytes = vec![0; self.cluster as usize];
            disk.read_at(self.data + (cluster - 2) * self.cluster, &mut bytes)?;
            for entry in bytes.chunks_exact(32) {
                // Bit 3 of the attributes: a label, or a part of a long name.
                if entry[..11] == *name && entry[11] & 8 == 0 {
                    return Ok(Some(std::array::from_fn(|n| entry[n])));
                }
            }
            let mut next = [0; 4];
            disk.read_at(self.table + cluster * 4, &mut next)?;
            cluster = u32_at(&next, 0) & 0x0FFF_FFFF;
        }
        Err(odd("a directory is too large"))
    }
}

/// Writes a name as entries have it: eight characters and three.
fn short_name(name: &str) -> [u8; 11] {
    let (stem, extension) = name.split_once('.').unwrap_or((name, ""));
    let mut short = [b' '; 11];
    for (to, from) in short[..8].iter_mut().zip(stem.bytes()) {
        *to = from.to_ascii_uppercase();
    }
    for (to, from) in short[8..].iter_mut().zip(extension.bytes()) {
        *to = from.to_ascii_uppercase();
    }
    short
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Bytes(Vec<u8>);

    impl Source for Bytes {
        fn read_at(&mut self, at: u64, buffer: &mut [u8]) -> io::Result<()> {
            let found = self.0.get(at as usize..at as usize + buffer.len()).ok_or_else(|| odd("the end"))?;
            buffer.copy_from_slice(found);
            Ok(())
        }
    }

    #[test]
    fn a_file_is_found_by_its_path() {
        let dir = tempfile::tempdir().unwrap();
        let run = |line: &str| {
            let mut command = std::process::Command::new("sh");
            let output = command.args(["-c", line]).current_dir(dir.path()).output().unwrap();
            assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
        };
        run("truncate -s 64M esp && mkfs.vfat -F 32 -s 1 esp && mmd -i esp ::/EFI ::/EFI/BOOT && \
             head -c 5000 /dev/zero >x && mcopy -i esp x ::/EFI/BOOT/BOOTX64.EFI");
        let mut esp = Bytes(std::fs::read(dir.path().join("esp")).unwrap());
        let mut size = |path: &str| size_of(&mut esp, 0, path).unwrap();
        assert_eq!(size("EFI/BOOT/BOOTX64.EFI"), Some(5000));
        assert_eq!(size("EFI/BOOT"), None);
        assert_eq!(size("EFI/debian/grubx64.efi"), None);
        assert_eq!(size_of(&mut Bytes(vec![0; 512]), 0, "EFI").unwrap(), None);
    }
}

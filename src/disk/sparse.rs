//! Copies and shrinks large files that are mostly holes.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::io::Errno;

/// Copies a file to the empty file `target`. Shares its blocks if the
/// filesystem can, and otherwise keeps its holes.
pub fn copy(source: &File, target: &File) -> io::Result<()> {
    if rustix::fs::ioctl_ficlone(target, source).is_ok() {
        return Ok(());
    }
    let length = source.metadata()?.len();
    let mut buffer = vec![0; 1 << 20];
    target.set_len(length)?;
    let mut at = 0;
    while at < length {
        let start = match rustix::fs::seek(source, rustix::fs::SeekFrom::Data(at)) {
            Ok(start) => start,
            // Only a hole is left.
            Err(rustix::io::Errno::NXIO) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        let end = rustix::fs::seek(source, rustix::fs::SeekFrom::Hole(start))?;
        let (mut read_at, mut write_at) = (start, start);
        while read_at < end {
            let piece = (end - read_at).min(1 << 30) as usize;
            let copied =
                rustix::fs::copy_file_range(source, Some(&mut read_at), target, Some(&mut write_at), piece);
            let n = match copied {
                // Two filesystems, or one that does not support it.
                Err(Errno::XDEV | Errno::NOSYS | Errno::OPNOTSUPP | Errno::INVAL) => {
                    let piece = piece.min(buffer.len());
                    let n = source.read_at(&mut buffer[..piece], read_at)?;
                    target.write_all_at(&buffer[..n], write_at)?;
                    read_at += n as u64;
                    write_at += n as u64;
                    n
                }
                copied => copied?,
            };
            if n == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        at = end;
    }
    Ok(())
}

/// The unit of holes, in bytes: a page of a machine's memory, and a block of
/// most filesystems.
const BLOCK: usize = 4096;

/// Replaces blocks of zeros by holes. Does nothing if the filesystem has no
/// holes.
pub fn punch(file: &File) -> io::Result<()> {
    let length = file.metadata()?.len();
    let mut buffer = vec![0; 1 << 20];
    let mut at = 0;
    while at < length {
        let start = match rustix::fs::seek(file, rustix::fs::SeekFrom::Data(at)) {
            Err(Errno::NXIO) => return Ok(()),
            start => start?,
        };
        // From the beginning of a block, the data consists of whole blocks,
        // except at the end of the file.
        let start = start - start % BLOCK as u64;
        let end = rustix::fs::seek(file, rustix::fs::SeekFrom::Hole(start))?;
        let end = end.next_multiple_of(BLOCK as u64).min(length);
        let piece = buffer.len().min(usize::try_from(end - start).unwrap_or(usize::MAX));
        file.read_exact_at(&mut buffer[..piece], start)?;
        let zero = |block: &[u8]| block.iter().all(|byte| *byte == 0);
        let mut from = None;
        let blocks = buffer[..piece].chunks(BLOCK).map(zero).chain([false]);
        for (n, is_zero) in blocks.enumerate() {
            match (is_zero, from) {
                (true, None) => from = Some(n),
                (false, Some(first)) => {
                    let (offset, long) = (first * BLOCK, ((n - first) * BLOCK).min(piece - first * BLOCK));
                    let flags =
                        rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
                    match rustix::fs::fallocate(file, flags, start + offset as u64, long as u64) {
                        Err(Errno::OPNOTSUPP | Errno::NOSYS) => return Ok(()),
                        done => done?,
                    }
                    from = None;
                }
                _ => {}
            }
        }
        at = start + piece as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn holes_and_data_are_copied() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("a"), dir.path().join("b"));
        let file = File::create(&from).unwrap();
        file.set_len(64 << 20).unwrap();
        file.write_all_at(b"middle", 32 << 20).unwrap();
        let source = File::open(&from).unwrap();
        copy(&source, &File::create(&to).unwrap()).unwrap();
        assert_eq!(fs::read(&from).unwrap(), fs::read(&to).unwrap());
        assert!(fs::metadata(&to).unwrap().blocks() * 512 < 8 << 20, "the holes were filled");
        // To another filesystem, where the kernel does not copy.
        if let Ok(other) = tempfile::tempdir_in("/dev/shm") {
            let far = other.path().join("c");
            copy(&source, &File::create(&far).unwrap()).unwrap();
            assert_eq!(fs::read(&from).unwrap(), fs::read(&far).unwrap());
        }
    }

    #[test]
    fn zeros_become_holes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let mut bytes = vec![0; (3 << 20) + 100];
        for at in [0, 5000, (1 << 20) - 1, (2 << 20) + 7, (3 << 20) + 50] {
            bytes[at] = 1;
        }
        fs::write(&path, &bytes).unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        let before = file.metadata().unwrap().blocks();
        punch(&file).unwrap();
        assert!(fs::read(&path).unwrap() == bytes, "what is read must not change");
        let after = file.metadata().unwrap().blocks();
        assert!(after < before / 4, "{after} of {before} blocks are left");
        // A file of only zeros, and an empty file.
        fs::write(&path, vec![0; 1 << 20]).unwrap();
        punch(&file).unwrap();
        assert_eq!((file.metadata().unwrap().blocks(), file.metadata().unwrap().len()), (0, 1 << 20));
        fs::write(&path, "").unwrap();
        punch(&file).unwrap();
    }
}

//! Copies large files that are mostly holes.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::io::Errno;

/// Copies a file, sharing its blocks where the filesystem can and keeping its
/// holes where it can't. `target` is empty.
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
                // Two filesystems, or one that can't.
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
}

//! Writes finished disks to where the recipe wants them, if they are not
//! there already.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use crate::event::{Event, Sink};
use crate::plan::Wanted;
use crate::store::{ProjectFiles, Store, WrittenOutput};

/// Writes the files that are wanted, and whose states are there, below `dir`.
pub fn write_outputs(
    wanted: &[Wanted],
    store: &Store,
    notes: &ProjectFiles,
    dir: &Path,
    sink: &Sink,
) -> Result<(), (PathBuf, io::Error)> {
    let mut known = notes.outputs();
    let mut changed = false;
    for Wanted { image, path, key } in wanted {
        let key = *key;
        let Some(record) = store.record(&key) else { continue };
        let to = dir.join(path);
        let told = |unchanged| Event::Written {
            image: image.clone(),
            path: to.display().to_string(),
            bytes: fs::metadata(&to).map_or(0, |m| m.blocks() * 512),
            unchanged,
        };
        let now = stamp(&to);
        if now.is_some_and(|stamp| known.get(&to) == Some(&WrittenOutput { key, stamp })) {
            sink(told(true));
            continue;
        }
        let from = store.state_dir(&key).join(record.disk.kind.file_name());
        copy(&from, &to).map_err(|e| (to.clone(), e))?;
        if let Some(stamp) = stamp(&to) {
            known.insert(to.clone(), WrittenOutput { key, stamp });
            changed = true;
        }
        sink(told(false));
    }
    if changed {
        // Losing these notes costs a copy.
        let _ = notes.set_outputs(&known);
    }
    Ok(())
}

fn stamp(path: &Path) -> Option<[i64; 4]> {
    let meta = fs::metadata(path).ok()?;
    Some([meta.ino() as i64, meta.len() as i64, meta.mtime(), meta.mtime_nsec()])
}

/// Copies a disk, sharing its blocks where the filesystem can and keeping its
/// holes where it can't; `to` has the old or the new content, never a part.
fn copy(from: &Path, to: &Path) -> io::Result<()> {
    if let Some(dir) = to.parent() {
        fs::create_dir_all(dir)?;
    }
    let name = to.file_name().unwrap_or_default().to_string_lossy();
    let new = to.with_file_name(format!(".{name}.vimg-new"));
    let written = (|| {
        let source = File::open(from)?;
        let target = File::create(&new)?;
        if rustix::fs::ioctl_ficlone(&target, &source).is_err() {
            copy_data(&source, &target)?;
        }
        target.sync_all()?;
        fs::rename(&new, to)?;
        // The name, too, is to survive a power cut.
        match to.parent().filter(|p| !p.as_os_str().is_empty()) {
            Some(dir) => File::open(dir)?.sync_all(),
            None => Ok(()),
        }
    })();
    if written.is_err() {
        let _ = fs::remove_file(&new);
    }
    written
}

fn copy_data(source: &File, target: &File) -> io::Result<()> {
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

    #[test]
    fn holes_and_data_are_copied() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("a"), dir.path().join("x/b"));
        let file = File::create(&from).unwrap();
        file.set_len(64 << 20).unwrap();
        file.write_all_at(b"middle", 32 << 20).unwrap();
        copy(&from, &to).unwrap();
        assert_eq!(fs::read(&from).unwrap(), fs::read(&to).unwrap());
        assert!(fs::metadata(&to).unwrap().blocks() * 512 < 8 << 20, "the holes were filled");
        // To another filesystem, where the kernel does not copy.
        if let Ok(other) = tempfile::tempdir_in("/dev/shm") {
            let far = other.path().join("c");
            copy(&from, &far).unwrap();
            assert_eq!(fs::read(&from).unwrap(), fs::read(&far).unwrap());
        }
    }
}

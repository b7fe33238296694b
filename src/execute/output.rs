//! Writes finished disks to where the recipe wants them, if they are not
//! there already and their images have passed.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::AtFlags;

use super::drafts::Drafts;
use crate::event::{Event, Sink};
use crate::plan::Wanted;
use crate::sparse;
use crate::store::{ProjectFiles, Store, WrittenOutput};

/// Writes the files that are wanted, and whose states are there, below `dir`.
pub fn write_outputs(
    wanted: &[Wanted],
    store: &Store,
    notes: &ProjectFiles,
    dir: &Path,
    drafts: &Drafts,
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
        let ready = drafts.take(&key, &to).and_then(|copy| name(&copy, &to).ok());
        let written = match ready {
            Some(()) => put(&to),
            None => copy(&store.state_dir(&key).join(record.disk.kind.file_name()), &to),
        };
        written.map_err(|e| (to.clone(), e))?;
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
    let new = draft(to);
    let fill = |source: File| fill(&source, File::create(&new)?);
    let written = File::open(from).and_then(fill).and_then(|_| put(to));
    if written.is_err() {
        let _ = fs::remove_file(&new);
    }
    written
}

/// Where a file is before it takes its place.
fn draft(to: &Path) -> PathBuf {
    let name = to.file_name().unwrap_or_default().to_string_lossy();
    to.with_file_name(format!(".{name}.vimg-new"))
}

fn fill(source: &File, target: File) -> io::Result<File> {
    sparse::copy(source, &target)?;
    target.sync_all()?;
    Ok(target)
}

/// Gives a copy its first name.
fn name(copy: &File, to: &Path) -> io::Result<()> {
    let new = draft(to);
    // Left by somebody who was killed.
    let _ = fs::remove_file(&new);
    let own = format!("/proc/self/fd/{}", copy.as_raw_fd());
    rustix::fs::linkat(rustix::fs::CWD, own, rustix::fs::CWD, new, AtFlags::SYMLINK_FOLLOW)?;
    Ok(())
}

/// Puts what was written in its place.
fn put(to: &Path) -> io::Result<()> {
    fs::rename(draft(to), to)?;
    // The name, too, is to survive a power cut.
    match to.parent().filter(|p| !p.as_os_str().is_empty()) {
        Some(dir) => File::open(dir)?.sync_all(),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::{Mode, OFlags};

    use super::*;

    #[test]
    fn a_copy_without_a_name_takes_its_place() {
        let dir = tempfile::tempdir().unwrap();
        let to = dir.path().join("it.img");
        fs::write(&to, "old").unwrap();
        // Somebody was killed.
        fs::write(draft(&to), "half a di").unwrap();
        let flags = OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC;
        let copy = File::from(rustix::fs::open(dir.path(), flags, Mode::from_raw_mode(0o666)).unwrap());
        io::copy(&mut b"new".as_slice(), &mut &copy).unwrap();
        name(&copy, &to).unwrap();
        put(&to).unwrap();
        assert_eq!(fs::read_to_string(&to).unwrap(), "new");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}

//! Writes finished disks to where the recipe wants them, if they are not
//! there already. A disk is copied as soon as there is one, beside its place
//! and while its image is still checked, and put in its place when the image
//! has passed.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::thread::JoinHandle;

use crate::digest::Key;
use rustix::fs::{AtFlags, Mode, OFlags};

use crate::event::{Event, Sink};
use crate::graph::{NodeId, Target};
use crate::plan::Wanted;
use crate::sparse;
use crate::store::{ProjectFiles, Store, WrittenOutput};

/// Copies that are made ahead.
#[derive(Debug, Default)]
pub struct Drafts {
    /// What may be wanted where.
    places: BTreeMap<NodeId, Vec<PathBuf>>,
    begun: Mutex<BTreeMap<PathBuf, Draft>>,
}

/// A copy that has no name yet, and is gone with who makes it.
#[derive(Debug)]
struct Draft {
    key: Key,
    thread: JoinHandle<io::Result<File>>,
}

impl Drafts {
    /// For what may be wanted below `dir`.
    pub fn new<'a>(targets: impl Iterator<Item = &'a Target>, dir: &Path) -> Self {
        let mut places: BTreeMap<NodeId, Vec<PathBuf>> = BTreeMap::new();
        for target in targets {
            places.entry(target.node).or_default().push(dir.join(&target.output.path));
        }
        Self { places, begun: Mutex::default() }
    }

    /// Begins to copy a disk that is there now. What fails of that is copied
    /// when it is wanted; so is what goes to a directory that is not there yet.
    pub(super) fn begin(&self, id: NodeId, key: &Key, disk: &Path) {
        for to in self.places.get(&id).into_iter().flatten() {
            let (Ok(source), Ok(target)) = (File::open(disk), nameless(to)) else { continue };
            let fill = move || fill(&source, target);
            let Ok(thread) = std::thread::Builder::new().spawn(fill) else { continue };
            let mut begun = self.begun.lock().unwrap_or_else(PoisonError::into_inner);
            begun.insert(to.clone(), Draft { key: *key, thread });
        }
    }

    /// A copy of this disk that was made for `to`.
    fn take(&self, key: &Key, to: &Path) -> Option<File> {
        let draft = self.begun.lock().unwrap_or_else(PoisonError::into_inner).remove(to)?;
        if draft.key == *key { draft.thread.join().ok()?.ok() } else { None }
    }
}

/// Makes a file beside `to` that nobody finds. Not all filesystems can.
fn nameless(to: &Path) -> io::Result<File> {
    let flags = OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC;
    let dir = to.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    Ok(File::from(rustix::fs::open(dir, flags, Mode::from_raw_mode(0o666))?))
}

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
    use super::*;
    use crate::digest::Digest;

    #[test]
    fn a_copy_has_no_name_before_it_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        let (disk, to) = (dir.path().join("disk"), dir.path().join("it.img"));
        let [key, other] = [b"a", b"b"].map(|bytes| Key(Digest::of(bytes)));
        fs::write(&disk, "new").unwrap();
        fs::write(&to, "old").unwrap();
        let id = NodeId::of(0);
        let drafts = Drafts { places: BTreeMap::from([(id, vec![to.clone()])]), begun: Mutex::default() };
        let names = || fs::read_dir(dir.path()).unwrap().count();
        drafts.begin(id, &key, &disk);
        assert!(drafts.take(&other, &to).is_none(), "it is of another disk");
        drafts.begin(id, &key, &disk);
        let copy = drafts.take(&key, &to).unwrap();
        assert_eq!((names(), fs::read_to_string(&to).unwrap()), (2, "old".into()));
        fs::write(draft(&to), "half a di").unwrap();
        name(&copy, &to).unwrap();
        put(&to).unwrap();
        assert_eq!((names(), fs::read_to_string(&to).unwrap()), (2, "new".into()));
        assert!(drafts.take(&key, &to).is_none());
    }
}

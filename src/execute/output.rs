//! Writes finished disks to where the recipe wants them, if they are not
//! there already. A disk is copied as soon as there is one, beside its place
//! and while its image is still checked, and put in its place when the image
//! has passed.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::thread::JoinHandle;

use crate::digest::Key;
use crate::event::{Event, Sink};
use crate::graph::{NodeId, Target};
use crate::plan::Wanted;
use crate::sparse;
use crate::store::{ProjectFiles, Store, WrittenOutput};

/// Copies that are made ahead. Those that nobody takes are removed.
#[derive(Debug, Default)]
pub struct Drafts {
    /// What may be wanted where.
    places: BTreeMap<NodeId, Vec<PathBuf>>,
    begun: Mutex<BTreeMap<PathBuf, Draft>>,
}

#[derive(Debug)]
struct Draft {
    key: Key,
    thread: JoinHandle<io::Result<()>>,
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
    /// when it is wanted.
    pub(super) fn begin(&self, id: NodeId, key: &Key, disk: &Path) {
        for to in self.places.get(&id).into_iter().flatten() {
            let (Ok(source), new) = (File::open(disk), draft(to)) else { continue };
            // No directory is made for what may never be wanted.
            if !new.parent().is_some_and(Path::is_dir) {
                continue;
            }
            let thread = std::thread::spawn(move || fill(&source, &new));
            let mut begun = self.begun.lock().unwrap_or_else(PoisonError::into_inner);
            begun.insert(to.clone(), Draft { key: *key, thread });
        }
    }

    /// Whether a copy of this disk lies ready beside `to`.
    fn take(&self, key: &Key, to: &Path) -> bool {
        let mut begun = self.begun.lock().unwrap_or_else(PoisonError::into_inner);
        match begun.remove(to) {
            Some(draft) if draft.key == *key => matches!(draft.thread.join(), Ok(Ok(()))),
            Some(other) => {
                let _ = other.thread.join();
                false
            }
            None => false,
        }
    }
}

impl Drop for Drafts {
    fn drop(&mut self) {
        let begun = self.begun.get_mut().unwrap_or_else(PoisonError::into_inner);
        for (to, Draft { thread, .. }) in std::mem::take(begun) {
            let _ = thread.join();
            let _ = fs::remove_file(draft(&to));
        }
    }
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
        let written = match drafts.take(&key, &to) {
            true => put(&to),
            false => copy(&store.state_dir(&key).join(record.disk.kind.file_name()), &to),
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
    let written = File::open(from).and_then(|source| fill(&source, &new)).and_then(|()| put(to));
    if written.is_err() {
        let _ = fs::remove_file(&new);
    }
    written
}

/// Where a file is written before it takes its place.
fn draft(to: &Path) -> PathBuf {
    let name = to.file_name().unwrap_or_default().to_string_lossy();
    to.with_file_name(format!(".{name}.vimg-new"))
}

fn fill(source: &File, new: &Path) -> io::Result<()> {
    let target = File::create(new)?;
    sparse::copy(source, &target)?;
    target.sync_all()
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

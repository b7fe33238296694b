//! Writes finished disks to where the recipe wants them, if they are not
//! there already.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

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
        sparse::copy(&source, &target)?;
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

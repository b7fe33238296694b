//! Writes outputs to the paths that the recipe names, unless the file there is
//! up to date.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use super::staged::StagedOutputs;
use crate::disk::sparse;
use crate::event::{Event, Sink};
use crate::files::{Place, Places};
use crate::plan::Wanted;
use crate::store::{ProjectFiles, Store, WrittenOutput};

/// Writes the wanted outputs whose states exist, below a directory. The caller
/// leaves out images whose checks have not passed. The error names the path
/// that can't be written.
pub fn write_outputs(
    wanted: &[Wanted],
    store: &Store,
    notes: &ProjectFiles,
    places: &Places,
    staged: &StagedOutputs,
    sink: &Sink,
) -> Result<(), (PathBuf, io::Error)> {
    let mut known = notes.outputs();
    let mut changed = false;
    for Wanted { image, path, key } in wanted {
        let key = *key;
        let Some(record) = store.record(&key) else { continue };
        let to = places.path(path);
        let place = places.at(path, true).map_err(|e| (to.clone(), e))?;
        let told = |unchanged| Event::Written {
            image: image.clone(),
            path: to.display().to_string(),
            bytes: place.stat().map_or(0, |stat| stat.st_blocks as u64 * 512),
            unchanged,
        };
        let now = stamp(&place);
        if now.is_some_and(|stamp| known.get(&to) == Some(&WrittenOutput { key, stamp })) {
            sink(told(true));
            continue;
        }
        let ready = staged.take(&key, &to).and_then(|copy| place.name(&copy).ok());
        let written = match ready {
            Some(()) => place.put(),
            None => copy(&store.state_dir(&key).join(record.disk.kind.file_name()), &place),
        };
        written.map_err(|e| (to.clone(), e))?;
        if let Some(stamp) = stamp(&place) {
            known.insert(to.clone(), WrittenOutput { key, stamp });
            changed = true;
        }
        sink(told(false));
    }
    if changed {
        // Without these notes, the next build copies once more.
        let _ = notes.set_outputs(&known);
    }
    Ok(())
}

/// Returns what changes of a file when it is written. Its change time is part
/// of that, because no program can set it back.
fn stamp(place: &Place) -> Option<[i64; 6]> {
    let stat = place.stat()?;
    let (mtime, ctime) = (stat.st_mtime_nsec as i64, stat.st_ctime_nsec as i64);
    Some([stat.st_ino as i64, stat.st_size, stat.st_mtime, mtime, stat.st_ctime, ctime])
}

/// Copies a disk. Shares its blocks if the filesystem can, and otherwise keeps
/// its holes. The place has the old or the new content, never a part of it.
fn copy(from: &Path, to: &Place) -> io::Result<()> {
    let written = File::open(from).and_then(|source| {
        let target = to.draft()?;
        sparse::copy(&source, &target)?;
        target.sync_all()?;
        to.put()
    });
    if written.is_err() {
        to.give_up();
    }
    written
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn a_copy_without_a_name_takes_its_place() {
        let dir = tempfile::tempdir().unwrap();
        let to = dir.path().join("it.img");
        fs::write(&to, "old").unwrap();
        // A vimg that was killed left this.
        fs::write(dir.path().join(".it.img.vimg-new"), "half a di").unwrap();
        let place = Places::open(dir.path()).unwrap().at("it.img", false).unwrap();
        let copy = place.nameless().unwrap();
        io::copy(&mut b"new".as_slice(), &mut &copy).unwrap();
        place.name(&copy).unwrap();
        place.put().unwrap();
        assert_eq!(fs::read_to_string(&to).unwrap(), "new");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_file_that_was_changed_and_got_its_time_back_is_another() {
        let dir = tempfile::tempdir().unwrap();
        let to = dir.path().join("it.img");
        fs::write(&to, "one").unwrap();
        let place = Places::open(dir.path()).unwrap().at("it.img", false).unwrap();
        let before = stamp(&place).unwrap();
        let time = fs::metadata(&to).unwrap().modified().unwrap();
        // The kernel's clock ticks every few milliseconds.
        while fs::metadata(&to).unwrap().ctime_nsec() == before[5] {
            fs::write(&to, "two").unwrap();
        }
        File::options().write(true).open(&to).unwrap().set_modified(time).unwrap();
        let after = stamp(&place).unwrap();
        assert_eq!(before[..4], after[..4]);
        assert_ne!(before, after);
    }
}

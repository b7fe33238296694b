//! Notes of a project's last build. They explain and speed up the next build.
//! Losing them costs reasons and time, never correctness.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use super::record::StateId;
use super::replace::replace_note;
use crate::digest::Key;
use crate::files::Stamps;

/// A project's notes.
#[derive(Debug, Clone)]
pub struct ProjectFiles {
    dir: PathBuf,
    /// The project's root, if it is known.
    root: Option<PathBuf>,
}

/// A project's last build.
#[derive(Debug, Clone, Default)]
pub struct Last {
    /// The keys of its nodes.
    pub nodes: BTreeMap<String, Key>,
    /// Which of these states are complete, as [`super::Store::complete`] returns
    /// it.
    pub complete: HashMap<Key, Option<StateId>>,
}

/// An output file that was written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WrittenOutput {
    /// The key of its state.
    pub key: Key,
    /// The metadata of the file: inode, size, modification and change time,
    /// each with nanoseconds.
    pub stamp: [i64; 6],
}

/// The disk of a failed layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailedDisk {
    /// The state below the layer, as the recipe says.
    pub below: (Key, StateId),
    /// The state that the disk lies on: the same, or a near-identical one after
    /// a retarget.
    pub on: (Key, StateId),
    /// What failed.
    pub why: String,
}

impl ProjectFiles {
    pub(super) fn new(dir: PathBuf, root: Option<PathBuf>) -> Self {
        Self { dir, root }
    }

    /// Returns the path of the project these notes are of; `None` if it does not
    /// exist any more. Old notes do not say it.
    pub(super) fn is_alive(&self) -> Option<String> {
        use std::os::unix::ffi::OsStringExt;
        match fs::read(self.dir.join("root")) {
            Ok(bytes) => {
                let root = PathBuf::from(std::ffi::OsString::from_vec(bytes));
                root.exists().then(|| root.display().to_string())
            }
            Err(_) => Some("a project".into()),
        }
    }

    /// Returns the keys of the project's nodes when they last existed.
    pub fn nodes(&self) -> BTreeMap<String, Key> {
        self.read("nodes")
    }

    /// Changes [`ProjectFiles::nodes`]. Builds of one project at the same time
    /// change them one after the other, so that none loses what another adds.
    ///
    /// # Errors
    ///
    /// They can't be locked or written.
    pub fn change_nodes(&self, change: impl FnOnce(&mut BTreeMap<String, Key>)) -> io::Result<()> {
        fs::create_dir_all(&self.dir)?;
        let lock = fs::File::create(self.dir.join("nodes.lock"))?;
        rustix::fs::flock(&lock, FlockOperation::LockExclusive)?;
        let before = self.nodes();
        let mut nodes = before.clone();
        change(&mut nodes);
        if nodes == before {
            return Ok(());
        }
        if let Some(root) = &self.root {
            replace_note(&self.dir.join("root"), root.as_os_str().as_encoded_bytes())?;
        }
        self.write("nodes", &nodes)
    }

    /// Returns the written outputs, by absolute path.
    pub fn outputs(&self) -> BTreeMap<PathBuf, WrittenOutput> {
        self.read("outputs")
    }

    /// Replaces [`ProjectFiles::outputs`].
    pub fn set_outputs(&self, outputs: &BTreeMap<PathBuf, WrittenOutput>) -> io::Result<()> {
        self.write("outputs", outputs)
    }

    /// Returns digests of unchanged files.
    pub fn stamps(&self) -> Stamps {
        fs::read(self.dir.join("stamps")).map_or_else(|_| Stamps::default(), |b| Stamps::from_bytes(&b))
    }

    /// Replaces [`ProjectFiles::stamps`] if they changed.
    pub fn set_stamps(&self, stamps: &Stamps) -> io::Result<()> {
        match stamps.to_bytes() {
            Some(bytes) => replace_note(&self.dir.join("stamps"), &bytes),
            None => Ok(()),
        }
    }

    /// Returns the plan cache of the last build.
    pub fn standing<T: for<'a> Deserialize<'a>>(&self) -> Option<T> {
        postcard::from_bytes(&fs::read(self.dir.join("standing")).ok()?).ok()
    }

    /// Replaces [`ProjectFiles::standing`].
    pub fn set_standing<T: Serialize>(&self, standing: &T) -> io::Result<()> {
        self.write("standing", standing)
    }

    /// Returns the path of the log of a node's last failure.
    pub fn failed_log(&self, node: &str) -> PathBuf {
        self.of_failed(node, "zst")
    }

    /// Keeps the disk of a failed node, in the place of an earlier one.
    pub fn keep_failed(&self, node: &str, disk: &Path, failed: &FailedDisk) -> io::Result<()> {
        self.forget_failed(node);
        fs::create_dir_all(self.dir.join("failed"))?;
        fs::rename(disk, self.of_failed(node, "qcow2"))?;
        let bytes = postcard::to_stdvec(failed).map_err(io::Error::other)?;
        replace_note(&self.of_failed(node, "disk"), &bytes)
    }

    /// Returns the disk of a failed node, and its description.
    pub fn failed(&self, node: &str) -> Option<(PathBuf, FailedDisk)> {
        let failed = postcard::from_bytes(&fs::read(self.of_failed(node, "disk")).ok()?).ok()?;
        let disk = self.of_failed(node, "qcow2");
        disk.exists().then_some((disk, failed))
    }

    /// Removes the disk of a failed node, if there is one.
    pub fn forget_failed(&self, node: &str) {
        for kind in ["disk", "qcow2"] {
            let _ = fs::remove_file(self.of_failed(node, kind));
        }
    }

    fn of_failed(&self, node: &str, kind: &str) -> PathBuf {
        // `@`, `:` and `#` are allowed in file names.
        self.dir.join("failed").join(format!("{}.{kind}", node.replace('/', "+")))
    }

    fn read<T: for<'a> Deserialize<'a> + Default>(&self, name: &str) -> T {
        fs::read(self.dir.join(name)).ok().and_then(|b| postcard::from_bytes(&b).ok()).unwrap_or_default()
    }

    fn write<T: Serialize>(&self, name: &str, value: &T) -> io::Result<()> {
        let bytes = postcard::to_stdvec(value).map_err(io::Error::other)?;
        replace_note(&self.dir.join(name), &bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::Digest;

    #[test]
    fn builds_at_the_same_time_lose_no_notes_of_each_other() {
        let dir = tempfile::tempdir().unwrap();
        let notes = ProjectFiles::new(dir.path().join("id"), Some(dir.path().to_owned()));
        let add = |build: usize| {
            for n in 0..20 {
                let name = format!("{build}:{n}");
                let key = Key(Digest::of(name.as_bytes()));
                notes.change_nodes(|nodes| nodes.extend([(name, key)])).unwrap();
            }
        };
        std::thread::scope(|scope| {
            (0..4).for_each(|build| {
                drop(scope.spawn({
                    let add = &add;
                    move || add(build)
                }))
            });
        });
        assert_eq!(notes.nodes().len(), 80);
        assert_eq!(notes.is_alive(), Some(dir.path().display().to_string()));
    }
}

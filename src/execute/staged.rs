//! Staged outputs: copies of disks that are made before they are needed. While
//! an image is still built, vimg copies its previous output, to revise the copy
//! later. While the image is checked, vimg copies the new output next to its
//! place.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use tokio::sync::oneshot;

use crate::digest::Key;
use crate::disk::sparse;
use crate::disk::{DiskTool, Exported, direct};
use crate::files::{Place, Places};
use crate::store::{DiskKind, Staging, StateId, Store};

/// A copy that may turn out useless is made only if this many times its size is
/// free on the disk.
const ROOM: u64 = 4;

/// The staged outputs of a build.
#[derive(Default)]
pub struct StagedOutputs {
    /// The places of each output.
    places: BTreeMap<String, Vec<Place>>,
    earlier: Mutex<BTreeMap<String, Earlier>>,
    /// Held while a previous output is copied, so that each copy sees how much
    /// space the others took.
    turn: Arc<Mutex<()>>,
    begun: Mutex<BTreeMap<PathBuf, StagedCopy>>,
}

/// A copy without a name. The kernel removes it when vimg ends.
#[derive(Debug)]
struct StagedCopy {
    key: Key,
    thread: JoinHandle<io::Result<File>>,
}

/// Copies of a disk, by the path that each is for.
pub(super) type Copies = BTreeMap<PathBuf, File>;

/// A previous output.
pub(super) struct Before {
    /// Its state.
    pub(super) state: (Key, StateId),
    /// The state that it was written from.
    pub(super) source: (Key, StateId),
    /// Its file, and the chain that it was exported from.
    pub(super) exported: Exported,
}

/// Copies of a previous output.
pub(super) struct Earlier {
    of: Before,
    /// The directory of the copy that becomes the output's state.
    staging: Staging,
    done: oneshot::Receiver<(File, Copies)>,
}

impl StagedOutputs {
    /// Makes staged outputs below a directory, from the names of their nodes and
    /// their paths. An output in a directory that does not exist yet is not
    /// staged.
    pub fn new<'a>(targets: impl Iterator<Item = (&'a str, &'a str)>, below: &Places) -> Self {
        let mut places: BTreeMap<String, Vec<Place>> = BTreeMap::new();
        for (node, path) in targets {
            places.entry(node.to_owned()).or_default().extend(below.at(path, false));
        }
        Self { places, ..Self::default() }
    }

    fn places(&self, node: &str) -> impl Iterator<Item = &Place> {
        self.places.get(node).into_iter().flatten()
    }

    /// Whether copying the previous output was begun.
    pub(super) fn has_earlier(&self, node: &str) -> bool {
        self.earlier.lock().unwrap_or_else(PoisonError::into_inner).contains_key(node)
    }

    /// Begins to copy a previous output, to `staging` and next to its places.
    /// Best effort.
    pub(super) fn copy_earlier(&self, node: &str, of: Before, staging: Staging) {
        let (from, own) = (of.exported.disk.clone(), staging.path().join(DiskKind::Qcow2.file_name()));
        let turn = self.turn.clone();
        let places: Vec<Place> = self.places(node).cloned().collect();
        let (tell, done) = oneshot::channel();
        let copy = move || {
            let _turn = turn.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(copies) = copies(&from, &own, places) {
                let _ = tell.send(copies);
            }
        };
        if std::thread::Builder::new().spawn(copy).is_ok() {
            let mut all = self.earlier.lock().unwrap_or_else(PoisonError::into_inner);
            all.insert(node.to_owned(), Earlier { of, staging, done });
        }
    }

    /// Takes the copies of a previous output.
    pub(super) fn take_earlier(&self, node: &str) -> Option<Earlier> {
        self.earlier.lock().unwrap_or_else(PoisonError::into_inner).remove(node)
    }

    /// Begins to copy a finished output next to its places. It uses those of
    /// `copies` that exist. A copy that fails is made when the output is
    /// written.
    pub(super) fn begin(&self, node: &str, key: &Key, disk: &Path, mut copies: Copies) {
        for place in self.places(node) {
            let to = place.path();
            let there = copies.remove(to).map(|copy| (copy, true));
            let Some((copy, is_there)) = there.or_else(|| Some((place.nameless().ok()?, false))) else {
                continue;
            };
            let Ok(disk) = File::open(disk) else { continue };
            let finish = move || {
                if !is_there {
                    sparse::copy(&disk, &copy)?;
                }
                copy.sync_all()?;
                Ok(copy)
            };
            let Ok(thread) = std::thread::Builder::new().spawn(finish) else { continue };
            let mut begun = self.begun.lock().unwrap_or_else(PoisonError::into_inner);
            begun.insert(to.to_owned(), StagedCopy { key: *key, thread });
        }
    }

    /// Takes the copy of this output that was made for `to`.
    pub(super) fn take(&self, key: &Key, to: &Path) -> Option<File> {
        let copy = self.begun.lock().unwrap_or_else(PoisonError::into_inner).remove(to)?;
        if copy.key == *key { copy.thread.join().ok()?.ok() } else { None }
    }
}

impl Earlier {
    /// Changes the copies to the content of another chain. Returns the
    /// directory of the new output, and the copies for its places.
    pub(super) async fn revise(
        self,
        store: &Store,
        disks: &dyn DiskTool,
        chain: &[PathBuf],
    ) -> Option<(Staging, Copies)> {
        let (own, copies) = self.done.await.ok()?;
        let Before { state, source, exported } = self.of;
        let disk = self.staging.path().join(DiskKind::Qcow2.file_name());
        let was = Exported { disk, ..exported };
        let (places, copies): (Vec<PathBuf>, Vec<File>) = copies.into_iter().unzip();
        let all = std::iter::once(own).chain(copies).collect();
        let mut revised = disks.revise(chain, &was, all).await?.into_iter();
        revised.next()?;
        // Another process may have replaced a state that was read.
        let is_there = |(key, id): &(Key, StateId)| store.record(key).is_some_and(|now| now.id == *id);
        let stood = is_there(&state) && store.chain_of(&source).is_some_and(|now| now == was.chain);
        stood.then_some(())?;
        Some((self.staging, places.into_iter().zip(revised).collect()))
    }
}

/// Copies a disk to `own`, and to files without names for `places`.
fn copies(from: &Path, own: &Path, places: Vec<Place>) -> Option<(File, Copies)> {
    let most = from.metadata().ok()?.len().saturating_mul(ROOM);
    let has_room = |file: &File| rustix::fs::fstatvfs(file).is_ok_and(|s| s.f_bavail * s.f_frsize > most);
    let own = File::create_new(own).ok().filter(has_room)?;
    let open = |to: Place| Some((to.nameless().ok().filter(has_room)?, to.path().to_owned()));
    let (files, places): (Vec<File>, Vec<PathBuf>) = places.into_iter().filter_map(open).unzip();
    let mut copied = direct::copy(from, std::iter::once(own).chain(files).collect()).ok()?.into_iter();
    let own = copied.next()?.ok()?;
    Some((own, places.into_iter().zip(copied).filter_map(|(to, copy)| Some((to, copy.ok()?))).collect()))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::{Read, Seek};
    use std::os::fd::AsRawFd;

    use super::*;
    use crate::digest::Digest;

    fn content(copy: &File) -> String {
        let mut text = String::new();
        let path = format!("/proc/self/fd/{}", copy.as_raw_fd());
        File::open(path).unwrap().read_to_string(&mut text).unwrap();
        text
    }

    #[test]
    fn a_copy_has_no_name_before_it_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        let (disk, to) = (dir.path().join("disk"), dir.path().join("it.img"));
        let [key, other] = [b"a", b"b"].map(|bytes| Key(Digest::of(bytes)));
        fs::write(&disk, "new").unwrap();
        fs::write(&to, "old").unwrap();
        let node = "image:qcow2";
        let place = Places::open(dir.path()).unwrap().at("it.img", false).unwrap();
        let staged = StagedOutputs {
            places: BTreeMap::from([(node.to_owned(), vec![place.clone()])]),
            ..StagedOutputs::default()
        };
        staged.begin(node, &key, &disk, Copies::new());
        assert!(staged.take(&other, &to).is_none(), "it is of another disk");
        staged.begin(node, &key, &disk, Copies::new());
        let copy = staged.take(&key, &to).unwrap();
        let names = fs::read_dir(dir.path()).unwrap().count();
        assert_eq!(
            (names, fs::read_to_string(&to).unwrap(), content(&copy)),
            (2, "old".into(), "new".into())
        );
        assert!(staged.take(&key, &to).is_none());
        // A copy that exists is used as it is.
        let there = place.nameless().unwrap();
        io::copy(&mut b"there".as_slice(), &mut &there).unwrap();
        (&there).rewind().unwrap();
        staged.begin(node, &key, &disk, Copies::from([(to.clone(), there)]));
        assert_eq!(content(&staged.take(&key, &to).unwrap()), "there");
    }

    #[test]
    fn what_was_before_is_copied_for_all_places_that_are_there() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::write(path("old"), "old").unwrap();
        let places = Places::open(dir.path()).unwrap();
        assert!(places.at("none/b", false).is_err());
        let places = ["a", "c"].map(|name| places.at(name, false).unwrap());
        let (own, copies) = copies(&path("old"), &path("own"), places.to_vec()).unwrap();
        assert_eq!((content(&own), fs::read_to_string(path("own")).unwrap()), ("old".into(), "old".into()));
        let held: Vec<_> = copies.iter().map(|(to, copy)| (to.clone(), content(copy))).collect();
        assert_eq!(held, [(path("a"), "old".into()), (path("c"), "old".into())]);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }
}

//! Places in a machine's filesystem, reached without following links of users.
//!
//! The agent runs as root. If a directory in a path belongs to a user, that user could
//! replace any entry of it by a link. So this module walks a path one directory at a time,
//! and changes the entry at the end by descriptor.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat, Timespec, Timestamps, UTIME_OMIT};
use rustix::io::Errno;

use crate::{system, xattrs};

/// A name in an existing directory.
pub(crate) struct Place {
    dir: OwnedFd,
    name: OsString,
}

const STEP: OFlags = OFlags::PATH.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);
/// The most links that are followed (`MAXSYMLINKS` in linux/namei.h).
const LINKS: usize = 40;

impl Place {
    /// Walks to the parent directory of a path.
    pub(crate) fn find(path: &Path) -> io::Result<Self> {
        walk(path, None)
    }

    /// Does the same as [`Self::find`], but creates missing directories. They belong to
    /// root, or to a user below that user's home ([`system::home_of`]).
    pub(crate) fn make(path: &Path, owner: (u32, u32)) -> io::Result<Self> {
        walk(path, Some(owner))
    }

    /// Creates the temporary file that [`Self::put`] renames.
    pub(crate) fn draft(&self) -> io::Result<File> {
        let name = self.draft_name();
        let _ = rustix::fs::unlinkat(&self.dir, &name, AtFlags::empty());
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(File::from(rustix::fs::openat(&self.dir, &name, flags, Mode::from_raw_mode(0o600))?))
    }

    /// Creates the temporary link that [`Self::put`] renames.
    pub(crate) fn draft_link(&self, target: &Path) -> io::Result<()> {
        let name = self.draft_name();
        let _ = rustix::fs::unlinkat(&self.dir, &name, AtFlags::empty());
        Ok(rustix::fs::symlinkat(target, &self.dir, &name)?)
    }

    /// Renames the temporary file or link to this place.
    pub(crate) fn put(&self) -> io::Result<()> {
        Ok(rustix::fs::renameat(&self.dir, self.draft_name(), &self.dir, &self.name)?)
    }

    /// Renames a file of root to this place. An existing directory is an error.
    pub(crate) fn receive(&self, from: &Path) -> io::Result<()> {
        Ok(rustix::fs::renameat(rustix::fs::CWD, from, &self.dir, &self.name)?)
    }

    /// Removes the file, link or empty directory at this place, if there is one.
    pub(crate) fn remove(&self) -> io::Result<()> {
        let flags = match rustix::fs::statat(&self.dir, &self.name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => return Ok(()),
            stat => match FileType::from_raw_mode(stat?.st_mode) {
                FileType::Directory => AtFlags::REMOVEDIR,
                _ => AtFlags::empty(),
            },
        };
        Ok(rustix::fs::unlinkat(&self.dir, &self.name, flags)?)
    }

    /// Removes the temporary file or link.
    pub(crate) fn give_up(&self) {
        let _ = rustix::fs::unlinkat(&self.dir, self.draft_name(), AtFlags::empty());
    }

    /// Creates a directory; returns `false` if the name exists.
    pub(crate) fn make_dir(&self) -> io::Result<bool> {
        match rustix::fs::mkdirat(&self.dir, &self.name, Mode::from_raw_mode(0o755)) {
            Ok(()) => Ok(true),
            Err(Errno::EXIST) => Ok(false),
            Err(e) => Err(e.into()),
        }
    }

    /// Sets owner and mode of the file or directory at this place.
    pub(crate) fn set(&self, mode: u32, owner: (u32, u32)) -> io::Result<()> {
        let there = rustix::fs::openat(&self.dir, &self.name, STEP, Mode::empty())?;
        let (uid, gid) = ids(owner);
        rustix::fs::chownat(&there, "", Some(uid), Some(gid), AtFlags::EMPTY_PATH)?;
        // After chown, which clears the set-id bits. fchmod does not work with an O_PATH
        // descriptor, but chmod works with its name in /proc.
        fs::set_permissions(by_descriptor(&there), std::os::unix::fs::PermissionsExt::from_mode(mode))
    }

    /// Adds extended attributes to the file or directory at this place.
    pub(crate) fn add_attributes(&self, wanted: &BTreeMap<String, String>) -> io::Result<()> {
        let there = rustix::fs::openat(&self.dir, &self.name, STEP, Mode::empty())?;
        xattrs::set(&by_descriptor(&there), wanted)
    }

    /// Replaces all extended attributes of the file or directory at this place.
    pub(crate) fn set_attributes(&self, wanted: &BTreeMap<String, String>) -> io::Result<()> {
        let there = rustix::fs::openat(&self.dir, &self.name, STEP, Mode::empty())?;
        xattrs::replace(&by_descriptor(&there), wanted)
    }

    /// Sets the modification time of the file or directory at this place to that of
    /// `meta`.
    pub(crate) fn set_modified(&self, meta: &fs::Metadata) -> io::Result<()> {
        let there = rustix::fs::openat(&self.dir, &self.name, STEP, Mode::empty())?;
        let omit = Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT };
        let modified = Timespec { tv_sec: meta.mtime(), tv_nsec: meta.mtime_nsec() };
        let times = Timestamps { last_access: omit, last_modification: modified };
        Ok(rustix::fs::utimensat(rustix::fs::CWD, by_descriptor(&there), &times, AtFlags::empty())?)
    }

    /// Sets the owner of a link.
    pub(crate) fn own_link(&self, owner: (u32, u32)) -> io::Result<()> {
        let (uid, gid) = ids(owner);
        Ok(rustix::fs::chownat(&self.dir, &self.name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?)
    }

    fn draft_name(&self) -> OsString {
        // The longest legal name is 255 bytes.
        let short: String = self.name.to_string_lossy().chars().take(40).collect();
        format!(".{short}.vimg-new").into()
    }
}

/// Sets owner, mode and attributes of a new file.
pub(crate) fn finish(
    file: &File,
    mode: u32,
    owner: (u32, u32),
    attributes: &BTreeMap<String, String>,
) -> io::Result<()> {
    let (uid, gid) = ids(owner);
    rustix::fs::fchown(file, Some(uid), Some(gid))?;
    // After chown, which clears the set-id bits and capabilities.
    rustix::fs::fchmod(file, Mode::from_raw_mode(mode))?;
    if attributes.is_empty() { Ok(()) } else { xattrs::set(&by_descriptor(file), attributes) }
}

/// Replaces all extended attributes of a file.
pub(crate) fn replace_attributes(file: &File, wanted: &BTreeMap<String, String>) -> io::Result<()> {
    xattrs::replace(&by_descriptor(file), wanted)
}

fn by_descriptor(fd: &impl AsRawFd) -> PathBuf {
    format!("/proc/self/fd/{}", fd.as_raw_fd()).into()
}

fn ids((uid, gid): (u32, u32)) -> (rustix::fs::Uid, rustix::fs::Gid) {
    (rustix::fs::Uid::from_raw(uid), rustix::fs::Gid::from_raw(gid))
}

/// Walks to the parent directory of a path. If there is an owner `made_for`, creates
/// missing directories for a file of this owner.
fn walk(path: &Path, made_for: Option<(u32, u32)>) -> io::Result<Place> {
    let name = path.file_name().ok_or_else(|| io::Error::other("invalid path: no file name"))?.to_owned();
    let parent = path.parent().unwrap_or(Path::new("/"));
    let mut dir = top()?;
    let mut ahead: Vec<OsString> = parts(parent);
    let (mut done, mut links) = (PathBuf::from("/"), 0);
    while let Some(part) = ahead.pop() {
        if part == ".." {
            dir = rustix::fs::openat(&dir, "..", STEP, Mode::empty())?;
            done.pop();
            continue;
        }
        let there = match rustix::fs::openat(&dir, &part, STEP, Mode::empty()) {
            Err(Errno::NOENT) if made_for.is_some() => {
                let new = match rustix::fs::mkdirat(&dir, &part, Mode::from_raw_mode(0o755)) {
                    Ok(()) => true,
                    // Another process created it, and its owner stays.
                    Err(Errno::EXIST) => false,
                    Err(e) => return Err(e.into()),
                };
                let made = rustix::fs::openat(&dir, &part, STEP, Mode::empty())?;
                let home = made_for.and_then(|(uid, _)| system::home_of(&done.join(&part), uid));
                if let Some(owner) = home.filter(|_| new) {
                    let (uid, gid) = ids(owner);
                    rustix::fs::chownat(&made, "", Some(uid), Some(gid), AtFlags::EMPTY_PATH)?;
                }
                made
            }
            there => there?,
        };
        let stat = rustix::fs::fstat(&there)?;
        if FileType::from_raw_mode(stat.st_mode) == FileType::Symlink {
            links += 1;
            if links > LINKS {
                return Err(Errno::LOOP.into());
            }
            if !is_roots(&rustix::fs::fstat(&dir)?) {
                let link = done.join(&part);
                return Err(io::Error::other(format!(
                    "{} is a link that a user may change: use the path of its target",
                    link.display()
                )));
            }
            let target = rustix::fs::readlinkat(&there, "", Vec::new())?;
            let target = Path::new(OsStr::from_bytes(target.as_bytes()));
            if target.is_absolute() {
                (dir, done) = (top()?, PathBuf::from("/"));
            }
            ahead.extend(parts(target));
            continue;
        }
        if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
            return Err(Errno::NOTDIR.into());
        }
        done.push(&part);
        dir = there;
    }
    Ok(Place { dir, name })
}

fn top() -> io::Result<OwnedFd> {
    Ok(rustix::fs::open("/", STEP | OFlags::DIRECTORY, Mode::empty())?)
}

/// Whether only root can create entries in a directory.
fn is_roots(dir: &Stat) -> bool {
    dir.st_uid == 0 && dir.st_mode & 0o022 == 0
}

/// Splits a path into names, the last one first.
fn parts(path: &Path) -> Vec<OsString> {
    let part = |component: Component| match component {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        _ => None,
    };
    path.components().rev().filter_map(part).collect()
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    use super::*;

    #[test]
    fn links_are_followed_only_where_root_alone_could_put_them() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir_all(at("real/deep")).unwrap();
        symlink("real", at("link")).unwrap();
        let own = fs::metadata(dir.path()).unwrap().uid();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        // Only links of root are followed, and any user may run the tests.
        assert_eq!(Place::find(&at("link/deep/f")).is_ok(), own == 0);
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
        let why = Place::find(&at("link/deep/f")).err().unwrap().to_string();
        assert!(why.contains("a link that a user may change"), "{why}");
        assert!(Place::find(&at("none/f")).is_err());
    }

    #[test]
    fn a_draft_takes_its_place_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new/dir/file");
        let place = Place::make(&path, (0, 0)).unwrap();
        // A link at the name of the temporary file is not followed.
        symlink("/etc/passwd", path.with_file_name(".file.vimg-new")).unwrap();
        let mut draft = place.draft().unwrap();
        draft.write_all(b"text").unwrap();
        let own = fs::metadata(dir.path()).unwrap();
        finish(&draft, 0o4755, (own.uid(), own.gid()), &BTreeMap::new()).unwrap();
        place.put().unwrap();
        let meta = fs::symlink_metadata(&path).unwrap();
        assert!(meta.is_file());
        assert_eq!((meta.mode() & 0o7777, fs::read_to_string(&path).unwrap()), (0o4755, "text".into()));
        place.set(0o640, (own.uid(), own.gid())).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o640);
    }
}

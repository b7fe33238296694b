//! Copies files of a guest's filesystem to the host. The guest is a stranger:
//! names, links and sizes must not reach anything outside of the destination.
//!
//! Everything is written relative to open directories, one path component at a
//! time, and never through a symbolic link. A file is written under another
//! name and then renamed.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{AtFlags, CWD, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid};
use rustix::io::Errno;

use super::ext4::{Entry, EntryKind, Source, Tree};

/// Maximum depth of a copied tree. Each level needs an open file.
const DEEP: usize = 200;
/// Maximum number of names that wait to be copied.
const WAITING: usize = 1 << 20;
/// Longest name of a file, in bytes.
const NAME: usize = 255;
/// How many names are tried for a file that is being written.
const TRIES: u32 = 100;
/// The set-ID bits and the sticky bit.
const SPECIAL: u32 = 0o7000;

/// The result of a copy.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Extracted {
    /// The number of files, directories and links.
    pub count: u64,
    /// The size of the contents of files, in bytes.
    pub bytes: u64,
    /// The paths of devices, sockets and FIFOs, which are not copied.
    pub skipped: Vec<String>,
}

/// How to copy.
#[derive(Debug, Clone, Copy)]
pub struct ExtractOptions<'a> {
    /// Whether to copy owners, set-ID bits and sticky bits.
    pub owners: bool,
    /// Maximum total size of contents, in bytes: the size of the disk.
    pub most: u64,
    /// Set by another thread to stop.
    pub stop: &'a AtomicBool,
}

/// Writes the content of a file; holes are zeros.
///
/// # Errors
///
/// Errors of the system, and what is wrong with the filesystem or the file.
pub fn print<S: Source>(
    tree: &mut Tree<'_, S>,
    file: &Entry,
    options: ExtractOptions<'_>,
    out: &mut dyn Write,
) -> io::Result<()> {
    if file.kind() != EntryKind::File {
        return Err(io::Error::other("it is not a regular file; only files can be written to `-`"));
    }
    if file.size() > options.most {
        return Err(io::Error::other("with its holes, the file is larger than the disk"));
    }
    let mut at = 0;
    tree.content(file, &mut |offset, bytes| {
        if options.stop.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::Interrupted.into());
        }
        let hole = offset.checked_sub(at).ok_or_else(|| io::Error::other("an extent tree is invalid"))?;
        zeros(out, hole)?;
        out.write_all(bytes)?;
        at = offset + bytes.len() as u64;
        Ok(())
    })?;
    zeros(out, file.size().saturating_sub(at))?;
    out.flush()
}

fn zeros(out: &mut dyn Write, count: u64) -> io::Result<()> {
    io::copy(&mut io::Read::take(io::repeat(0), count), out).map(drop)
}

/// Copies a file or a tree to `to`, as `cp -r` does: into it if it is a
/// directory, and else as it. `name` is the name for a copy in a directory;
/// without one, the contents of a directory go into it.
///
/// # Errors
///
/// Errors of the system, and what is wrong with the filesystem.
pub fn extract<S: Source>(
    tree: &mut Tree<'_, S>,
    entry: &Entry,
    name: Option<&[u8]>,
    to: &Path,
    options: ExtractOptions<'_>,
) -> io::Result<Extracted> {
    let there = match std::fs::metadata(to) {
        Ok(meta) => Some(meta),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(error),
    };
    let is_dir = there.as_ref().is_some_and(std::fs::Metadata::is_dir);
    if !is_dir && there.is_some_and(|meta| !meta.is_file() || entry.kind() == EntryKind::Dir) {
        return Err(io::Error::other("it exists and is not a directory"));
    }
    if !is_dir && entry.kind() != EntryKind::Dir && to.as_os_str().as_bytes().ends_with(b"/") {
        return Err(io::Error::other("there is no such directory"));
    }
    let (parent, own) = match (is_dir, to.file_name()) {
        (true, _) => (to, name),
        (false, Some(own)) => {
            let parent = to.parent().filter(|parent| !parent.as_os_str().is_empty());
            (parent.unwrap_or(Path::new(".")), Some(own.as_bytes()))
        }
        (false, None) => return Err(io::Error::other("it has no name")),
    };
    let top = rustix::fs::openat(CWD, parent, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let mut copy = Copy {
        tree,
        options,
        top: top.as_fd(),
        done: Extracted::default(),
        dirs: BTreeSet::new(),
        names: BTreeMap::new(),
        path: Vec::new(),
        waiting: 0,
        left: options.most,
    };
    match own {
        Some(own) => copy.put(top.as_fd(), own, entry)?,
        None => copy.contents(top.as_fd(), entry)?,
    }
    Ok(copy.done)
}

struct Copy<'a, 's, S> {
    tree: &'a mut Tree<'s, S>,
    options: ExtractOptions<'a>,
    /// The directory that everything is written below.
    top: BorrowedFd<'a>,
    done: Extracted,
    /// Directories that were copied: none has two names.
    dirs: BTreeSet<u32>,
    /// The copies of files with several names, as paths below `top`.
    names: BTreeMap<u32, Vec<u8>>,
    /// The path of the current copy below `top`.
    path: Vec<Vec<u8>>,
    /// The number of names in directories above that wait.
    waiting: usize,
    /// How much content may still be copied, in bytes.
    left: u64,
}

impl<S: Source> Copy<'_, '_, S> {
    /// Copies an entry to `name` in the directory `dir`.
    fn put(&mut self, dir: BorrowedFd<'_>, name: &[u8], entry: &Entry) -> io::Result<()> {
        if self.options.stop.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::Interrupted.into());
        }
        self.path.push(name.to_vec());
        let put = match entry.kind() {
            EntryKind::File => self.file(dir, name, entry),
            EntryKind::Dir => self.directory(dir, name, entry),
            EntryKind::Link => self.link(dir, name, entry),
            EntryKind::Special => {
                self.done.skipped.push(self.shown());
                self.path.pop();
                return Ok(());
            }
        };
        // The first error on the way out knows the path.
        let put = put.map_err(|error| match error.get_ref().is_some_and(|inner| inner.is::<At>()) {
            true => error,
            false => io::Error::new(error.kind(), At(self.shown(), error)),
        });
        self.path.pop();
        self.done.count += 1;
        put
    }

    /// Returns the path of the current copy, for people.
    fn shown(&self) -> String {
        let path = self.path.join(b"/".as_slice());
        crate::event::plain(&String::from_utf8_lossy(&path))
    }

    fn directory(&mut self, dir: BorrowedFd<'_>, name: &[u8], entry: &Entry) -> io::Result<()> {
        let is_new = match rustix::fs::mkdirat(dir, name, Mode::RWXU) {
            Ok(()) => true,
            Err(Errno::EXIST) => false,
            Err(error) => return Err(error.into()),
        };
        let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let own = rustix::fs::openat(dir, name, flags, Mode::empty())?;
        self.contents(own.as_fd(), entry)?;
        // A directory that the user has already keeps its metadata.
        if is_new {
            self.finish(own.as_fd(), entry)?;
        }
        Ok(())
    }

    /// Copies what is in a directory.
    fn contents(&mut self, own: BorrowedFd<'_>, entry: &Entry) -> io::Result<()> {
        if entry.kind() != EntryKind::Dir {
            return Err(io::Error::other("it is not a directory"));
        }
        if !self.dirs.insert(entry.number()) {
            return Err(io::Error::other("a directory has two names"));
        }
        if self.path.len() > DEEP {
            return Err(io::Error::other("the directories are too deep"));
        }
        let entries = self.tree.entries(entry)?;
        let count = entries.len();
        self.waiting += count;
        if self.waiting > WAITING {
            return Err(io::Error::other("directories have too many entries"));
        }
        for (name, number) in entries {
            let is_legal = !name.is_empty() && name.len() <= NAME && name != b"." && name != b"..";
            if !is_legal || name.contains(&b'/') || name.contains(&0) {
                return Err(io::Error::other("a name is invalid"));
            }
            let child = self.tree.named(number)?;
            self.put(own, &name, &child)?;
        }
        self.waiting -= count;
        Ok(())
    }

    fn link(&mut self, dir: BorrowedFd<'_>, name: &[u8], entry: &Entry) -> io::Result<()> {
        let target = self.tree.target(entry)?;
        match rustix::fs::unlinkat(dir, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(error) => return Err(error.into()),
        }
        rustix::fs::symlinkat(target, dir, name)?;
        if self.options.owners {
            let (user, group) = owner(entry);
            rustix::fs::chownat(dir, name, Some(user), Some(group), AtFlags::SYMLINK_NOFOLLOW)?;
        }
        rustix::fs::utimensat(dir, name, &times(entry), AtFlags::SYMLINK_NOFOLLOW)?;
        Ok(())
    }

    fn file(&mut self, dir: BorrowedFd<'_>, name: &[u8], entry: &Entry) -> io::Result<()> {
        if entry.has_several_names()
            && let Some(first) = self.names.get(&entry.number())
            && link_to(self.top, first, dir, name).is_ok()
        {
            return Ok(());
        }
        let (file, temporary) = create(dir)?;
        let written = self
            .fill(&file, entry)
            .and_then(|()| Ok(rustix::fs::renameat(dir, temporary.as_str(), dir, name)?));
        if written.is_err() {
            let _ = rustix::fs::unlinkat(dir, temporary.as_str(), AtFlags::empty());
        } else if entry.has_several_names() {
            self.names.insert(entry.number(), self.path.join(b"/".as_slice()));
        }
        written
    }

    fn fill(&mut self, file: &File, entry: &Entry) -> io::Result<()> {
        file.set_len(entry.size())?;
        let (stop, left, done) = (self.options.stop, &mut self.left, &mut self.done);
        self.tree.content(entry, &mut |at, bytes| {
            if stop.load(Ordering::Relaxed) {
                return Err(io::ErrorKind::Interrupted.into());
            }
            // Files share no blocks, so only a damaged filesystem has more.
            let rest = left.checked_sub(bytes.len() as u64);
            *left = rest.ok_or_else(|| io::Error::other("the files have more content than the disk"))?;
            done.bytes += bytes.len() as u64;
            file.write_all_at(bytes, at)
        })?;
        self.finish(file.as_fd(), entry)
    }

    /// Sets the metadata of a copy.
    fn finish(&self, copy: BorrowedFd<'_>, entry: &Entry) -> io::Result<()> {
        let mut mode = entry.permissions() & !SPECIAL;
        if self.options.owners {
            // A change of the owner removes the special bits.
            let (user, group) = owner(entry);
            rustix::fs::fchown(copy, Some(user), Some(group))?;
            mode = entry.permissions();
        }
        rustix::fs::fchmod(copy, Mode::from_raw_mode(mode))?;
        Ok(rustix::fs::futimens(copy, &times(entry))?)
    }
}

/// An error with the path of the copy that it belongs to.
#[derive(Debug)]
struct At(String, io::Error);

impl std::fmt::Display for At {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.0, self.1)
    }
}

impl std::error::Error for At {}

fn owner(entry: &Entry) -> (Uid, Gid) {
    let (user, group) = entry.owner();
    (Uid::from_raw(user), Gid::from_raw(group))
}

fn times(entry: &Entry) -> Timestamps {
    let time = entry.modified();
    // A damaged filesystem may have any number of nanoseconds.
    let nanoseconds = time.nanoseconds.min(999_999_999).into();
    let time = Timespec { tv_sec: time.seconds, tv_nsec: nanoseconds };
    Timestamps { last_access: time, last_modification: time }
}

/// Makes an empty file with a free name, for this user only.
fn create(dir: BorrowedFd<'_>) -> io::Result<(File, String)> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    for number in 0..TRIES {
        let name = format!(".vimg-cp-{}-{number}", std::process::id());
        match rustix::fs::openat(dir, name.as_str(), flags, Mode::RUSR | Mode::WUSR) {
            Ok(file) => return Ok((file.into(), name)),
            Err(Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(Errno::EXIST.into())
}

/// Gives the copy `first` below `top` another name, which replaces a file.
fn link_to(top: BorrowedFd<'_>, first: &[u8], dir: BorrowedFd<'_>, name: &[u8]) -> io::Result<()> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let beneath = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    let copy: OwnedFd = rustix::fs::openat2(top, first, flags, Mode::empty(), beneath)?;
    match rustix::fs::unlinkat(dir, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => {}
        Err(error) => return Err(error.into()),
    }
    let path = format!("/proc/self/fd/{}", copy.as_raw_fd());
    Ok(rustix::fs::linkat(CWD, path, dir, name, AtFlags::SYMLINK_FOLLOW)?)
}

#[cfg(test)]
mod tests;

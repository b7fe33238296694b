//! A project: its files, read and hashed beneath its root.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, Stat};
use vimg_agent::xattrs;
use vimg_lang::{Document, FileKind, FileRef, Files, ReadError, Root};

use crate::digest::{Blob, Digest};
use crate::host::space;

use super::dependency::Dependency;
use super::embedded;
use super::error::{FileError, error, kind_name, read_error, words};
use super::stamps::{self, Stamps};

/// Maximum number of directories that are kept open; a process may open 1,024
/// files by default.
const MAX_OPEN_DIRS: usize = 256;

/// A project on this machine.
pub struct Project {
    pub(super) root: PathBuf,
    dir: OwnedFd,
    stamps: Mutex<Stamps>,
    seen: Mutex<Seen>,
    /// Cache directory of parsed recipes, by the digest of their text.
    parsed: Option<PathBuf>,
    /// When it was opened, in seconds since 1970.
    pub(super) opened: i64,
    /// Paths that are left out of directories: the outputs of the recipe
    /// itself.
    pub(super) left_out: BTreeSet<String>,
}

/// What this process has seen already. A build asks for each file more than
/// once, and must get the same answer.
#[derive(Default)]
pub(super) struct Seen {
    /// Open directories, reached without leaving the project.
    dirs: HashMap<String, OwnedFd>,
    files: HashMap<String, Stat>,
    /// All accesses, for the next build to check.
    pub(super) dependencies: Vec<Dependency>,
    /// Whether an access failed in a way that can't be checked again.
    pub(super) unsure: bool,
}

impl Project {
    /// Opens the project at `root`.
    pub fn open(root: &Path) -> io::Result<Self> {
        let root = root.canonicalize()?;
        let dir = rustix::fs::open(&root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        Ok(Self {
            root,
            dir,
            stamps: Mutex::default(),
            seen: Mutex::default(),
            parsed: None,
            opened: stamps::now(),
            left_out: BTreeSet::new(),
        })
    }

    /// Leaves the project's own outputs out of directories.
    pub fn without(self, paths: impl IntoIterator<Item = String>) -> Self {
        Self { left_out: paths.into_iter().collect(), ..self }
    }

    /// Adds what an earlier build stored: digests of unchanged files, and a
    /// directory for parsed recipes, which is created when it is first needed.
    pub fn knowing(self, stamps: Stamps, parsed: PathBuf) -> Self {
        Self { stamps: Mutex::new(stamps), parsed: Some(parsed), ..self }
    }

    /// Pretends that the project was opened `seconds` later. For tests, whose
    /// files are all young; they must wait out the ticks of the kernel's clock
    /// themselves.
    pub fn later(mut self, seconds: i64) -> Self {
        self.opened += seconds;
        self
    }

    /// Returns the project's root, absolute and without links.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Returns the digests of unchanged files, for the next build.
    pub fn into_stamps(self) -> Stamps {
        self.stamps.into_inner().unwrap_or_default()
    }

    /// Returns digest, size and permission bits of a file.
    pub fn hash(&self, file: &FileRef) -> Result<(Blob, u32), FileError> {
        if file.root == Root::Std {
            let bytes =
                embedded::read(&file.path).ok_or_else(|| error(file, "not in the standard library"))?;
            return Ok((Blob::of(bytes), 0o644));
        }
        let hashed = self.hash_project(&file.path).map_err(|e| error(file, &words(&e)));
        hashed.map(|(blob, mode, _)| (blob, mode))
    }

    pub(super) fn hash_project(&self, path: &str) -> io::Result<(Blob, u32, BTreeMap<String, String>)> {
        let stat = self.stat(path)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, kind_name(&stat)));
        }
        if let Some(digest) = self.lock().get(&stat) {
            let blob = Blob { digest, size: stat.st_size as u64 };
            return Ok((blob, mode(&stat), BTreeMap::new()));
        }
        let file = File::from(self.open_at(path, OFlags::RDONLY)?);
        let before = rustix::fs::fstat(&file)?;
        let blob = Blob::copy(file.try_clone()?, &mut io::sink())?;
        let attributes = attributes(&file)?;
        let after = rustix::fs::fstat(&file)?;
        let settled = blob.size == after.st_size as u64 && stamps::same(&before, &after);
        // A write through a memory mapping does not change the times of a file
        // on tmpfs. Attributes are read each time: few files have any.
        if settled && attributes.is_empty() && !in_memory(&file) {
            self.lock().put(&after, blob.digest);
        } else if in_memory(&file) {
            self.seen().unsure = true;
        }
        Ok((blob, mode(&after), attributes))
    }

    /// Returns the metadata of a path. Follows links within the project.
    pub(super) fn stat(&self, path: &str) -> io::Result<Stat> {
        let mut seen = self.seen();
        if let Some(stat) = seen.files.get(path) {
            return Ok(*stat);
        }
        let found = self.look(&mut seen, path, true);
        match &found {
            Ok(stat) => {
                seen.files.insert(path.to_owned(), *stat);
                seen.dependencies.push(Dependency::followed(path, Some(stat)));
            }
            Err(e) if matches!(read_error(e), ReadError::NotFound) => {
                seen.dependencies.push(Dependency::followed(path, None));
            }
            Err(_) => seen.unsure = true,
        }
        found
    }

    pub(super) fn look(&self, seen: &mut Seen, path: &str, follow: bool) -> io::Result<Stat> {
        // The path of the directory is checked once. A name in it that is not a
        // link can't lead out, so one plain call is enough for it.
        let (dir, name) = path.rsplit_once('/').unwrap_or(("", path));
        if !seen.dirs.contains_key(dir) {
            let opened = self.open_at(dir, OFlags::PATH | OFlags::DIRECTORY)?;
            if seen.dirs.len() >= MAX_OPEN_DIRS {
                seen.dirs.clear();
            }
            seen.dirs.insert(dir.to_owned(), opened);
        }
        let name = if name.is_empty() { "." } else { name };
        let stat = rustix::fs::statat(&seen.dirs[dir], name, AtFlags::SYMLINK_NOFOLLOW)?;
        if follow && FileType::from_raw_mode(stat.st_mode) == FileType::Symlink {
            return Ok(rustix::fs::fstat(self.open_at(path, OFlags::PATH)?)?);
        }
        Ok(stat)
    }

    pub(super) fn seen(&self) -> std::sync::MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Copies a file to `to` and checks that it did not change since it was
    /// hashed.
    pub fn copy(&self, file: &FileRef, expected: &Digest, to: &Path) -> Result<(), FileError> {
        let copied = (|| {
            let mut out = File::create(to)?;
            if file.root == Root::Std {
                let bytes = embedded::read(&file.path).unwrap_or_default();
                out.write_all(bytes)?;
                return Ok(Blob::of(bytes));
            }
            Blob::copy(File::from(self.open_at(&file.path, OFlags::RDONLY)?), &mut out)
        })();
        match copied {
            Ok(blob) if blob.digest == *expected => Ok(()),
            Ok(_) => Err(error(file, "it changed during the build; build again")),
            Err(e) => Err(FileError { is_full: space::is_full(&e), ..error(file, &words(&e)) }),
        }
    }

    /// Opens a file for reading, as [`Files::read`] would.
    pub fn open_file(&self, path: &str) -> io::Result<File> {
        Ok(File::from(self.open_at(path, OFlags::RDONLY)?))
    }

    pub(super) fn open_at(&self, path: &str, flags: OFlags) -> io::Result<OwnedFd> {
        let flags = if flags.contains(OFlags::PATH) {
            flags | OFlags::CLOEXEC
        } else {
            // Opening a FIFO must not block.
            flags | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY
        };
        let path = if path.is_empty() { "." } else { path };
        Ok(rustix::fs::openat2(
            &self.dir,
            path,
            flags,
            Mode::empty(),
            ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS,
        )?)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Stamps> {
        self.stamps.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn parsed_path(&self, text: &str) -> Option<PathBuf> {
        // Another version of the parser may give another tree.
        let versioned = format!("{}\0{text}", env!("VIMG_PARSER"));
        Some(self.parsed.as_ref()?.join(Digest::of(versioned.as_bytes()).to_string()))
    }
}

impl Files for Project {
    fn read(&self, file: &FileRef, limit: usize) -> Result<Vec<u8>, ReadError> {
        if file.root == Root::Std {
            return embedded::read(&file.path).map(<[u8]>::to_vec).ok_or(ReadError::NotFound);
        }
        // The metadata is read first, so that it can't be newer than the
        // content.
        self.stat(&file.path).map_err(|e| read_error(&e))?;
        let opened = File::from(self.open_at(&file.path, OFlags::RDONLY).map_err(|e| read_error(&e))?);
        let stat = rustix::fs::fstat(&opened).map_err(|e| read_error(&e.into()))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(ReadError::NotAFile(kind_name(&stat)));
        }
        let size = stat.st_size as usize;
        if size > limit {
            return Err(ReadError::TooLarge);
        }
        let mut bytes = Vec::with_capacity(size);
        // The file may grow while it is read, or its size may be wrong.
        opened.take(limit as u64 + 1).read_to_end(&mut bytes).map_err(|e| read_error(&e))?;
        if bytes.len() > limit { Err(ReadError::TooLarge) } else { Ok(bytes) }
    }

    fn kind(&self, file: &FileRef) -> Result<FileKind, ReadError> {
        if file.root == Root::Std {
            return embedded::read(&file.path).map(|_| FileKind::File).ok_or(ReadError::NotFound);
        }
        let stat = self.stat(&file.path).map_err(|e| read_error(&e))?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => Ok(FileKind::File),
            FileType::Directory => Ok(FileKind::Directory),
            _ => Err(ReadError::NotAFile(kind_name(&stat))),
        }
    }

    fn siblings(&self, file: &FileRef) -> Vec<String> {
        if file.root == Root::Std {
            return embedded::names();
        }
        let dir = file.path.rsplit_once('/').map_or("", |(dir, _)| dir);
        let Ok(entries) = std::fs::read_dir(self.root.join(dir)) else { return Vec::new() };
        entries.flatten().take(1000).filter_map(|e| e.file_name().into_string().ok()).collect()
    }

    fn parsed(&self, text: &str) -> Option<Document> {
        postcard::from_bytes(&std::fs::read(self.parsed_path(text)?).ok()?).ok()
    }

    fn keep_parsed(&self, text: &str, document: &Document) {
        // Parsing a few kilobytes is faster than reading a file.
        if text.len() < 4096 {
            return;
        }
        let Some(path) = self.parsed_path(text) else { return };
        let Ok(bytes) = postcard::to_stdvec(document) else { return };
        // A failed write only makes the next build slower. A torn file does not
        // parse, and the rename keeps even that from being seen.
        let new = path.with_extension(std::process::id().to_string());
        if let Some(dir) = path.parent() {
            let _ = std::fs::create_dir_all(dir);
        }
        if std::fs::write(&new, bytes).is_ok() {
            let _ = std::fs::rename(&new, &path);
        }
    }
}

/// The mode of a file as git stores it: 0755 if its owner may execute it,
/// otherwise 0644. Set-id bits are kept: they are never an accident of the
/// checkout.
fn mode(stat: &Stat) -> u32 {
    let plain = if stat.st_mode & 0o100 == 0 { 0o644 } else { 0o755 };
    plain | stat.st_mode & 0o6000
}

fn attributes(file: &File) -> io::Result<BTreeMap<String, String>> {
    // Most files have none, which this call tells by descriptor.
    let mut names = [0; 4096];
    match rustix::fs::flistxattr(file, &mut names) {
        Ok(0) | Err(rustix::io::Errno::OPNOTSUPP) => return Ok(BTreeMap::new()),
        _ => {}
    }
    xattrs::portable(&std::fs::canonicalize(format!("/proc/self/fd/{}", file.as_raw_fd()))?)
}

/// Whether a file is on tmpfs (`TMPFS_MAGIC` in linux/magic.h).
fn in_memory(file: &File) -> bool {
    rustix::fs::fstatfs(file).is_ok_and(|fs| fs.f_type == 0x0102_1994)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_through_a_mapping_is_seen() {
        // On tmpfs such a write changes no time of the file.
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = dir.path().join("x");
        std::fs::write(&path, "before").unwrap();
        let project = |stamps| Project::open(dir.path()).unwrap().knowing(stamps, PathBuf::new()).later(100);
        let file = FileRef::project("x");
        let first = project(Stamps::default());
        let before = first.hash(&file).unwrap();
        let opened = File::options().read(true).write(true).open(&path).unwrap();
        // SAFETY: the mapping is of a file of this length, and ends with the
        // process.
        unsafe {
            let (protection, length) = (libc::PROT_READ | libc::PROT_WRITE, 6);
            let at = libc::mmap(
                std::ptr::null_mut(),
                length,
                protection,
                libc::MAP_SHARED,
                std::os::fd::AsRawFd::as_raw_fd(&opened),
                0,
            );
            assert_ne!(at, libc::MAP_FAILED);
            at.cast::<[u8; 6]>().write(*b"after!");
        }
        assert_eq!(std::fs::read(&path).unwrap(), b"after!");
        let after = project(first.into_stamps()).hash(&file).unwrap();
        assert_ne!(before.0.digest, after.0.digest);
    }

    #[test]
    fn modes_are_those_of_git() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        std::fs::write(&path, "").unwrap();
        for (mode, wanted) in
            [(0o600, 0o644), (0o610, 0o644), (0o700, 0o755), (0o664, 0o644), (0o4755, 0o4755)]
        {
            std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap();
            let project = Project::open(dir.path()).unwrap();
            assert_eq!(project.hash(&FileRef::project("x")).unwrap().1, wanted, "{mode:o}");
        }
    }
}

//! Writes files beneath a directory without following links out of it.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;

/// A directory for output files. The user chose it, so it may be a link itself.
#[derive(Debug, Clone)]
pub struct Places {
    dir: Arc<OwnedFd>,
    path: PathBuf,
}

/// The place of a file, which may not exist yet, in an existing directory.
#[derive(Debug, Clone)]
pub struct Place {
    dir: Arc<OwnedFd>,
    name: OsString,
    /// Its path, for messages.
    path: PathBuf,
}

const DIR: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

impl Places {
    /// Opens the directory, and creates it if it does not exist.
    ///
    /// # Errors
    ///
    /// Errors of the system.
    pub fn open(path: &Path) -> io::Result<Self> {
        let named = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        std::fs::create_dir_all(named)?;
        let dir = rustix::fs::open(named, DIR, Mode::empty())?;
        Ok(Self { dir: Arc::new(dir), path: path.to_owned() })
    }

    /// Returns the path of a file below the directory, for messages and notes.
    pub fn path(&self, below: &str) -> PathBuf {
        self.path.join(below)
    }

    /// Returns the place of a file. Creates the directories on the way if
    /// `make`.
    ///
    /// # Errors
    ///
    /// A directory is missing or can't be created, or a link leads out.
    pub fn at(&self, below: &str, make: bool) -> io::Result<Place> {
        let (way, name) = below.rsplit_once('/').unwrap_or(("", below));
        let mut dir = self.dir.clone();
        let mut done = PathBuf::new();
        for part in way.split('/').filter(|part| !part.is_empty()) {
            done.push(part);
            let opened = match self.enter(&done) {
                Err(Errno::NOENT) if make => {
                    rustix::fs::mkdirat(&*dir, part, Mode::from_raw_mode(0o777)).or_else(there)?;
                    self.enter(&done)
                }
                opened => opened,
            };
            dir = Arc::new(opened.map_err(|e| outside(e, &self.path.join(&done)))?);
        }
        Ok(Place { dir, name: name.into(), path: self.path(below) })
    }

    fn enter(&self, below: &Path) -> rustix::io::Result<OwnedFd> {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        rustix::fs::openat2(&*self.dir, below, DIR, Mode::empty(), resolve)
    }
}

fn there(error: Errno) -> rustix::io::Result<()> {
    if error == Errno::EXIST { Ok(()) } else { Err(error) }
}

/// Explains the kernel's error for a link that leads out.
fn outside(error: Errno, path: &Path) -> io::Error {
    match error {
        Errno::XDEV => io::Error::new(
            io::ErrorKind::PermissionDenied,
            format!("{} leads out of the output directory; name another with `--output DIR`", path.display()),
        ),
        error => error.into(),
    }
}

impl Place {
    /// Returns the path, for messages and notes.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the metadata of the file, if it exists. Does not follow a link.
    pub fn stat(&self) -> Option<Stat> {
        rustix::fs::statat(&*self.dir, &self.name, AtFlags::SYMLINK_NOFOLLOW).ok()
    }

    /// Creates an unnamed file (`O_TMPFILE`) in the directory.
    ///
    /// # Errors
    ///
    /// Errors of the system; not all filesystems support it.
    pub fn nameless(&self) -> io::Result<File> {
        let flags = OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC;
        Ok(File::from(rustix::fs::openat(&*self.dir, ".", flags, Mode::from_raw_mode(0o666))?))
    }

    /// Creates the temporary file that [`Self::put`] renames.
    ///
    /// # Errors
    ///
    /// Errors of the system.
    pub fn draft(&self) -> io::Result<File> {
        let name = self.draft_name();
        // A killed process, or an attacker, may have left one.
        self.remove(&name)?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(File::from(rustix::fs::openat(&*self.dir, &name, flags, Mode::from_raw_mode(0o666))?))
    }

    /// Gives an unnamed file the name of the temporary one.
    ///
    /// # Errors
    ///
    /// Errors of the system.
    pub fn name(&self, file: &File) -> io::Result<()> {
        let name = self.draft_name();
        self.remove(&name)?;
        let own = format!("/proc/self/fd/{}", file.as_raw_fd());
        Ok(rustix::fs::linkat(CWD, own, &*self.dir, &name, AtFlags::SYMLINK_FOLLOW)?)
    }

    /// Renames the temporary file to its name, durably.
    ///
    /// # Errors
    ///
    /// Errors of the system.
    pub fn put(&self) -> io::Result<()> {
        rustix::fs::renameat(&*self.dir, self.draft_name(), &*self.dir, &self.name)?;
        // Sync the name too, so that it survives a power cut.
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir = rustix::fs::openat(&*self.dir, ".", flags, Mode::empty())?;
        Ok(rustix::fs::fsync(dir)?)
    }

    /// Removes the temporary file.
    pub fn give_up(&self) {
        let _ = self.remove(&self.draft_name());
    }

    fn remove(&self, name: &OsStr) -> io::Result<()> {
        match rustix::fs::unlinkat(&*self.dir, name, AtFlags::empty()) {
            Err(Errno::NOENT) | Ok(()) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    fn draft_name(&self) -> OsString {
        let mut name = OsString::from(".");
        name.push(&self.name);
        name.push(".vimg-new");
        name
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write;
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn links_of_a_checkout_lead_nowhere_else() {
        let dir = tempfile::tempdir().unwrap();
        let (project, victim) = (dir.path().join("p"), dir.path().join("victim"));
        fs::create_dir_all(&victim).unwrap();
        fs::create_dir_all(project.join("real")).unwrap();
        fs::write(victim.join("precious"), "precious").unwrap();
        symlink("../victim", project.join("out")).unwrap();
        symlink("real", project.join("inner")).unwrap();
        symlink(victim.join("precious"), project.join(".y.raw.vimg-new")).unwrap();
        symlink(victim.join("precious"), project.join("z.raw")).unwrap();
        let places = Places::open(&project).unwrap();
        for out in ["out/x.raw", "out/deeper/x.raw", "../x.raw", "inner/../../x.raw"] {
            assert!(places.at(out, true).is_err(), "{out}");
        }
        let why = places.at("out/x.raw", true).unwrap_err().to_string();
        assert!(why.contains("leads out of the output directory"), "{why}");
        for below in ["y.raw", "z.raw", "inner/a.raw", "new/dir/b.raw"] {
            let place = places.at(below, true).unwrap();
            place.draft().unwrap().write_all(b"disk").unwrap();
            place.put().unwrap();
            assert_eq!(fs::read_to_string(project.join(below)).unwrap(), "disk", "{below}");
        }
        assert_eq!(fs::read_to_string(victim.join("precious")).unwrap(), "precious");
        assert!(!fs::symlink_metadata(project.join("z.raw")).unwrap().is_symlink());
        assert!(project.join("real/a.raw").exists());
        assert_eq!(fs::read_dir(&victim).unwrap().count(), 1);
    }

    #[test]
    fn what_was_named_by_the_user_may_be_a_link() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("real")).unwrap();
        symlink("real", dir.path().join("link")).unwrap();
        let place = Places::open(&dir.path().join("link")).unwrap().at("it.raw", false).unwrap();
        let copy = place.nameless().unwrap();
        (&copy).write_all(b"disk").unwrap();
        place.name(&copy).unwrap();
        assert!(place.stat().is_none());
        place.put().unwrap();
        assert!(place.stat().is_some());
        assert_eq!(fs::read_to_string(dir.path().join("real/it.raw")).unwrap(), "disk");
    }
}

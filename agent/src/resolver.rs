//! The resolver of offline layers: while a step uses the network, `/etc/resolv.conf` is
//! vimg's, whatever the machine's own says. Between such steps it is the machine's.

use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::sync::{Mutex, PoisonError};

static TEXT: Mutex<Option<String>> = Mutex::new(None);

/// resolv.conf(5), and where the machine's own is meanwhile; below the root.
const FILE: &str = "etc/resolv.conf";
const ASIDE: &str = "etc/.vimg-resolv.conf";

/// Sets the text of the file for the steps of offline layers.
pub(crate) fn set(text: &str) {
    *TEXT.lock().unwrap_or_else(PoisonError::into_inner) = Some(text.to_owned());
}

/// vimg's file, while it is there. Drop removes it, unless the step has replaced it.
pub(crate) struct Resolver {
    put: PathBuf,
    text: String,
    /// Where the machine's own file or link is.
    aside: Option<PathBuf>,
}

impl Resolver {
    /// Puts the file in place. `None` if the machine has its own network.
    pub(crate) fn enter() -> io::Result<Option<Self>> {
        let text = TEXT.lock().unwrap_or_else(PoisonError::into_inner).clone();
        match text {
            Some(text) if Path::new("/etc").is_dir() => Self::put(Path::new("/"), text).map(Some),
            _ => Ok(None),
        }
    }

    fn put(root: &Path, text: String) -> io::Result<Self> {
        let file = root.join(FILE);
        // Most images have a link to a file of a service that is not running.
        let target = fs::read_link(&file).ok().map(|target| clean(&Path::new("/etc").join(target)));
        if let Some(target) = target.as_ref().and_then(|target| target.strip_prefix("/run").ok()) {
            let put = root.join("run").join(target);
            if !put.exists() {
                if let Some(dir) = put.parent() {
                    fs::create_dir_all(dir)?;
                }
                fs::write(&put, &text)?;
                return Ok(Self { put, text, aside: None });
            }
        }
        let there = fs::symlink_metadata(&file).is_ok();
        let aside = there.then(|| root.join(ASIDE));
        if let Some(aside) = &aside {
            fs::rename(&file, aside)?;
        }
        fs::write(&file, &text)?;
        Ok(Self { put: file, text, aside })
    }
}

impl Drop for Resolver {
    fn drop(&mut self) {
        let is_file = fs::symlink_metadata(&self.put).is_ok_and(|meta| meta.is_file());
        let is_ours = is_file && fs::read(&self.put).is_ok_and(|text| text == self.text.as_bytes());
        let _ = match (is_ours, &self.aside) {
            (true, Some(aside)) => fs::rename(aside, &self.put),
            (true, None) => fs::remove_file(&self.put),
            (false, Some(aside)) => fs::remove_file(aside),
            (false, None) => Ok(()),
        };
    }
}

/// Removes `..` from a path, without looking at the filesystem.
fn clean(path: &Path) -> PathBuf {
    let mut out = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir => {
                out.pop();
            }
            part => out.push(part),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    /// Makes a root, calls `before` with the path of the file, and puts vimg's file there.
    fn put(before: impl Fn(&Path)) -> (tempfile::TempDir, PathBuf, Resolver) {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("etc")).unwrap();
        let file = dir.path().join(FILE);
        before(&file);
        let resolver = Resolver::put(dir.path(), "nameserver 10.0.2.3\n".into()).unwrap();
        (dir, file, resolver)
    }

    fn names(dir: &tempfile::TempDir) -> usize {
        fs::read_dir(dir.path().join("etc")).unwrap().count()
    }

    #[test]
    fn the_machines_own_file_comes_back_as_it_was() {
        let (dir, file, resolver) = put(|file| {
            fs::write(file, "nameserver 192.0.2.53\n").unwrap();
            fs::set_permissions(file, fs::Permissions::from_mode(0o600)).unwrap();
        });
        assert_eq!(fs::read_to_string(&file).unwrap(), "nameserver 10.0.2.3\n");
        drop(resolver);
        assert_eq!(fs::read_to_string(&file).unwrap(), "nameserver 192.0.2.53\n");
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(names(&dir), 1);
    }

    #[test]
    fn a_link_comes_back_wherever_it_leads() {
        for target in ["../run/systemd/resolve/stub-resolv.conf", "/usr/lib/own-resolv.conf", "own"] {
            let (dir, file, resolver) = put(|file| symlink(target, file).unwrap());
            // The target is below another root here.
            let seen = match target.starts_with("..") {
                true => dir.path().join("run/systemd/resolve/stub-resolv.conf"),
                false => file.clone(),
            };
            assert_eq!(fs::read_to_string(&seen).unwrap(), "nameserver 10.0.2.3\n", "{target}");
            drop(resolver);
            assert_eq!(fs::read_link(&file).unwrap(), Path::new(target));
            assert_eq!(names(&dir), 1);
        }
    }

    #[test]
    fn what_a_step_has_written_stays() {
        let (dir, file, resolver) = put(|file| fs::write(file, "old").unwrap());
        fs::remove_file(&file).unwrap();
        fs::write(&file, "nameserver 192.0.2.1\n").unwrap();
        drop(resolver);
        assert_eq!(fs::read_to_string(&file).unwrap(), "nameserver 192.0.2.1\n");
        assert_eq!(names(&dir), 1);
        let (dir, _, resolver) = put(|_| ());
        drop(resolver);
        assert_eq!(names(&dir), 0);
    }
}

//! Merges a tree of files that only root can change into directories that may belong to a
//! user.

use std::collections::BTreeMap;
use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Gid, Uid};

use crate::failure::Failure;
use crate::place::{self, Place};
use crate::xattrs;

/// A file, link or directory, and its target path.
pub(super) struct Piece {
    from: PathBuf,
    pub(super) to: PathBuf,
    meta: Metadata,
}

/// Lists the entries of the tree `top` that are missing below `to` or differ there, each
/// directory before its entries. Existing directories stay unchanged.
pub(super) fn differing(top: &Path, to: &Path, owner: (u32, u32)) -> io::Result<Vec<Piece>> {
    let mut pieces = Vec::new();
    list(top, to, owner, &mut pieces)?;
    Ok(pieces)
}

fn list(dir: &Path, to: &Path, owner: (u32, u32), out: &mut Vec<Piece>) -> io::Result<()> {
    let mut entries: Vec<fs::DirEntry> = fs::read_dir(dir)?.collect::<Result<_, _>>()?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let (from, to) = (entry.path(), to.join(entry.file_name()));
        let meta = fs::symlink_metadata(&from)?;
        let is_dir = meta.is_dir();
        let stays = if is_dir { to.is_dir() } else { is_same(&from, &meta, &to, owner)? };
        if !stays {
            out.push(Piece { from: from.clone(), to: to.clone(), meta });
        }
        if is_dir {
            list(&from, &to, owner, out)?;
        }
    }
    Ok(())
}

/// Whether the file or link at `to` equals the one at `from`, with this owner.
fn is_same(from: &Path, meta: &Metadata, to: &Path, owner: (u32, u32)) -> io::Result<bool> {
    let Ok(there) = fs::symlink_metadata(to) else { return Ok(false) };
    let facts = |m: &Metadata| (m.file_type(), m.mode(), m.rdev());
    if facts(meta) != facts(&there) || (there.uid(), there.gid()) != owner {
        return Ok(false);
    }
    if meta.is_symlink() {
        return Ok(fs::read_link(from)? == fs::read_link(to)?);
    }
    if !meta.is_file() {
        return Ok(true);
    }
    if meta.len() != there.len() || meta.mtime() != there.mtime() {
        return Ok(false);
    }
    let (wanted, found) = (xattrs::get(from)?, xattrs::get(to)?);
    if wanted.iter().any(|(name, value)| found.get(name) != Some(value)) {
        return Ok(false);
    }
    let digest = |path| {
        let mut hasher = blake3::Hasher::new();
        io::copy(&mut File::open(path)?, &mut hasher)?;
        io::Result::Ok(hasher.finalize())
    };
    Ok(digest(from)? == digest(to)?)
}

/// How to merge a tree.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum By {
    /// Rename its files, within a filesystem. The tree is then incomplete.
    Moving,
    /// Copy its files.
    Copying,
}

/// Moves or copies all pieces to their target paths; each gets the owner.
pub(super) fn lay(pieces: &[Piece], owner: (u32, u32), by: By) -> Result<(), Failure> {
    for piece in pieces {
        put(piece, owner, by).map_err(|e| Failure::at(&piece.to, e))?;
    }
    // Adding files to a directory changes its modification time: set it afterwards.
    for piece in pieces.iter().rev().filter(|piece| piece.meta.is_dir()) {
        Place::find(&piece.to)
            .and_then(|place| place.set_modified(&piece.meta))
            .map_err(|e| Failure::at(&piece.to, e))?;
    }
    Ok(())
}

fn put(Piece { from, to, meta }: &Piece, owner: (u32, u32), by: By) -> io::Result<()> {
    let place = Place::find(to)?;
    let mode = meta.mode() & 0o7777;
    let attributes = if meta.is_symlink() { BTreeMap::new() } else { xattrs::get(from)? };
    if meta.is_dir() {
        if !place.make_dir()? {
            return Err(io::Error::other("it exists and is not a directory"));
        }
        place.set(mode, owner)?;
        return place.add_attributes(&attributes);
    }
    if fs::symlink_metadata(to).is_ok_and(|there| there.is_dir()) {
        return Err(io::Error::other("it is a directory"));
    }
    if by == By::Moving {
        if (meta.uid(), meta.gid()) != owner {
            let (uid, gid) = (Uid::from_raw(owner.0), Gid::from_raw(owner.1));
            rustix::fs::chownat(CWD, from, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
            if !meta.is_symlink() {
                // chown clears set-id bits and capabilities.
                fs::set_permissions(from, meta.permissions())?;
                xattrs::set(from, &attributes)?;
            }
        }
        match place.receive(from) {
            // The target is on another filesystem: copy instead.
            Err(e) if e.kind() == io::ErrorKind::CrossesDevices => {}
            moved => return moved,
        }
    }
    let kind = meta.file_type();
    if kind.is_fifo() || kind.is_socket() || kind.is_char_device() || kind.is_block_device() {
        return Err(io::Error::other("can't move a device, FIFO or socket to another filesystem"));
    }
    let copied = if meta.is_symlink() {
        place
            .draft_link(&fs::read_link(from)?)
            .and_then(|()| place.put())
            .and_then(|()| place.own_link(owner))
    } else {
        place.draft().and_then(|mut file| {
            io::copy(&mut File::open(from)?, &mut file)?;
            place::finish(&file, mode, owner, &attributes)?;
            file.set_modified(meta.modified()?)?;
            place.put()
        })
    };
    copied.inspect_err(|_| place.give_up())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    #[test]
    fn a_tree_is_laid_once_and_stays() {
        let dir = tempfile::tempdir().unwrap();
        let (top, to) = (dir.path().join("top"), dir.path().join("to"));
        let own = fs::metadata(dir.path()).unwrap();
        let owner = (own.uid(), own.gid());
        for by in [By::Copying, By::Moving] {
            let _ = fs::remove_dir_all(&to);
            let _ = fs::remove_dir_all(&top);
            fs::create_dir_all(top.join("there")).unwrap();
            fs::create_dir_all(top.join("new/deep")).unwrap();
            fs::create_dir_all(to.join("there")).unwrap();
            fs::set_permissions(to.join("there"), fs::Permissions::from_mode(0o700)).unwrap();
            fs::set_permissions(top.join("new"), fs::Permissions::from_mode(0o2750)).unwrap();
            for name in ["there/a", "new/deep/b"] {
                fs::write(top.join(name), name).unwrap();
                fs::set_permissions(top.join(name), fs::Permissions::from_mode(0o4711)).unwrap();
            }
            symlink("deep/b", top.join("new/link")).unwrap();
            fs::write(to.join("there/a"), "another").unwrap();
            let old = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000);
            File::open(top.join("new")).unwrap().set_modified(old).unwrap();

            let pieces = differing(&top, &to, owner).unwrap();
            let names: Vec<_> = pieces.iter().map(|p| p.to.strip_prefix(&to).unwrap().to_owned()).collect();
            assert_eq!(names, ["new", "new/deep", "new/deep/b", "new/link", "there/a"].map(PathBuf::from));
            lay(&pieces, owner, by).unwrap();
            assert_eq!(fs::read_to_string(to.join("new/link")).unwrap(), "new/deep/b");
            assert_eq!(fs::read_to_string(to.join("there/a")).unwrap(), "there/a");
            let meta = |name: &str| fs::metadata(to.join(name)).unwrap();
            assert_eq!(meta("new").modified().unwrap(), old);
            let modes = ["there", "new", "there/a"].map(|name| meta(name).mode() & 0o7777);
            assert_eq!(modes, [0o700, 0o2750, 0o4711]);
            if by == By::Copying {
                assert!(differing(&top, &to, owner).unwrap().is_empty());
            }
        }
    }

    #[test]
    fn what_is_laid_takes_no_way_that_a_user_could_have_made() {
        let dir = tempfile::tempdir().unwrap();
        let (top, to) = (dir.path().join("top"), dir.path().join("to"));
        fs::create_dir_all(top.join("www")).unwrap();
        fs::write(top.join("www/shadow"), "mine").unwrap();
        for name in ["to", "etc"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        fs::set_permissions(&to, fs::Permissions::from_mode(0o777)).unwrap();
        symlink("../etc", to.join("www")).unwrap();
        let own = fs::metadata(dir.path()).unwrap();
        let pieces = differing(&top, &to, (own.uid(), own.gid())).unwrap();
        let failure = lay(&pieces, (own.uid(), own.gid()), By::Moving).unwrap_err();
        assert!(failure.message.contains("a link that a user may change"), "{}", failure.message);
        assert!(!dir.path().join("etc/shadow").exists());
    }
}

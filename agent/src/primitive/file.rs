//! `file`: bytes at a path, put there in one step.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, chown, lchown};
use std::path::{Path, PathBuf};

use super::{Context, symlink};
use crate::failure::Failure;
use crate::ledger::{self, Was};
use crate::protocol::{Blob, Digest};

pub(super) fn apply(
    path: &Path,
    content: Blob,
    mode: u32,
    owner: (u32, u32),
    context: &mut Context,
) -> Result<bool, Failure> {
    let there = holds(path, content);
    if there && has(path, mode, owner) {
        return Ok(false);
    }
    context.ledger.path(path)?;
    if there {
        return attributes(path, mode, owner);
    }
    parents(path)?;
    context.channel.request(&[content]).map_err(|e| Failure::at(path, e))?;
    write(path, content, mode, owner, context)?;
    Ok(true)
}

/// Writes a blob that was requested to `path`, by way of a new file beside it.
pub(super) fn write(
    path: &Path,
    content: Blob,
    mode: u32,
    owner: (u32, u32),
    context: &mut Context,
) -> Result<(), Failure> {
    let fail = |e| Failure::at(path, e);
    if fs::symlink_metadata(path).is_ok_and(|m| m.is_dir()) {
        return Err(Failure::new(format!("{} is a directory", path.display())));
    }
    let new = beside(path);
    let _ = fs::remove_file(&new);
    let written = (|| {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
        context.channel.blob(content, &mut file)?;
        chown(&new, Some(owner.0), Some(owner.1))?;
        // After chown, which clears the set-id bits.
        fs::set_permissions(&new, fs::Permissions::from_mode(mode))?;
        fs::rename(&new, path)
    })();
    if written.is_err() {
        let _ = fs::remove_file(&new);
    }
    written.map_err(fail)
}

fn beside(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    // The longest legal name is 255 bytes.
    let short: String = name.chars().take(40).collect();
    path.with_file_name(format!(".{short}.vimg-new"))
}

/// Whether a regular file at `path` has this content.
pub(super) fn holds(path: &Path, content: Blob) -> bool {
    let right_size = fs::symlink_metadata(path).is_ok_and(|m| m.is_file() && m.len() == content.size);
    right_size && digest(path).is_ok_and(|d| d == content.digest)
}

fn digest(path: &Path) -> io::Result<Digest> {
    Ok(Blob::copy(File::open(path)?, &mut io::sink())?.digest)
}

/// Whether what stands at `path` has this mode and owner.
pub(super) fn has(path: &Path, mode: u32, owner: (u32, u32)) -> bool {
    fs::symlink_metadata(path).is_ok_and(|m| m.mode() & 0o7777 == mode && (m.uid(), m.gid()) == owner)
}

/// Sets mode and owner where they differ; says whether they did.
pub(super) fn attributes(path: &Path, mode: u32, owner: (u32, u32)) -> Result<bool, Failure> {
    let fail = |e| Failure::at(path, e);
    let meta = fs::symlink_metadata(path).map_err(fail)?;
    let mut changed = false;
    if (meta.uid(), meta.gid()) != owner {
        chown(path, Some(owner.0), Some(owner.1)).map_err(fail)?;
        changed = true;
    }
    if changed || meta.mode() & 0o7777 != mode {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(fail)?;
        changed = true;
    }
    Ok(changed)
}

/// Makes a file of the agent's own hold `text`; says whether it did not.
pub(super) fn text(path: &Path, text: &str, context: &mut Context) -> Result<bool, Failure> {
    if fs::read_to_string(path).ok().as_deref() == Some(text) {
        return Ok(false);
    }
    context.ledger.path(path)?;
    parents(path)?;
    fs::write(path, text).map_err(|e| Failure::at(path, e))?;
    Ok(true)
}

/// Makes the directories above `path` that are missing, as root's with 0755.
pub(super) fn parents(path: &Path) -> Result<(), Failure> {
    let Some(parent) = path.parent() else { return Ok(()) };
    fs::create_dir_all(parent).map_err(|e| Failure::at(parent, e))
}

/// Puts back what stood at a path.
pub(super) fn revert(path: &Path, was: &Was, context: &Context) -> Result<(), Failure> {
    let fail = |e| Failure::at(path, e);
    match was {
        Was::Absent => match fs::symlink_metadata(path) {
            Ok(meta) if meta.is_dir() => match fs::remove_dir(path) {
                Err(e) if e.kind() == io::ErrorKind::DirectoryNotEmpty => {
                    context.say(&format!("{} stays: it is not empty", path.display()))
                }
                removed => removed.map_err(fail),
            },
            Ok(_) => fs::remove_file(path).map_err(fail),
            Err(_) => Ok(()),
        },
        Was::File { content, mode, uid, gid, xattrs } => {
            parents(path)?;
            let new = beside(path);
            let put = || {
                fs::copy(context.ledger.content(content), &new)?;
                if digest(&new)? != *content {
                    return Err(io::Error::other("what was kept of it is damaged"));
                }
                chown(&new, Some(*uid), Some(*gid))?;
                // After chown, which clears the set-id bits.
                fs::set_permissions(&new, fs::Permissions::from_mode(*mode))?;
                ledger::set_xattrs(&new, xattrs)?;
                fs::rename(&new, path)
            };
            put().map_err(|e| {
                let _ = fs::remove_file(&new);
                fail(e)
            })
        }
        Was::Link { target, uid, gid } => {
            parents(path)?;
            symlink::put(path, &ledger::unescape(target))?;
            lchown(path, Some(*uid), Some(*gid)).map_err(fail)
        }
        Was::Dir { mode, uid, gid, xattrs } => {
            let put = || {
                fs::create_dir_all(path)?;
                chown(path, Some(*uid), Some(*gid))?;
                fs::set_permissions(path, fs::Permissions::from_mode(*mode))?;
                ledger::set_xattrs(path, xattrs)
            };
            put().map_err(fail)
        }
    }
}

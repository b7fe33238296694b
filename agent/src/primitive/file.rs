//! `file`: a file, replaced atomically.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::context::Context;
use super::symlink;
use crate::failure::Failure;
use crate::ledger::{self, Was};
use crate::place::{self, Place};
use crate::protocol::{Blob, Digest};

/// The permission bits of a file for which the host says nothing.
pub(super) const MODE: u32 = 0o644;

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
    parents(path, owner)?;
    context.channel.request(&[content]).map_err(|e| Failure::at(path, e))?;
    write(path, content, mode, owner, &BTreeMap::new(), context)?;
    Ok(true)
}

/// Writes a requested blob to a temporary file, and renames it to `path`.
pub(super) fn write(
    path: &Path,
    content: Blob,
    mode: u32,
    owner: (u32, u32),
    attributes: &BTreeMap<String, String>,
    context: &mut Context,
) -> Result<(), Failure> {
    let fail = |e| Failure::at(path, e);
    if fs::symlink_metadata(path).is_ok_and(|m| m.is_dir()) {
        return Err(Failure::new(format!("{} is a directory", path.display())));
    }
    let place = Place::find(path).map_err(fail)?;
    let written = (|| {
        let mut file = place.draft()?;
        context.channel.blob(content, &mut file)?;
        place::finish(&file, mode, owner, attributes)?;
        place.put()
    })();
    if written.is_err() {
        place.give_up();
    }
    written.map_err(fail)
}

/// Whether a regular file at `path` has this content.
pub(super) fn holds(path: &Path, content: Blob) -> bool {
    let right_size = fs::symlink_metadata(path).is_ok_and(|m| m.is_file() && m.len() == content.size);
    right_size && digest(path).is_ok_and(|d| d == content.digest)
}

fn digest(path: &Path) -> io::Result<Digest> {
    Ok(Blob::copy(File::open(path)?, &mut io::sink())?.digest)
}

/// Whether the entry at `path` has this mode and owner.
pub(super) fn has(path: &Path, mode: u32, owner: (u32, u32)) -> bool {
    fs::symlink_metadata(path).is_ok_and(|m| m.mode() & 0o7777 == mode && (m.uid(), m.gid()) == owner)
}

/// Sets mode and owner if they differ; returns whether they did.
pub(super) fn attributes(path: &Path, mode: u32, owner: (u32, u32)) -> Result<bool, Failure> {
    let fail = |e| Failure::at(path, e);
    let meta = fs::symlink_metadata(path).map_err(fail)?;
    let differs = (meta.uid(), meta.gid()) != owner || meta.mode() & 0o7777 != mode;
    if differs {
        Place::find(path).and_then(|place| place.set(mode, owner)).map_err(fail)?;
    }
    Ok(differs)
}

/// Writes `text` to a file of the agent if its content differs; returns whether it did.
pub(super) fn text(path: &Path, text: &str, context: &mut Context) -> Result<bool, Failure> {
    if fs::read_to_string(path).ok().as_deref() == Some(text) {
        return Ok(false);
    }
    context.ledger.path(path)?;
    put(path, text).map(|()| true)
}

/// Writes `text` to a file of root, without an entry in the ledger.
pub(super) fn put(path: &Path, text: &str) -> Result<(), Failure> {
    let written = Place::make(path, (0, 0)).and_then(|place| {
        let put = || {
            let mut file = place.draft()?;
            file.write_all(text.as_bytes())?;
            place::finish(&file, 0o644, (0, 0), &BTreeMap::new())?;
            place.put()
        };
        put().inspect_err(|_| place.give_up())
    });
    written.map_err(|e| Failure::at(path, e))
}

/// Creates missing parent directories of a file of `owner`, with mode 0755. They belong to
/// root, or to a user below that user's home.
pub(super) fn parents(path: &Path, owner: (u32, u32)) -> Result<(), Failure> {
    let Some(parent) = path.parent() else { return Ok(()) };
    Place::make(path, owner).map(|_| ()).map_err(|e| Failure::at(parent, e))
}

/// Restores what was at a path.
pub(super) fn revert(path: &Path, was: &Was, context: &Context) -> Result<(), Failure> {
    let fail = |e| Failure::at(path, e);
    match was {
        Was::Absent => match Place::find(path).and_then(|place| place.remove()) {
            Err(e) if e.kind() == io::ErrorKind::DirectoryNotEmpty => {
                context.say(&format!("{} stays: it is not empty", path.display()))
            }
            // Its directory was removed or replaced.
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(()),
            removed => removed.map_err(fail),
        },
        Was::File { content, mode, uid, gid, xattrs } => {
            let place = Place::make(path, (*uid, *gid)).map_err(fail)?;
            let put = || {
                let mut file = place.draft()?;
                let kept = File::open(context.ledger.content(content))?;
                if Blob::copy(kept, &mut file)?.digest != *content {
                    return Err(io::Error::other("the saved copy is damaged"));
                }
                place::finish(&file, *mode, (*uid, *gid), &BTreeMap::new())?;
                // The directory may have given the new file a default ACL.
                place::replace_attributes(&file, xattrs)?;
                place.put()
            };
            put().map_err(|e| {
                place.give_up();
                fail(e)
            })
        }
        Was::Link { target, uid, gid } => symlink::put(path, &ledger::unescape(target), (*uid, *gid)),
        Was::Dir { mode, uid, gid, xattrs } => {
            let put = || {
                let place = Place::make(path, (*uid, *gid))?;
                if !place.make_dir()? && !fs::symlink_metadata(path)?.is_dir() {
                    return Err(io::Error::other("it is no longer a directory"));
                }
                place.set(*mode, (*uid, *gid))?;
                place.set_attributes(xattrs)
            };
            put().map_err(fail)
        }
    }
}

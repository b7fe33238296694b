//! `symlink`: a symbolic link, which replaces an existing file or link.

use std::fs;
use std::path::Path;

use super::context::Context;
use crate::failure::Failure;
use crate::place::Place;

pub(super) fn apply(path: &Path, target: &str, context: &mut Context) -> Result<bool, Failure> {
    if leads(path, target) {
        return Ok(false);
    }
    if fs::symlink_metadata(path).is_ok_and(|meta| meta.is_dir()) {
        return Err(Failure::new(format!("{} is a directory", path.display())));
    }
    context.ledger.path(path)?;
    put(path, Path::new(target), (0, 0))?;
    Ok(true)
}

/// Whether `path` is a link to `target`.
pub(super) fn leads(path: &Path, target: &str) -> bool {
    fs::read_link(path).is_ok_and(|t| t == Path::new(target))
}

/// Creates a link atomically; replaces anything except a directory.
pub(super) fn put(path: &Path, target: &Path, owner: (u32, u32)) -> Result<(), Failure> {
    let put = Place::make(path, owner).and_then(|place| {
        place.draft_link(target)?;
        place.put().inspect_err(|_| place.give_up())?;
        place.own_link(owner)
    });
    put.map_err(|e| Failure::at(path, e))
}

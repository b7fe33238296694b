//! `symlink`: a link, put in place of a file or link that was there.

use std::fs;
use std::path::Path;

use super::{Context, file};
use crate::failure::Failure;

pub(super) fn apply(path: &Path, target: &str, context: &mut Context) -> Result<bool, Failure> {
    if leads(path, target) {
        return Ok(false);
    }
    if fs::symlink_metadata(path).is_ok_and(|meta| meta.is_dir()) {
        return Err(Failure::new(format!("{} is a directory", path.display())));
    }
    context.ledger.path(path)?;
    file::parents(path)?;
    put(path, Path::new(target))?;
    Ok(true)
}

/// Whether there is a link to `target`.
pub(super) fn leads(path: &Path, target: &str) -> bool {
    fs::read_link(path).is_ok_and(|t| t == Path::new(target))
}

/// Puts a link in place of what is no directory, in one step.
pub(super) fn put(path: &Path, target: &Path) -> Result<(), Failure> {
    let fail = |e| Failure::at(path, e);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let short: String = name.chars().take(40).collect();
    let new = path.with_file_name(format!(".{short}.vimg-new"));
    let _ = fs::remove_file(&new);
    std::os::unix::fs::symlink(target, &new).map_err(fail)?;
    fs::rename(&new, path).map_err(fail)
}

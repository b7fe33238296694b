//! `symlink`: a link, put in place of a file or link that was there.

use std::fs;
use std::path::Path;

use super::file;
use crate::failure::Failure;

pub(super) fn apply(path: &Path, target: &str) -> Result<bool, Failure> {
    let fail = |e| Failure::at(path, e);
    file::parents(path)?;
    match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_symlink() && fs::read_link(path).is_ok_and(|t| t == Path::new(target)) => {
            return Ok(false);
        }
        Ok(meta) if meta.is_dir() => {
            return Err(Failure::new(format!("{} is a directory", path.display())));
        }
        _ => {}
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let short: String = name.chars().take(40).collect();
    let new = path.with_file_name(format!(".{short}.vimg-new"));
    let _ = fs::remove_file(&new);
    std::os::unix::fs::symlink(target, &new).map_err(fail)?;
    fs::rename(&new, path).map_err(fail)?;
    Ok(true)
}

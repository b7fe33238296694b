//! Reads a text file that the user named.

use super::output::{Error, RECIPE};

/// Reads a text file from outside of a project, with the size limit of recipes.
/// Rejects devices and pipes, which could block or never end.
pub(super) fn read_recipe(path: &std::path::Path) -> Result<String, Error> {
    use std::io::Read;
    use std::os::unix::fs::OpenOptionsExt;
    let fail = |why: String, help: &str| {
        Error::Message(format!("{}: {why}", path.display()), Some(help.to_owned()), RECIPE)
    };
    let nonblock = rustix::fs::OFlags::NONBLOCK.bits() as i32;
    let file = std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(nonblock)
        .open(path)
        .map_err(|e| fail(e.to_string(), "check the path and its permissions"))?;
    if !file.metadata().is_ok_and(|m| m.is_file()) {
        return Err(fail("this is not a regular file".into(), "name a regular file"));
    }
    let mut bytes = Vec::new();
    let limit = vimg_lang::MAX_RECIPE;
    file.take(limit as u64 + 1).read_to_end(&mut bytes).map_err(|e| fail(e.to_string(), "check the file"))?;
    if bytes.len() > limit {
        return Err(fail("it is too large".into(), &format!("such a file has at most {} KiB", limit >> 10)));
    }
    String::from_utf8(bytes).map_err(|_| fail("it is not UTF-8".into(), "save it as UTF-8"))
}

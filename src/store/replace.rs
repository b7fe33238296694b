//! Replaces, syncs and removes files.

use std::fs::{self, File};
use std::io;
use std::path::Path;

use super::error::StoreError;
use super::record::StateId;

pub(super) fn sync(path: &Path) -> Result<(), StoreError> {
    File::open(path).and_then(|f| f.sync_all()).map_err(|e| StoreError::new("sync", path, e))
}

pub(super) fn remove(path: &Path) -> Result<(), StoreError> {
    let result = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    match result {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(StoreError::new("remove", path, e)),
        _ => Ok(()),
    }
}

/// Replaces a small file in one step. Even after a power cut it has the old or
/// the new content. Follows a link. Keeps the mode; a new file is private to
/// the user.
pub fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let path = &path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(dir)?;
    // Another container may have a process with the same number.
    let (new, mut file) = loop {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let new = dir.join(format!(".{name}.{:x}", StateId::new().number()));
        match fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new) {
            Ok(file) => break (new, file),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(e),
        }
    };
    let written = (|| {
        if let Ok(was) = fs::metadata(path) {
            file.set_permissions(was.permissions())?;
        }
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&new, path)?;
        File::open(dir)?.sync_all()
    })();
    if written.is_err() {
        let _ = fs::remove_file(&new);
    }
    written
}

/// Replaces a small file without a sync: losing it only costs time.
pub fn replace_note(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let new = path.with_extension(format!("new-{}-{:x}", std::process::id(), StateId::new().number()));
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir)?;
    }
    fs::write(&new, bytes).and_then(|()| fs::rename(&new, path)).inspect_err(|_| {
        let _ = fs::remove_file(&new);
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_as_it_was() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let (file, link) = (dir.path().join("config.kdl"), dir.path().join("link"));
        fs::write(&file, "old").unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).unwrap();
        std::os::unix::fs::symlink("config.kdl", &link).unwrap();
        replace(&link, b"new").unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "new");
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o640);
        replace(&dir.path().join("fresh"), b"x").unwrap();
        let mode = fs::metadata(dir.path().join("fresh")).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode, fs::read_dir(dir.path()).unwrap().count()), (0o600, 3));
    }
}

//! Extended attributes of files: capabilities, ACLs, labels. Values are in hexadecimal.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

/// Reads all extended attributes of a file, or of a link itself.
///
/// # Errors
///
/// The attributes can't be read.
pub fn get(path: &Path) -> io::Result<BTreeMap<String, String>> {
    let mut names = vec![0; 64 << 10];
    let length = match rustix::fs::llistxattr(path, &mut names) {
        Ok(length) => length,
        // The filesystem does not support them.
        Err(rustix::io::Errno::OPNOTSUPP) => return Ok(BTreeMap::new()),
        Err(error) => return Err(error.into()),
    };
    let mut found = BTreeMap::new();
    for name in names[..length].split(|b| *b == 0).filter(|name| !name.is_empty()) {
        // A value has at most 64 KiB (xattr(7)).
        let mut value = vec![0; 64 << 10];
        let length = rustix::fs::lgetxattr(path, name, &mut value)?;
        let hex = value[..length].iter().map(|byte| format!("{byte:02x}")).collect();
        found.insert(String::from_utf8_lossy(name).into_owned(), hex);
    }
    Ok(found)
}

/// Attributes that desktops set: the origin of a download (with tokens in URLs), tags, the
/// state of an index (freedesktop's "Common extended attributes", Baloo).
const DESKTOP: [&str; 3] = ["user.xdg.", "user.baloo.", "user.mime_type"];

/// Reads the attributes that vimg copies from a file of a project: capabilities, and user
/// attributes except for those of desktops.
///
/// # Errors
///
/// The attributes can't be read.
pub fn portable(path: &Path) -> io::Result<BTreeMap<String, String>> {
    let mut all = get(path)?;
    all.retain(|name, _| {
        name == "security.capability"
            || name.starts_with("user.") && !DESKTOP.iter().any(|prefix| name.starts_with(prefix))
    });
    Ok(all)
}

/// Replaces all attributes of a file.
///
/// # Errors
///
/// The attributes can't be changed.
pub(crate) fn replace(path: &Path, wanted: &BTreeMap<String, String>) -> io::Result<()> {
    let mut names = vec![0; 64 << 10];
    let length = match rustix::fs::listxattr(path, &mut names) {
        Ok(length) => length,
        Err(rustix::io::Errno::OPNOTSUPP) => 0,
        Err(error) => return Err(error.into()),
    };
    for name in names[..length].split(|b| *b == 0).filter(|name| !name.is_empty()) {
        if !wanted.contains_key(&*String::from_utf8_lossy(name)) {
            rustix::fs::removexattr(path, name)?;
        }
    }
    set(path, wanted)
}

/// Sets attributes of a file; others stay.
///
/// # Errors
///
/// The attributes can't be changed.
pub fn set(path: &Path, wanted: &BTreeMap<String, String>) -> io::Result<()> {
    for (name, hex) in wanted {
        let digits = |at: usize| hex.get(at..at + 2).and_then(|d| u8::from_str_radix(d, 16).ok());
        let value: Vec<u8> = (0..hex.len()).step_by(2).filter_map(digits).collect();
        rustix::fs::setxattr(path, name.as_str(), &value, rustix::fs::XattrFlags::empty())?;
    }
    Ok(())
}

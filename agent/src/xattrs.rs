//! Extended attributes of files: capabilities, access lists, labels. Values are
//! written in hexadecimal.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

/// Those of a file, or of a link itself.
///
/// # Errors
///
/// The system's.
pub fn get(path: &Path) -> io::Result<BTreeMap<String, String>> {
    let mut names = vec![0; 64 << 10];
    let length = match rustix::fs::llistxattr(path, &mut names) {
        Ok(length) => length,
        // The filesystem has none.
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

/// Those that a copy of a file has, whoever makes it: its capabilities, and what
/// its owner has noted of it.
///
/// # Errors
///
/// The system's.
pub fn portable(path: &Path) -> io::Result<BTreeMap<String, String>> {
    let mut all = get(path)?;
    all.retain(|name, _| name == "security.capability" || name.starts_with("user."));
    Ok(all)
}

/// Gives a file these.
///
/// # Errors
///
/// The system's.
pub fn set(path: &Path, wanted: &BTreeMap<String, String>) -> io::Result<()> {
    for (name, hex) in wanted {
        let digits = |at: usize| hex.get(at..at + 2).and_then(|d| u8::from_str_radix(d, 16).ok());
        let value: Vec<u8> = (0..hex.len()).step_by(2).filter_map(digits).collect();
        rustix::fs::setxattr(path, name.as_str(), &value, rustix::fs::XattrFlags::empty())?;
    }
    Ok(())
}

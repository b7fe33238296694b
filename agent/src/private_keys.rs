//! Finds private keys that packages or scripts have made: every machine of an image would
//! have the same.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

/// Where programs of a system keep their keys.
const DIRS: [&str; 3] = ["/etc", "/root", "/var/lib"];
/// The longest begin of a file that is read. A key is at its begin, or is preceded by its
/// certificate.
const BEGIN: u64 = 16 << 10;
/// The most bytes of a file that may be a key.
const MOST: u64 = 64 << 10;
/// The most keys that are told.
const TOLD: usize = 20;
/// Directories with many files and no keys of the machine.
const APART: [&str; 3] = ["/var/lib/dpkg", "/var/lib/apt", "/var/lib/vimg"];

/// Lists files below `root` with a private key in PEM (RFC 7468), up to 20, without those
/// that are `declared`.
pub(crate) fn find(root: &Path, declared: &HashSet<PathBuf>) -> Vec<String> {
    let mut found = Vec::new();
    for dir in DIRS {
        look(root, Path::new(dir), declared, &mut found);
    }
    found.sort();
    found
}

fn look(root: &Path, dir: &Path, declared: &HashSet<PathBuf>, found: &mut Vec<String>) {
    for entry in fs::read_dir(root.join(dir.strip_prefix("/").unwrap_or(dir))).into_iter().flatten().flatten()
    {
        let path = dir.join(entry.file_name());
        let Ok(kind) = entry.file_type() else { continue };
        if found.len() >= TOLD || APART.iter().any(|apart| path == Path::new(apart)) {
            continue;
        }
        if kind.is_dir() {
            look(root, &path, declared, found);
        } else if kind.is_file() && !declared.contains(&path) && has_key(&entry.path()) {
            found.push(path.display().to_string());
        }
    }
}

fn has_key(path: &Path) -> bool {
    let Ok(file) = File::open(path) else { return false };
    if !file.metadata().is_ok_and(|meta| (1..=MOST).contains(&meta.len())) {
        return false;
    }
    let mut begin = Vec::new();
    if file.take(BEGIN).read_to_end(&mut begin).is_err() {
        return false;
    }
    let line = |line: &[u8]| {
        line.starts_with(b"-----BEGIN ") && line.trim_ascii_end().ends_with(b"PRIVATE KEY-----")
    };
    begin.split(|byte| *byte == b'\n').any(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_packages_are_found_and_declared_ones_are_not() {
        let root = tempfile::tempdir().unwrap();
        let put = |path: &str, content: &str| {
            let place = root.path().join(&path[1..]);
            fs::create_dir_all(place.parent().unwrap()).unwrap();
            fs::write(place, content).unwrap();
        };
        let key = "-----BEGIN RSA PRIVATE KEY-----\nAAAA\n-----END RSA PRIVATE KEY-----\n";
        put("/etc/app/tls/server.pem", &format!("-----BEGIN CERTIFICATE-----\nAAAA\n{key}"));
        put("/var/lib/app/key", key);
        put("/etc/mine.key", key);
        put("/etc/app/manual", "It begins with -----BEGIN PRIVATE KEY-----\n");
        put("/etc/app/public", "-----BEGIN PUBLIC KEY-----\nAAAA\n");
        put("/srv/key", key);
        let declared = HashSet::from([PathBuf::from("/etc/mine.key")]);
        assert_eq!(find(root.path(), &declared), ["/etc/app/tls/server.pem", "/var/lib/app/key"]);
    }
}

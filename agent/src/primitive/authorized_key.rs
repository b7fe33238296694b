//! `authorized-key`: a line in a user's `.ssh/authorized_keys`.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::context::Context;
use super::file;
use crate::failure::Failure;
use crate::ledger::Entry;
use crate::place::{self, Place};
use crate::system;

/// sshd ignores keys in a file or directory that others can write (sshd(8), `StrictModes`).
const DIR_MODE: u32 = 0o700;
const FILE_MODE: u32 = 0o600;

pub(super) fn apply(user: &str, key: &str, context: &mut Context) -> Result<bool, Failure> {
    let account = system::user(user)
        .ok_or_else(|| Failure::new(format!("there is no user `{user}` in the machine")))?;
    if !Path::new(&account.home).is_absolute() {
        return Err(Failure::new(format!("the user `{user}` has no home directory")));
    }
    let owner = (account.uid, account.gid);
    let dir = Path::new(&account.home).join(".ssh");
    let path = dir.join("authorized_keys");
    let mut changed = false;
    if !(dir.is_dir() && file::has(&dir, DIR_MODE, owner)) {
        context.ledger.path(&dir)?;
        let place = Place::make(&dir, owner).and_then(|place| {
            place.make_dir()?;
            place.set(DIR_MODE, owner)
        });
        place.map_err(|e| Failure::at(&dir, e))?;
        changed = true;
    }
    let there = read(&path)?;
    let text = there.clone().unwrap_or_default();
    if !text.lines().any(|line| line == key) {
        let was = text.lines().find(|line| blob(line).is_some() && blob(line) == blob(key));
        let entry = Entry::Key {
            path: path.display().to_string(),
            line: key.to_owned(),
            was: was.map(str::to_owned),
            created: there.is_none(),
        };
        context.ledger.note(&entry)?;
        write(&path, &with(&text, key, was), FILE_MODE, owner)?;
        return Ok(true);
    }
    Ok(file::attributes(&path, FILE_MODE, owner)? || changed)
}

/// Removes the line of a key, or restores the one that it replaced.
pub(super) fn revert(entry: &Entry) -> Result<(), Failure> {
    let Entry::Key { path, line, was, created } = entry else { return Ok(()) };
    let path = PathBuf::from(path);
    let Some(text) = read(&path)? else { return Ok(()) };
    let fail = |e| Failure::at(&path, e);
    let meta = fs::symlink_metadata(&path).map_err(fail)?;
    let rest = without(&text, line, was.as_deref());
    if rest.is_empty() && *created {
        return Place::find(&path).and_then(|place| place.remove()).map_err(fail);
    }
    write(&path, &rest, meta.mode() & 0o7777, (meta.uid(), meta.gid()))
}

/// Reads the keys of a user, if there are any.
fn read(path: &Path) -> Result<Option<String>, Failure> {
    match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_file() => fs::read_to_string(path).map(Some).map_err(|e| Failure::at(path, e)),
        Ok(_) => Err(Failure::new(format!("{} is not a regular file", path.display()))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Failure::at(path, error)),
    }
}

fn write(path: &Path, text: &str, mode: u32, owner: (u32, u32)) -> Result<(), Failure> {
    let written = Place::find(path).and_then(|place| {
        let put = || {
            let mut file = place.draft()?;
            file.write_all(text.as_bytes())?;
            place::finish(&file, mode, owner, &BTreeMap::new())?;
            place.put()
        };
        put().inspect_err(|_| place.give_up())
    });
    written.map_err(|e| Failure::at(path, e))
}

/// The text with the line of a key, in the place of `was` or at the end.
fn with(text: &str, key: &str, was: Option<&str>) -> String {
    let mut lines: Vec<&str> = text.lines().collect();
    match lines.iter_mut().find(|line| Some(**line) == was) {
        Some(line) => *line = key,
        None => lines.push(key),
    }
    joined(&lines)
}

/// The text without the line of a key, or with `was` in its place.
fn without(text: &str, key: &str, was: Option<&str>) -> String {
    let lines = text.lines().filter_map(|line| if line == key { was } else { Some(line) });
    joined(&lines.collect::<Vec<_>>())
}

fn joined(lines: &[&str]) -> String {
    lines.iter().map(|line| format!("{line}\n")).collect()
}

/// The key in a line, without its options and its comment.
fn blob(line: &str) -> Option<&str> {
    // All types of keys are long enough for the Base64 of a length to begin with AAAA.
    line.split_whitespace().find(|word| word.starts_with("AAAA"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_comes_and_goes_and_the_others_stay() {
        let both = with("# team\nssh-rsa AAAA1 one", "ssh-rsa AAAA2 two", None);
        assert_eq!(both, "# team\nssh-rsa AAAA1 one\nssh-rsa AAAA2 two\n");
        assert_eq!(without(&both, "ssh-rsa AAAA1 one", None), "# team\nssh-rsa AAAA2 two\n");
        let was = "ssh-rsa AAAA1 one";
        let changed = with(&both, "restrict ssh-rsa AAAA1 new", Some(was));
        assert_eq!(changed, "# team\nrestrict ssh-rsa AAAA1 new\nssh-rsa AAAA2 two\n");
        assert_eq!(without(&changed, "restrict ssh-rsa AAAA1 new", Some(was)), both);
        assert_eq!(without("ssh-rsa AAAA1 one\n", was, None), "");
        assert_eq!(blob("restrict ssh-rsa AAAA1 new"), blob(was));
    }

    #[test]
    fn a_missing_file_has_no_keys_and_a_link_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(read(&dir.path().join("keys")).unwrap(), None);
        std::os::unix::fs::symlink("/etc/passwd", dir.path().join("link")).unwrap();
        assert!(read(&dir.path().join("link")).unwrap_err().message.contains("not a regular file"));
    }
}

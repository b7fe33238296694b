//! The files of systemd's units: where they are, and what they say about the boot.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Where files of units are, first those that win (systemd.unit(5)). The directories below
/// `/run` are left out: what is there belongs to one boot, such as the masks of the
/// kernel's command line (`systemd.mask=`).
const DIRS: [&str; 4] = [
    "/etc/systemd/system",
    "/usr/local/lib/systemd/system",
    "/usr/lib/systemd/system",
    "/lib/systemd/system",
];
/// Where scripts of System V are, which systemd takes for services.
const SCRIPTS: &str = "/etc/init.d";
/// Types of units that may have no file: systemd or its generators make them at each boot,
/// for instance from `/etc/fstab`.
const MADE: [&str; 6] = [".mount", ".automount", ".swap", ".device", ".slice", ".scope"];
/// How many names a message suggests.
const SUGGESTED: usize = 3;

/// The files of units below a root directory.
pub(super) struct Units(PathBuf);

impl Units {
    /// Those of this machine.
    pub(super) fn new() -> Self {
        Self(PathBuf::from("/"))
    }

    /// Returns the value of `SYSTEMD_UNIT_PATH` with which `systemctl` sees these files only.
    /// `packages` is the directory in which it finds the units of packages: links to them
    /// get that name.
    pub(super) fn search_path(packages: &str) -> String {
        let (own, others) = DIRS.split_at(2);
        let others = others.iter().copied().filter(|dir| *dir != packages);
        own.iter().copied().chain([packages]).chain(others).collect::<Vec<_>>().join(":")
    }

    /// Returns the place of a unit's mask.
    pub(super) fn mask(&self, unit: &str) -> PathBuf {
        self.at(DIRS[0]).join(unit)
    }

    /// Returns the file that masks a unit, if one does: a link to `/dev/null`, or an empty
    /// file.
    pub(super) fn masked_by(&self, unit: &str) -> Option<PathBuf> {
        self.file(unit).filter(|file| is_mask(file))
    }

    /// Returns the name under which a unit has its file: `unit` may be an alias. `None` if
    /// there is no such unit.
    pub(super) fn real(&self, unit: &str) -> Option<String> {
        // A mask does not need a unit.
        let mask = self.mask(unit);
        let own = |file: &PathBuf| *file != mask || !is_mask(file);
        let Some(file) = self.files(unit).find(own) else {
            let script = unit.strip_suffix(".service").map(|name| self.at(SCRIPTS).join(name));
            return match script.is_some_and(|script| script.exists()) {
                true => Some(unit.to_owned()),
                false => self.known_as(unit),
            };
        };
        let target = fs::read_link(&file).ok().filter(|target| target != Path::new("/dev/null"));
        let name = target.as_ref().and_then(|target| target.file_name()?.to_str()).unwrap_or(unit);
        if file.file_name().is_some_and(|own| own == name) || self.file(name).is_none() {
            return Some(unit.to_owned());
        }
        Some(match (name.split_once("@."), unit.split_once('@')) {
            (Some((template, end)), Some((_, instance))) => {
                let instance = instance.rsplit_once('.').map_or(instance, |(instance, _)| instance);
                format!("{template}@{instance}.{end}")
            }
            _ => name.to_owned(),
        })
    }

    /// Returns the unit that gets the name `alias` when it is enabled.
    fn known_as(&self, alias: &str) -> Option<String> {
        self.names().into_iter().find(|name| {
            let text = self.file(name).and_then(|file| fs::read_to_string(file).ok()).unwrap_or_default();
            let mut lines = text.lines().filter_map(|line| line.strip_prefix("Alias="));
            lines.any(|names| names.split_whitespace().any(|name| name == alias))
        })
    }

    /// Whether a unit can be missing here and still exist in a machine that runs.
    pub(super) fn is_made_at_boot(unit: &str) -> bool {
        MADE.iter().any(|end| unit.ends_with(end))
    }

    /// Whether another unit wants or requires this one by a link, as packages do it for
    /// units that can't be enabled.
    pub(super) fn is_wanted(&self, unit: &str) -> bool {
        let dirs = DIRS.iter().flat_map(|dir| fs::read_dir(self.at(dir)).into_iter().flatten().flatten());
        let wants = |path: &Path| path.extension().is_some_and(|end| end == "wants" || end == "requires");
        dirs.map(|entry| entry.path()).filter(|path| wants(path)).any(|path| is_there(&path.join(unit)))
    }

    /// Returns the timer, socket or path unit that starts a service.
    pub(super) fn trigger(&self, unit: &str) -> Option<String> {
        let name = unit.strip_suffix(".service")?;
        let units = [".timer", ".socket", ".path"].map(|end| format!("{name}{end}"));
        units.into_iter().find(|unit| self.file(unit).is_some())
    }

    /// Lists units with a similar name.
    pub(super) fn similar(&self, unit: &str) -> Vec<String> {
        let stem = |name: &str| name.rsplit_once('.').map_or(name, |(stem, _)| stem).to_lowercase();
        let wanted = stem(unit);
        let mut near: Vec<(usize, String)> = Vec::new();
        for name in self.names() {
            let own = stem(&name);
            let edits = distance(&own, &wanted);
            let inside = own.len().min(wanted.len()) > 2 && (own.contains(&wanted) || wanted.contains(&own));
            if edits <= 2 || inside {
                near.push((edits, name));
            }
        }
        near.sort();
        near.into_iter().take(SUGGESTED).map(|(_, name)| name).collect()
    }

    fn names(&self) -> BTreeSet<String> {
        let dirs = DIRS.iter().flat_map(|dir| fs::read_dir(self.at(dir)).into_iter().flatten().flatten());
        let units = dirs.filter(|entry| !entry.path().is_dir());
        units.filter_map(|entry| entry.file_name().into_string().ok()).collect()
    }

    /// Returns the first file of a unit, which may be that of its template.
    fn file(&self, unit: &str) -> Option<PathBuf> {
        self.files(unit).next()
    }

    fn files(&self, unit: &str) -> impl Iterator<Item = PathBuf> {
        let names = std::iter::once(unit.to_owned()).chain(template(unit));
        let paths = names.flat_map(|name| DIRS.map(|dir| self.at(dir).join(&name)));
        paths.filter(|path| is_there(path))
    }

    fn at(&self, path: &str) -> PathBuf {
        self.0.join(path.trim_start_matches('/'))
    }
}

/// Returns the template of an instance, such as `getty@.service` of `getty@tty1.service`.
pub(super) fn template(unit: &str) -> Option<String> {
    let (name, rest) = unit.split_once('@')?;
    let (_, end) = rest.rsplit_once('.')?;
    Some(format!("{name}@.{end}"))
}

fn is_there(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|meta| !meta.is_dir())
}

fn is_mask(file: &Path) -> bool {
    match fs::read_link(file) {
        Ok(target) => target == Path::new("/dev/null"),
        Err(_) => fs::metadata(file).is_ok_and(|meta| meta.is_file() && meta.len() == 0),
    }
}

/// Counts the letters to insert, remove or replace to get from one word to the other.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (n, letter) in a.chars().enumerate() {
        let mut before = row[0];
        row[0] = n + 1;
        for (m, other) in b.iter().enumerate() {
            let replaced = before + usize::from(letter != *other);
            before = row[m + 1];
            row[m + 1] = replaced.min(row[m] + 1).min(before + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// Makes a root directory with files, and links for the entries with `->`.
    fn root(entries: &[(&str, &str)]) -> (tempfile::TempDir, Units) {
        let dir = tempfile::tempdir().unwrap();
        for (path, text) in entries {
            let path = dir.path().join(path.trim_start_matches('/'));
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            match text.strip_prefix("-> ") {
                Some(target) => symlink(target, path).unwrap(),
                None => fs::write(path, text).unwrap(),
            }
        }
        let units = Units(dir.path().to_owned());
        (dir, units)
    }

    #[test]
    fn a_unit_is_found_by_all_its_names() {
        let (_dir, units) = root(&[
            ("/usr/lib/systemd/system/ssh.service", "[Install]\nWantedBy=x.target\nAlias=sshd.service\n"),
            ("/usr/lib/systemd/system/getty@.service", "[Service]\n"),
            ("/usr/lib/systemd/system/autovt@.service", "-> getty@.service"),
            ("/usr/lib/systemd/system/dbus-org.x.service", "-> x.service"),
            ("/usr/lib/systemd/system/x.service", "[Service]\n"),
            ("/etc/systemd/system/own.service", "-> /opt/own/own.service"),
            ("/etc/init.d/old", "#!/bin/sh\n"),
        ]);
        for (name, real) in [
            ("ssh.service", "ssh.service"),
            ("sshd.service", "ssh.service"),
            ("getty@tty1.service", "getty@tty1.service"),
            ("autovt@tty1.service", "getty@tty1.service"),
            ("dbus-org.x.service", "x.service"),
            ("own.service", "own.service"),
            ("old.service", "old.service"),
        ] {
            assert_eq!(units.real(name).as_deref(), Some(real), "{name}");
        }
        assert_eq!(units.real("ssh.socket"), None);
        assert_eq!(units.similar("shh.service"), ["ssh.service"]);
        assert_eq!(units.similar("openssh.service"), ["ssh.service"]);
        assert!(units.similar("postgresql.service").is_empty());
    }

    #[test]
    fn an_instance_has_a_template() {
        assert_eq!(template("getty@tty1.service").as_deref(), Some("getty@.service"));
        assert_eq!(template("a@b.c.socket").as_deref(), Some("a@.socket"));
        assert_eq!(template("nginx.service"), None);
    }

    #[test]
    fn links_get_the_name_that_packages_use() {
        let path =
            "/etc/systemd/system:/usr/local/lib/systemd/system:/lib/systemd/system:/usr/lib/systemd/system";
        assert_eq!(Units::search_path("/lib/systemd/system"), path);
        assert_eq!(Units::search_path("/usr/lib/systemd/system"), DIRS.join(":"));
    }

    #[test]
    fn the_first_file_says_whether_a_unit_is_masked() {
        let (dir, units) = root(&[
            ("/etc/systemd/system/a.timer", "-> /dev/null"),
            ("/usr/lib/systemd/system/a.timer", "[Timer]\n"),
            ("/usr/lib/systemd/system/b.service", ""),
            ("/etc/systemd/system/c.service", "[Service]\n"),
            ("/usr/lib/systemd/system/c.service", "-> /dev/null"),
            ("/etc/systemd/system/d@one.service", "-> /dev/null"),
            ("/etc/systemd/system/e.service", "-> /dev/null"),
            ("/usr/lib/systemd/system/d@.service", "[Service]\n"),
        ]);
        assert_eq!(units.masked_by("a.timer"), Some(units.mask("a.timer")));
        assert!(units.mask("a.timer").starts_with(dir.path()));
        assert_eq!(units.real("a.timer").as_deref(), Some("a.timer"));
        assert!(units.masked_by("b.service").is_some_and(|file| file != units.mask("b.service")));
        assert_eq!(units.masked_by("c.service"), None);
        // A mask without a unit.
        assert_eq!((units.real("e.service"), units.real("b.service")), (None, Some("b.service".into())));
        assert!(units.masked_by("e.service").is_some());
        assert!(units.masked_by("d@one.service").is_some());
        assert_eq!(units.masked_by("d@two.service"), None);
    }

    #[test]
    fn units_that_start_others_are_found() {
        let (_dir, units) = root(&[
            ("/usr/lib/systemd/system/sysinit.target.wants/a.service", "-> ../a.service"),
            ("/usr/lib/systemd/system/b.timer", "[Timer]\n"),
        ]);
        assert!(units.is_wanted("a.service") && !units.is_wanted("b.service"));
        assert_eq!(units.trigger("b.service").as_deref(), Some("b.timer"));
        assert_eq!(units.trigger("a.service"), None);
    }
}

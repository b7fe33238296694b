//! Lists the packages of a machine, from the files of dpkg and apt.

use std::collections::{BTreeMap, HashSet};
use std::fs;

const STATUS: &str = "/var/lib/dpkg/status";
const AUTOMATIC: &str = "/var/lib/apt/extended_states";

/// An installed package.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Package {
    pub(crate) version: String,
    /// Whether apt installed it only as a dependency.
    pub(crate) automatic: bool,
}

/// Lists the installed packages of this machine, one per line: name and architecture,
/// version, and `auto` or `manual`.
pub(crate) fn list() -> String {
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    list_of(&read(STATUS), &read(AUTOMATIC))
}

fn list_of(status: &str, automatic: &str) -> String {
    let automatic: HashSet<&str> = automatic
        .split("\n\n")
        .filter(|stanza| field(stanza, "Auto-Installed") == Some("1"))
        .filter_map(|stanza| field(stanza, "Package"))
        .collect();
    let mut lines: Vec<String> = status
        .split("\n\n")
        .filter(|stanza| field(stanza, "Status").is_some_and(|s| s.ends_with(" installed")))
        .filter_map(|stanza| {
            let (name, version) = (field(stanza, "Package")?, field(stanza, "Version")?);
            let architecture = field(stanza, "Architecture")?;
            let how = if automatic.contains(name) { "auto" } else { "manual" };
            Some(format!("{name}:{architecture} {version} {how}\n"))
        })
        .collect();
    lines.sort();
    lines.concat()
}

fn field<'a>(stanza: &'a str, name: &str) -> Option<&'a str> {
    stanza.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": ")).map(str::trim)
}

/// Writes a list that [`parse`] can read.
pub(crate) fn write(packages: &BTreeMap<String, Package>) -> String {
    let line = |(name, package): (&String, &Package)| {
        format!("{name} {} {}\n", package.version, if package.automatic { "auto" } else { "manual" })
    };
    packages.iter().map(line).collect()
}

/// Parses such a list, by name and architecture in the form that apt takes.
pub(crate) fn parse(list: &str) -> BTreeMap<String, Package> {
    list.lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            let (name, version, how) = (words.next()?, words.next()?, words.next()?);
            let name = name.strip_suffix(":all").unwrap_or(name).to_owned();
            Some((name, Package { version: version.to_owned(), automatic: how == "auto" }))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packages_are_read_from_the_files_of_dpkg_and_apt() {
        let status = "Package: b\nStatus: install ok installed\nVersion: 2:1-1\nArchitecture: all\n\n\
                      Package: a\nStatus: install ok installed\nDescription: Version\n Version: 9\n\
                      Version: 1\nArchitecture: amd64\n\n\
                      Package: c\nStatus: deinstall ok config-files\nVersion: 3\nArchitecture: amd64\n";
        let automatic = "Package: a\nArchitecture: amd64\nAuto-Installed: 1\n\n\
                         Package: b\nArchitecture: amd64\nAuto-Installed: 0\n";
        let list = list_of(status, automatic);
        assert_eq!(list, "a:amd64 1 auto\nb:all 2:1-1 manual\n");
        let parsed = parse(&list);
        assert_eq!(parsed["b"], Package { version: "2:1-1".into(), automatic: false });
        assert!(parsed["a:amd64"].automatic);
        assert_eq!(parse(&write(&parsed)), parsed);
    }
}

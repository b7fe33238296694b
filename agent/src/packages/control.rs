//! Reads stanzas in the format of Debian's control files (deb-control(5)).

use std::collections::HashSet;

/// Returns the value of a field of a stanza; only the first line of it.
pub(super) fn field<'a>(stanza: &'a str, name: &str) -> Option<&'a str> {
    stanza.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": ")).map(str::trim)
}

/// Returns the stanzas of the packages that are installed, of dpkg's list of packages.
pub(super) fn installed(status: &str) -> impl Iterator<Item = &str> {
    status.split("\n\n").filter(|stanza| field(stanza, "Status").is_some_and(|s| s.ends_with(" installed")))
}

/// Finds the packages that `name` recommends and that are not installed, in dpkg's list of
/// packages: for each, its alternatives. Versions are not compared.
pub(super) fn lacking(status: &str, name: &str) -> Vec<Vec<String>> {
    let recommends: Vec<&str> = installed(status)
        .filter(|stanza| field(stanza, "Package") == Some(name))
        .filter_map(|stanza| field(stanza, "Recommends"))
        .collect();
    if recommends.is_empty() {
        return Vec::new();
    }
    let mut there = HashSet::new();
    for stanza in installed(status) {
        there.extend(field(stanza, "Package"));
        there.extend(names(field(stanza, "Provides").unwrap_or_default()));
    }
    let groups = recommends.into_iter().flat_map(|list| list.split(','));
    let alternatives = groups.map(|group| group.split('|').flat_map(names).collect::<Vec<_>>());
    alternatives
        .filter(|group| !group.iter().any(|name| there.contains(name)))
        .map(|group| group.into_iter().map(str::to_owned).collect())
        .collect()
}

/// Returns the names in a list of packages, without versions and architectures.
fn names(list: &str) -> impl Iterator<Item = &str> {
    list.split(',')
        .filter_map(|item| item.trim().split([' ', '(', ':', '[', '<']).next())
        .filter(|name| !name.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_package_recommends_and_is_not_there_is_found() {
        let status = "Package: guard\nStatus: install ok installed\nRecommends: python3-systemd, \
                      python3:any, whois (>= 5), nftables | iptables, mail-agent, postman | x-agent\n\n\
                      Package: python3\nStatus: install ok installed\n\n\
                      Package: iptables\nStatus: install ok installed\n\n\
                      Package: whois\nStatus: deinstall ok config-files\n\n\
                      Package: postfix\nStatus: install ok installed\nProvides: mail-agent (= 1), other\n";
        let expected: [&[&str]; 3] = [&["python3-systemd"], &["whois"], &["postman", "x-agent"]];
        assert_eq!(lacking(status, "guard"), expected);
        assert!(lacking(status, "python3").is_empty());
        assert!(lacking(status, "whois").is_empty());
        assert!(lacking("", "guard").is_empty());
    }
}

//! Replaces layers in a running machine, so that the old service keeps running as long as
//! possible: preinstalls the packages of the new layers, stops the old services, starts
//! the new ones, and only then purges the old packages.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::context::Context;
use super::pending::Held;
use super::revert::Going;
use super::{package, service};
use crate::command;
use crate::failure::Failure;
use crate::ledger::Entry;
use crate::protocol::Order;

/// Does the postponed work of a layer, if it must be done before the step `next`.
pub(crate) fn settle(next: Option<&Order>, context: &mut Context) -> Result<(), Failure> {
    let (wants, ends) = match next {
        None | Some(Order::Revert { .. }) => (true, true),
        Some(Order::Layer { .. }) => (true, false),
        Some(Order::Make(primitive)) => (primitive.expects_services(), false),
        Some(Order::Preinstall { .. } | Order::Leave { .. }) => (false, false),
    };
    if wants {
        for held in std::mem::take(&mut context.switch.due) {
            release(&held, context)?;
        }
    }
    if ends {
        for unit in std::mem::take(&mut context.switch.again) {
            service::systemctl("try-restart", &unit, context)?;
        }
    }
    Ok(())
}

/// Does the postponed actions of preinstalled packages: starts their services, unless a
/// step has done so, and restarts or reloads running units (deb-systemd-invoke(1p),
/// invoke-rc.d(8)). A service that can't be started is not a failure of the package.
fn release(held: &Held, context: &Context) -> Result<(), Failure> {
    for unit in units_of(&held.packages)?.iter().filter(|unit| !unit.contains('@')) {
        if service::at_boot(unit)?.1.starts_with("enabled") && !service::runs(unit, context)? {
            try_to("start", unit, context)?;
        }
    }
    let lines: BTreeSet<&str> = held.asked.lines().collect();
    for line in lines {
        let words: Vec<&str> = line.split_whitespace().filter(|word| !word.starts_with('-')).collect();
        let [unit, action, ..] = words[..] else { continue };
        let verb = match action {
            "restart" | "try-restart" => "try-restart",
            "reload" | "force-reload" => "try-reload-or-restart",
            _ => continue,
        };
        let unit = if unit.contains('.') { unit.to_owned() } else { format!("{unit}.service") };
        try_to(verb, &unit, context)?;
    }
    Ok(())
}

fn try_to(verb: &str, unit: &str, context: &Context) -> Result<(), Failure> {
    match service::systemctl(verb, unit, context) {
        Ok(()) => Ok(()),
        Err(failure) => context.say(&failure.message),
    }
}

/// Reverts layers except for the packages at their beginning, and stops the services of
/// these packages. Then the new layers, whose files will be at `paths`, only have to be
/// started. Does slow work before any change.
pub(super) fn leave(layers: &[String], paths: &[String], context: &mut Context) -> Result<(), Failure> {
    let (mut all, mut stop, mut again) = (Vec::new(), Vec::new(), Vec::new());
    for going in Going::find(layers, context)? {
        let mut stay = if context.switch.is_on() { leading_packages(&going.page.entries) } else { 0 };
        let (mut gone, mut kept) = (Vec::new(), Vec::new());
        for entry in &going.page.entries[..stay] {
            if let Entry::Packages { before, after: Some(after), .. } = entry {
                package::partition(before, after, &going.others, context, &mut gone, &mut kept)?;
            }
        }
        if would_take(&gone, paths)? {
            // Revert all of the layer before the new one is applied.
            stay = 0;
        } else {
            stop.extend(units_of(&gone)?);
            again.extend(units_of(&kept)?);
        }
        all.push((going, stay));
    }
    for (going, stay) in &all {
        going.take_back(*stay, context)?;
        let entries = &going.page.entries[*stay..];
        service::reread(entries, context)?;
        again.extend(service::running(entries));
    }
    service::stop_all(&stop, context)?;
    again.retain(|unit| unit.ends_with(".service") && !stop.contains(unit));
    context.switch.again.extend(again);
    all.iter().try_for_each(|(going, stay)| context.ledger.shorten(&going.page, *stay))
}

/// Counts the entries about packages at the beginning of a page. Returns 0 if there are
/// later ones: entries before packages must be reverted after them.
fn leading_packages(entries: &[Entry]) -> usize {
    let packages = |entry: &Entry| matches!(entry, Entry::Packages { .. });
    let first = entries.iter().take_while(|entry| packages(entry)).count();
    if entries[first..].iter().any(packages) { 0 } else { first }
}

fn files_of(packages: &[String]) -> Result<String, Failure> {
    if packages.is_empty() {
        return Ok(String::new());
    }
    let mut list = command::command("dpkg-query");
    Ok(command::query(list.args(["--listfiles", "--"]).args(packages), command::QUESTION)?.1)
}

/// Lists the units of packages; for a template, a pattern that matches all its instances.
fn units_of(packages: &[String]) -> Result<Vec<String>, Failure> {
    let files = files_of(packages)?;
    let units =
        files.lines().map(Path::new).filter(|p| p.parent().is_some_and(|d| d.ends_with("systemd/system")));
    let names = units.filter_map(|path| path.file_name()?.to_str());
    let run = |name: &&str| [".service", ".socket", ".timer", ".path"].iter().any(|end| name.ends_with(end));
    Ok(names.filter(run).map(|name| name.replace("@.", "@*.")).collect())
}

/// Whether a purge of packages may remove something at `paths`: it removes the files of
/// the packages, and directories that no other package has.
fn would_take(packages: &[String], paths: &[String]) -> Result<bool, Failure> {
    let files = files_of(packages)?;
    let files: BTreeSet<&str> = files.lines().collect();
    let theirs: BTreeSet<&str> = paths
        .iter()
        .flat_map(|path| Path::new(path).ancestors())
        .filter_map(|path| files.get(path.to_str()?).copied())
        .collect();
    if theirs.is_empty() {
        return Ok(false);
    }
    let mut search = command::command("dpkg-query");
    let (_, text) = command::query(search.args(["--search", "--"]).args(&theirs), command::QUESTION)?;
    let owners = owners(&text);
    let purged = |owner: &&str| packages.iter().any(|name| package::bare(name) == *owner);
    Ok(theirs.iter().any(|path| owners.get(path).is_none_or(|names| names.iter().all(purged))))
}

/// Parses the output of `dpkg-query --search`: paths, and the packages that contain them.
fn owners(text: &str) -> BTreeMap<&str, Vec<&str>> {
    let mut owners: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for line in text.lines().filter(|line| !line.starts_with("diversion by ")) {
        let Some((names, path)) = line.split_once(": ") else { continue };
        owners.entry(path).or_default().extend(names.split(", ").map(package::bare));
    }
    owners
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::Was;

    #[test]
    fn owners_are_read_as_dpkg_tells_them() {
        let text = "nginx-common, base-files: /etc\nnginx-common: /etc/nginx\n\
                    diversion by x from: /etc/nginx\nlibc6:amd64, libc6:i386: /lib\n";
        let owners = owners(text);
        assert_eq!(owners["/etc"], ["nginx-common", "base-files"]);
        assert_eq!((owners["/etc/nginx"].len(), owners["/lib"][0]), (1, "libc6"));
    }

    #[test]
    fn packages_go_last_only_if_they_came_first() {
        let path = || Entry::Path { path: "/x".into(), was: Was::Absent };
        let packages =
            || Entry::Packages { names: vec![], before: crate::protocol::Digest::of(b""), after: None };
        assert_eq!(leading_packages(&[packages(), packages(), path()]), 2);
        assert_eq!(leading_packages(&[packages(), path(), packages()]), 0);
        assert_eq!(leading_packages(&[path()]), 0);
    }
}

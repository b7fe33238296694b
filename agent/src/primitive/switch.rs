//! Replaces layers in a running machine, so that the old service keeps running as long as
//! possible: preinstalls the packages of the new layers, stops the old services, starts
//! the new ones, and only then purges the old packages.

use std::collections::BTreeSet;
use std::path::Path;

use super::context::Context;
use super::pending::Held;
use super::revert::Going;
use super::{package, service};
use crate::failure::Failure;
use crate::init::{self, Verb};
use crate::ledger::Entry;
use crate::packages;
use crate::protocol::{Order, unit};

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
        let again = std::mem::take(&mut context.switch.again);
        service::restart(again, context)?;
    }
    Ok(())
}

/// Does the postponed actions of preinstalled packages: starts their services, unless a
/// step has done so, and restarts or reloads running units. A service that can't be
/// started is not a failure of the package.
fn release(held: &Held, context: &Context) -> Result<(), Failure> {
    let (init, output) = (init::find()?, context.output());
    for unit in units_of(&held.packages)?.iter().filter(|unit| !unit.contains('@')) {
        if init.at_boot(unit)?.1.starts_with("enabled") && !init.runs(unit, &output)? {
            try_to(Verb::Start, unit, context)?;
        }
    }
    held.asked.iter().try_for_each(|(name, verb)| try_to(*verb, &unit(name), context))
}

fn try_to(verb: Verb, unit: &str, context: &Context) -> Result<(), Failure> {
    match init::find()?.control(verb, unit, &context.output()) {
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
    if !stop.is_empty() {
        init::find()?.stop_all(&stop, &context.output())?;
    }
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

/// Lists the units of packages.
fn units_of(packages: &[String]) -> Result<Vec<String>, Failure> {
    if packages.is_empty() {
        return Ok(Vec::new());
    }
    Ok(init::find()?.units_among(&packages::find()?.files_of(packages)?))
}

/// Whether a purge of packages may remove something at `paths`: it removes the files of
/// the packages, and directories that no other package has.
fn would_take(names: &[String], paths: &[String]) -> Result<bool, Failure> {
    if names.is_empty() {
        return Ok(false);
    }
    let manager = packages::find()?;
    let files = manager.files_of(names)?;
    let files: BTreeSet<&str> = files.lines().collect();
    let theirs: BTreeSet<&str> = paths
        .iter()
        .flat_map(|path| Path::new(path).ancestors())
        .filter_map(|path| files.get(path.to_str()?).copied())
        .collect();
    let theirs: Vec<&str> = theirs.into_iter().collect();
    if theirs.is_empty() { Ok(false) } else { manager.owns_alone(names, &theirs) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::Was;

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

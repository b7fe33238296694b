//! `package`: installs packages of the distribution, all of a step in one transaction.

use super::context::Context;
use super::pending::Held;
use crate::failure::Failure;
use crate::ledger::Entry;
use crate::packages::{self, List, Mark, Packages, With};
use crate::protocol::Digest;

pub(super) fn apply(names: &[String], recommends: &[String], context: &mut Context) -> Result<bool, Failure> {
    let manager = packages::find()?;
    let list = manager.list();
    let there = packages::parse(&list);
    let missing: Vec<&String> = names.iter().filter(|name| !manager.has(name, &there)).collect();
    let others: Vec<&String> = names.iter().filter(|name| manager.is_automatic(name, &there)).collect();
    let old = |name: &&String| manager.has(name, &there);
    let lacks = |name: &String| !manager.lacking(name).is_empty();
    let incomplete = recommends.iter().filter(old).any(lacks);
    if missing.is_empty() && others.is_empty() && !incomplete {
        // If they were preinstalled, their services start at this step.
        return Ok(context.switch.wants(context.ledger.page()));
    }
    let before = context.ledger.keep(list.as_bytes())?;
    let noted = |after| Entry::Packages { names: names.to_vec(), before, after };
    context.ledger.note(&noted(None))?;
    if !missing.is_empty() {
        context.network(true)?;
        let (more, plain): (Vec<_>, Vec<_>) = missing.iter().partition(|name| recommends.contains(name));
        for (specs, with) in [(plain, With::Needed), (more, With::Recommended)] {
            if !specs.is_empty() {
                manager.install(&specs, with, &context.output())?;
            }
        }
    }
    for name in recommends.iter().filter(old) {
        complete(name, manager, context)?;
    }
    if !others.is_empty() {
        // They were installed as dependencies, and would be removed with the package that
        // needs them.
        manager.mark(Mark::Manual, &others, &context.output())?;
    }
    let list = manager.list();
    let after = context.ledger.keep(list.as_bytes())?;
    context.ledger.note(&noted(Some(after)))?;
    Ok(list.as_bytes() != context.ledger.kept(&before)?.as_slice())
}

/// Installs what an installed package recommends, as dependencies. As with a new package,
/// those that are not available, or are in the way of others, are left out.
fn complete(name: &str, manager: &dyn Packages, context: &mut Context) -> Result<(), Failure> {
    let lacking = manager.lacking(name);
    if lacking.is_empty() {
        return Ok(());
    }
    context.network(true)?;
    manager.refresh(&context.output())?;
    for group in lacking {
        for one in &group {
            if !manager.would_remove(&[one])? {
                let before = packages::parse(&manager.list());
                manager.install(&[one], With::Recommended, &context.output())?;
                // A virtual package has another name than the one that is installed for it.
                let after = packages::parse(&manager.list());
                let new: Vec<&String> = after
                    .iter()
                    .filter(|(name, package)| !before.contains_key(*name) && !package.automatic)
                    .map(|(name, _)| name)
                    .collect();
                if !new.is_empty() {
                    manager.mark(Mark::Automatic, &new, &context.output())?;
                }
                break;
            }
        }
    }
    Ok(())
}

/// Preinstalls packages of a new layer, before the `leaving` layers are reverted. Their
/// services start only with the new layer. The ledger records the packages as if the
/// leaving layers had already been reverted.
pub(super) fn ahead(names: &[String], leaving: &[String], context: &mut Context) -> Result<bool, Failure> {
    let manager = packages::find()?;
    let there = packages::parse(&manager.list());
    let missing: Vec<&String> = names.iter().filter(|name| !manager.has(name, &there)).collect();
    if context.switch.ahead == Some(false) {
        return Ok(false);
    }
    if !missing.is_empty() {
        context.network(true)?;
        manager.refresh(&context.output())?;
        if !manager.can_hold() || manager.would_remove(&missing)? {
            context.say("can't install the new packages before the old ones are removed")?;
            context.switch.ahead = Some(false);
            return Ok(false);
        }
    }
    context.switch.ahead = Some(true);
    let mut base = there.clone();
    let pages = context.ledger.pages()?;
    for page in leaving.iter().filter_map(|layer| pages.iter().find(|page| page.layer == *layer)) {
        for entry in page.entries.iter().rev() {
            let Entry::Packages { before, after: Some(after), .. } = entry else { continue };
            without(&mut base, &kept(before, context)?, &kept(after, context)?);
        }
    }
    let before = context.ledger.keep(packages::write(&base).as_bytes())?;
    let noted = |after| Entry::Packages { names: names.to_vec(), before, after };
    context.ledger.note(&noted(None))?;
    let asked = match missing.as_slice() {
        [] => Vec::new(),
        missing => {
            let hold = manager.hold()?;
            manager.install(missing, With::Needed, &context.output())?;
            hold.asked()
        }
    };
    let list = manager.list();
    let after = context.ledger.keep(list.as_bytes())?;
    context.ledger.note(&noted(Some(after)))?;
    let packages = packages::parse(&list).into_keys().filter(|name| !there.contains_key(name)).collect();
    context.switch.hold(context.ledger.page(), Held { packages, asked });
    Ok(!missing.is_empty())
}

/// Reverts in the list `there` the changes from `before` to `after`.
fn without(there: &mut List, before: &List, after: &List) {
    for (name, package) in after {
        match before.get(name) {
            None => drop(there.remove(name)),
            Some(was) if was != package => drop(there.insert(name.clone(), was.clone())),
            Some(_) => {}
        }
    }
    for (name, was) in before.iter().filter(|(name, _)| !after.contains_key(*name)) {
        there.insert(name.clone(), was.clone());
    }
}

/// Reads a stored list.
fn kept(digest: &Digest, context: &Context) -> Result<List, Failure> {
    let bytes = context.ledger.kept(digest)?;
    Ok(packages::parse(&String::from_utf8_lossy(&bytes)))
}

/// Finds the packages that came with a layer, are still installed, and are named by no
/// other layer. Returns those that no other package needs, and the rest.
fn idle_of(
    before: &List,
    after: &List,
    others: &[String],
    context: &Context,
) -> Result<(Vec<String>, Vec<String>), Failure> {
    let manager = packages::find()?;
    let now = packages::parse(&manager.list());
    let came: Vec<&String> = after
        .keys()
        .filter(|name| {
            !before.contains_key(*name) && now.contains_key(*name) && !manager.is_asked(name, others)
        })
        .collect();
    if came.is_empty() {
        return Ok((Vec::new(), Vec::new()));
    }
    manager.mark(Mark::Automatic, &came, &context.output())?;
    let idle = manager.idle()?;
    Ok(came.into_iter().cloned().partition(|name| idle.contains(manager.bare(name))))
}

/// Splits the installed packages that came with a layer into those that [`revert`] would
/// purge, and the rest.
pub(super) fn partition(
    before: &Digest,
    after: &Digest,
    others: &[String],
    context: &Context,
    gone: &mut Vec<String>,
    rest: &mut Vec<String>,
) -> Result<(), Failure> {
    let (before, after) = (kept(before, context)?, kept(after, context)?);
    let (idle, _) = idle_of(&before, &after, others, context)?;
    let now = packages::parse(&packages::find()?.list());
    let came = after.into_keys().filter(|name| !before.contains_key(name) && now.contains_key(name));
    rest.extend(came.filter(|name| !idle.contains(name)));
    gone.extend(idle);
    Ok(())
}

/// Reverts packages: purges new packages that nothing else needs, and installs replaced or
/// removed packages again. `others` are the packages that other layers name.
pub(super) fn revert(
    before: &Digest,
    after: Option<&Digest>,
    others: &[String],
    context: &Context,
) -> Result<(), Failure> {
    let (manager, output) = (packages::find()?, context.output());
    let before = kept(before, context)?;
    let after = match after {
        Some(after) => kept(after, context)?,
        None => packages::parse(&manager.list()),
    };
    let (gone, needed) = idle_of(&before, &after, others, context)?;
    // During a switch, the new layer often needs it, so this is not worth a message.
    for name in needed.iter().filter(|_| !context.switch.is_on()) {
        context.say(&format!("{name} stays: another package needs it"))?;
    }
    if !gone.is_empty() {
        manager.remove(&gone, &output)?;
    }
    let now = packages::parse(&manager.list());
    let back: Vec<(&String, &String)> = before
        .iter()
        .filter(|(name, was)| after.get(*name).is_none_or(|after| after.version != was.version))
        .filter(|(name, was)| now.get(*name).is_none_or(|now| now.version != was.version))
        .map(|(name, was)| (name, &was.version))
        .collect();
    for spec in manager.restore(&back, context.switch.is_on(), &output)? {
        context.say(&format!("{spec} is not restored: it conflicts with new packages"))?;
    }
    // Packages that only this layer named are automatic again.
    let now = packages::parse(&manager.list());
    let automatic: Vec<&String> = before
        .iter()
        .filter(|(name, was)| {
            was.automatic
                && now.get(*name).is_some_and(|now| !now.automatic)
                && !manager.is_asked(name, others)
        })
        .map(|(name, _)| name)
        .collect();
    if automatic.is_empty() { Ok(()) } else { manager.mark(Mark::Automatic, &automatic, &output) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_layer_did_to_packages_can_be_taken_out_of_a_list() {
        let list = packages::parse;
        let (before, after) =
            (list("a 1 manual\nb 1 auto\nc 1 manual\n"), list("a 2 manual\nb 1 manual\nd 1 auto\n"));
        // Another layer has added `e`, and removed nothing.
        let mut there = list("a 2 manual\nb 1 manual\nd 1 auto\ne 1 manual\n");
        without(&mut there, &before, &after);
        assert_eq!(there, list("a 1 manual\nb 1 auto\nc 1 manual\ne 1 manual\n"));
    }
}

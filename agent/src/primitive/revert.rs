//! Reverts layers: restores what they changed.

use std::collections::HashMap;

use super::context::Context;
use super::{account, authorized_key, file, kernel_parameter, package, run, service, sysctl};
use crate::failure::Failure;
use crate::ledger::{self, Entry, Page};
use crate::protocol::Digest;

/// Reverts a layer, the last change first. After a failure, the revert can be repeated.
pub(super) fn revert(layer: &str, context: &mut Context) -> Result<(), Failure> {
    for going in Going::find(&[layer.to_owned()], context)? {
        going.take_back(0, context)?;
        // Services that keep running have read the reverted files.
        service::reread(&going.page.entries, context)?;
        service::restart(service::running(&going.page.entries), context)?;
        context.ledger.tear_out(&going.page)?;
    }
    Ok(())
}

/// A layer to revert.
pub(super) struct Going {
    pub(super) page: Page,
    /// Packages that the other layers name.
    pub(super) others: Vec<String>,
}

impl Going {
    /// Finds layers, in this order.
    ///
    /// # Errors
    ///
    /// A layer that stays has changed one of their paths later.
    pub(super) fn find(layers: &[String], context: &Context) -> Result<Vec<Self>, Failure> {
        let (going, staying): (Vec<Page>, Vec<Page>) =
            context.ledger.pages()?.into_iter().partition(|page| layers.contains(&page.layer));
        for page in &going {
            for entry in &page.entries {
                let Entry::Path { path, .. } = entry else { continue };
                let same = |other: &&Page| {
                    let same = |e: &Entry| matches!(e, Entry::Path { path: other, .. } if other == path);
                    other.number > page.number && other.entries.iter().any(same)
                };
                if let Some(other) = staying.iter().find(same) {
                    let message = format!("{path} was changed again by the layer `{}`", other.layer);
                    return Err(Failure { layer: Some(other.layer.clone()), ..Failure::new(message) });
                }
            }
        }
        let names = staying.iter().flat_map(|other| &other.entries).filter_map(|entry| match entry {
            Entry::Packages { names, .. } => Some(names),
            _ => None,
        });
        let others: Vec<String> = names.flatten().cloned().collect();
        let mut going: HashMap<String, Page> =
            going.into_iter().map(|page| (page.layer.clone(), page)).collect();
        let mut found = Vec::new();
        for layer in layers {
            let Some(page) = going.remove(layer) else {
                return Err(Failure::new(format!("the machine has no layer `{layer}`")));
            };
            found.push(Self { page, others: others.clone() });
        }
        Ok(found)
    }

    /// Reverts the entries of the page from the index `from` on, the last first.
    pub(super) fn take_back(&self, from: usize, context: &mut Context) -> Result<(), Failure> {
        let entries = &self.page.entries;
        for (n, entry) in entries.iter().enumerate().skip(from).rev() {
            match entry {
                // Recorded before the installation; a later entry records its result.
                Entry::Packages { before, after: None, .. } if completed(before, &entries[n + 1..]) => {}
                Entry::Path { path, was } => file::revert(&ledger::unescape(path), was, context)?,
                Entry::Packages { before, after, .. } => {
                    context.network(true)?;
                    package::revert(before, after.as_ref(), &self.others, context)?
                }
                Entry::Group { name, was } => account::revert_group(name, *was, context)?,
                Entry::User { .. } => account::revert_user(entry, context)?,
                Entry::Key { .. } => authorized_key::revert(entry)?,
                Entry::Service { unit, enabled, active } => service::revert(unit, enabled, *active, context)?,
                Entry::Setting { path, value } => sysctl::revert(path, value)?,
                Entry::KernelParameters { words } => kernel_parameter::revert(words, context)?,
                Entry::Run { .. } => run::revert(entry, context)?,
            }
        }
        Ok(())
    }
}

fn completed(before: &Digest, later: &[Entry]) -> bool {
    later.iter().any(|e| matches!(e, Entry::Packages { before: b, after: Some(_), .. } if b == before))
}

//! The primitives: each looks, then changes what is not as declared.

mod account;
mod archive;
mod directory;
mod file;
mod hook;
mod kernel_module;
mod lay;
mod package;
mod run;
mod service;
mod switch;
mod symlink;
mod sysctl;

use std::collections::HashMap;
use std::path::Path;

use crate::command::Output;
use crate::failure::Failure;
use crate::fetch::{Channel, Sender};
use crate::ledger::{self, Entry, Ledger, Page};
use crate::protocol::{Digest, FromAgent, Owner, Primitive};
use crate::system;

pub(crate) use switch::{Switch, settle};

/// What a primitive works with.
pub(crate) struct Context<'a> {
    pub(crate) channel: &'a mut Channel,
    pub(crate) sender: &'a Sender,
    pub(crate) ledger: &'a mut Ledger,
    pub(crate) switch: &'a mut Switch,
    pub(crate) step: usize,
}

impl Context<'_> {
    pub(crate) fn output(&self) -> Output<'_> {
        Output { sender: self.sender, step: self.step, hidden: &[] }
    }

    /// Opens the way out to the network, or closes it.
    pub(crate) fn network(&mut self, open: bool) -> Result<(), Failure> {
        self.channel.network(open).map_err(|e| Failure::new(format!("the network: {e}")))
    }

    /// Says something to the person who builds.
    fn say(&self, line: &str) -> Result<(), Failure> {
        let text = format!("{line}\n");
        self.sender
            .send(&FromAgent::Output { step: self.step, text })
            .map_err(|e| Failure::new(format!("the host does not listen: {e}")))
    }
}

/// Makes one primitive true; says whether anything had to change.
pub(crate) fn apply(primitive: &Primitive, context: &mut Context) -> Result<bool, Failure> {
    match primitive {
        Primitive::Package { names } => package::apply(names, context),
        Primitive::File { path, content, mode, owner } => {
            file::apply(Path::new(path), *content, *mode, ids(owner)?, context)
        }
        Primitive::Directory { path, mode, owner, tree } => {
            directory::apply(Path::new(path), *mode, ids(owner)?, *tree, context)
        }
        Primitive::Symlink { path, target } => symlink::apply(Path::new(path), target, context),
        Primitive::Archive { path, content, strip, owner } => {
            archive::apply(Path::new(path), *content, *strip, ids(owner)?, context)
        }
        Primitive::Group { name, gid, system } => account::group(name, *gid, *system, context),
        Primitive::User(user) => account::user(user, context),
        Primitive::Service { unit, enabled, state } => service::apply(unit, *enabled, *state, context),
        Primitive::Sysctl { key, value } => sysctl::apply(key, value, context),
        Primitive::KernelModule { name } => kernel_module::apply(name, context),
        Primitive::Run(run) => run::apply(run, context),
        Primitive::Hook { when, script } => hook::apply(when, script, context),
        Primitive::Reboot => Err(Failure::new("a machine can't boot itself again in the middle of a layer")),
        Primitive::Ahead { names, leaving } => package::ahead(names, leaving, context),
        Primitive::Leave { layers, paths } => switch::leave(layers, paths, context).map(|()| true),
        Primitive::Revert { layer } => revert(layer, context).map(|()| true),
        Primitive::Layer { name } => context.ledger.enter(name).map(|()| false),
    }
}

/// Takes a layer back, the last change first. What is left of it halfway can
/// be taken back again.
fn revert(layer: &str, context: &mut Context) -> Result<(), Failure> {
    for going in Going::find(&[layer.to_owned()], context)? {
        going.take_back(0, context)?;
        // What runs on has read what was taken back since.
        service::reread(&going.page.entries, context)?;
        for unit in service::running(&going.page.entries) {
            service::systemctl("try-restart", &unit, context)?;
        }
        context.ledger.tear_out(&going.page)?;
    }
    Ok(())
}

/// A layer that is to be taken back.
struct Going {
    page: Page,
    /// Packages that layers ask for which stay.
    others: Vec<String>,
}

impl Going {
    /// Finds layers, in this order. What layers changed again that stay is
    /// found, too.
    fn find(layers: &[String], context: &Context) -> Result<Vec<Self>, Failure> {
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
                return Err(Failure::new(format!("the machine knows nothing of a layer `{layer}`")));
            };
            found.push(Self { page, others: others.clone() });
        }
        Ok(found)
    }

    /// Takes back what was noted from the entry `from` on, the last first.
    fn take_back(&self, from: usize, context: &mut Context) -> Result<(), Failure> {
        let entries = &self.page.entries;
        for (n, entry) in entries.iter().enumerate().skip(from).rev() {
            match entry {
                // Noted before it was done; that it was, is noted as well.
                Entry::Packages { before, after: None, .. } if completed(before, &entries[n + 1..]) => {}
                Entry::Path { path, was } => file::revert(&ledger::unescape(path), was, context)?,
                Entry::Packages { before, after, .. } => {
                    context.network(true)?;
                    package::revert(before, after.as_ref(), &self.others, context)?
                }
                Entry::Group { name, was } => account::revert_group(name, *was, context)?,
                Entry::User { .. } => account::revert_user(entry, context)?,
                Entry::Service { unit, enabled, active } => service::revert(unit, enabled, *active, context)?,
                Entry::Setting { path, value } => sysctl::revert(path, value)?,
                Entry::Run { .. } => run::revert(entry, context)?,
            }
        }
        Ok(())
    }
}

fn completed(before: &Digest, later: &[Entry]) -> bool {
    later.iter().any(|e| matches!(e, Entry::Packages { before: b, after: Some(_), .. } if b == before))
}

/// Numbers for names, `(uid, gid)`.
fn ids(owner: &Owner) -> Result<(u32, u32), Failure> {
    let user = system::user(&owner.user)
        .ok_or_else(|| Failure::new(format!("there is no user `{}` in the machine", owner.user)))?;
    let group = system::group(&owner.group)
        .ok_or_else(|| Failure::new(format!("there is no group `{}` in the machine", owner.group)))?;
    Ok((user.uid, group.gid))
}

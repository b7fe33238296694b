//! The primitives. Each compares the machine with the declaration, and changes only what
//! differs.

mod pending;
mod context;
mod lay;
mod account;
mod symlink;
mod file;
mod authorized_key;
mod archive;
mod directory;
mod hook;
mod kernel_module;
mod kernel_parameter;
mod package;
mod run;
mod service;
mod sysctl;
mod revert;
mod switch;

use std::path::Path;

use crate::failure::Failure;
use crate::protocol::{Order, Owner, Primitive};
use crate::system;

pub(crate) use context::Context;
pub(crate) use pending::Switch;
pub(crate) use switch::settle;

/// Does one step; returns whether it changed anything.
pub(crate) fn apply(order: &Order, context: &mut Context) -> Result<bool, Failure> {
    match order {
        Order::Make(primitive) => make(primitive, context),
        Order::Preinstall { names, leaving } => package::ahead(names, leaving, context),
        Order::Leave { layers, paths } => switch::leave(layers, paths, context).map(|()| true),
        Order::Revert { layer } => revert::revert(layer, context).map(|()| true),
        Order::Layer { name } => context.ledger.enter(name).map(|()| false),
    }
}

/// Makes one primitive; returns whether that changed anything.
fn make(primitive: &Primitive, context: &mut Context) -> Result<bool, Failure> {
    match primitive {
        Primitive::Package { names, recommends } => package::apply(names, recommends, context),
        Primitive::File { path, content, mode, owner } => {
            file::apply(Path::new(path), *content, mode.unwrap_or(file::MODE), ids(owner)?, context)
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
        Primitive::AuthorizedKey { user, key } => authorized_key::apply(user, key, context),
        Primitive::Service { unit, enabled, masked, state } => {
            service::apply(unit, *enabled, *masked, *state, context)
        }
        Primitive::Sysctl { key, value } => sysctl::apply(key, value, context),
        Primitive::KernelModule { name } => kernel_module::apply(name, context),
        Primitive::KernelParameter { words } => kernel_parameter::apply(words, context),
        Primitive::Run(run) => run::apply(run, context),
        Primitive::Hook { when, script } => hook::apply(when, script, context),
        Primitive::Reboot => Err(Failure::new("the agent can't apply a reboot")),
    }
}

/// Looks up the ids of an owner, `(uid, gid)`.
fn ids(owner: &Owner) -> Result<(u32, u32), Failure> {
    let user = system::user(&owner.user)
        .ok_or_else(|| Failure::new(format!("there is no user `{}` in the machine", owner.user)))?;
    let group = system::group(&owner.group)
        .ok_or_else(|| Failure::new(format!("there is no group `{}` in the machine", owner.group)))?;
    Ok((user.uid, group.gid))
}

//! The primitives: each looks, then changes what is not as declared.

mod account;
mod archive;
mod directory;
mod file;
mod kernel_module;
mod package;
mod run;
mod service;
mod symlink;
mod sysctl;

use std::path::Path;

use crate::command::Output;
use crate::failure::Failure;
use crate::fetch::{Channel, Sender};
use crate::protocol::{Owner, Primitive};
use crate::system;

/// What a primitive works with.
pub(crate) struct Context<'a> {
    pub(crate) channel: &'a mut Channel,
    pub(crate) sender: &'a Sender,
    pub(crate) step: usize,
}

impl Context<'_> {
    pub(crate) fn output(&self) -> Output<'_> {
        Output { sender: self.sender, step: self.step }
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
        Primitive::Symlink { path, target } => symlink::apply(Path::new(path), target),
        Primitive::Archive { path, content, strip, owner } => {
            let owner = owner.as_ref().map(ids).transpose()?;
            archive::apply(Path::new(path), *content, *strip, owner, context)
        }
        Primitive::Group { name, gid, system } => account::group(name, *gid, *system, context),
        Primitive::User(user) => account::user(user, context),
        Primitive::Service { unit, enabled, state } => service::apply(unit, *enabled, *state, context),
        Primitive::Sysctl { key, value } => sysctl::apply(key, value),
        Primitive::KernelModule { name } => kernel_module::apply(name, context),
        Primitive::Run(run) => run::apply(run, context),
        Primitive::Reboot => Err(Failure::new("a machine can't boot itself again in the middle of a layer")),
    }
}

/// Numbers for names, `(uid, gid)`.
fn ids(owner: &Owner) -> Result<(u32, u32), Failure> {
    let user = system::user(&owner.user)
        .ok_or_else(|| Failure::new(format!("there is no user `{}` in the machine", owner.user)))?;
    let group = system::group(&owner.group)
        .ok_or_else(|| Failure::new(format!("there is no group `{}` in the machine", owner.group)))?;
    Ok((user.uid, group.gid))
}

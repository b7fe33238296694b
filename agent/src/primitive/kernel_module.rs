//! `kernel-module`: loads a kernel module at each boot and, in a booted machine, now.

use std::path::{Path, PathBuf};

use super::context::Context;
use super::file;
use crate::command;
use crate::failure::Failure;
use crate::offline;

pub(super) fn apply(name: &str, context: &mut Context) -> Result<bool, Failure> {
    // systemd's modules-load.d(5).
    let conf = PathBuf::from(format!("/etc/modules-load.d/90-vimg-{name}.conf"));
    let text = format!("{name}\n");
    let mut changed = file::text(&conf, &text, context)?;
    // The kernel's name of a module has `_` instead of `-`.
    let live = Path::new("/sys/module").join(name.replace('-', "_"));
    if !offline::is() && !live.exists() {
        let mut modprobe = command::command("modprobe");
        modprobe.args(["--", name]);
        command::run(&mut modprobe, command::QUESTION, &context.output())?;
        changed = true;
    }
    Ok(changed)
}

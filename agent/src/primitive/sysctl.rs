//! `sysctl`: sets a kernel setting for each boot and, in a booted machine, now.

use std::fs;
use std::path::PathBuf;

use super::context::Context;
use super::file;
use crate::failure::Failure;
use crate::ledger::Entry;
use crate::offline;

pub(super) fn apply(key: &str, value: &str, context: &mut Context) -> Result<bool, Failure> {
    // As in sysctl(8), the first separator in a key decides which one the key uses.
    let slashed = key.find(['.', '/']).is_none_or(|at| key[at..].starts_with('/'));
    let path = if slashed { key.to_owned() } else { swap(key) };
    let name = path.replace('/', ".");
    let conf = PathBuf::from(format!("/etc/sysctl.d/90-vimg-{name}.conf"));
    let text = format!("{key} = {value}\n");
    let mut changed = file::text(&conf, &text, context)?;
    if offline::is() {
        // The running kernel is not that of the machine.
        return Ok(changed);
    }
    let live = PathBuf::from("/proc/sys").join(&path);
    let now = fs::read_to_string(&live)
        .map_err(|e| Failure::new(format!("the kernel has no setting `{key}` ({}: {e})", live.display())))?;
    let words = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    if words(&now) != words(value) {
        context.ledger.note(&Entry::Setting { path: path.clone(), value: now.trim().to_owned() })?;
        fs::write(&live, value).map_err(|e| Failure::at(&live, e))?;
        changed = true;
    }
    Ok(changed)
}

/// Restores the setting of the running kernel.
pub(super) fn revert(path: &str, value: &str) -> Result<(), Failure> {
    let live = PathBuf::from("/proc/sys").join(path);
    if offline::is() { Ok(()) } else { fs::write(&live, value).map_err(|e| Failure::at(&live, e)) }
}

fn swap(key: &str) -> String {
    key.chars()
        .map(|c| match c {
            '.' => '/',
            '/' => '.',
            c => c,
        })
        .collect()
}

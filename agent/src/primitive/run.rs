//! `run`: a script. Its effects can't be inspected, so it runs each time that it is
//! applied. The key of the layer ensures that it is applied only once.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::Path;
use std::time::Duration;

use rustix::mount::{MountFlags, UnmountFlags};

use super::context::Context;
use crate::command::{self, Output};
use crate::failure::{Failure, HOME};
use crate::ledger::Entry;
use crate::offline;
use crate::protocol::{Around, Run, Script};
use crate::system;

pub(super) fn apply(run: &Run, context: &mut Context) -> Result<bool, Failure> {
    let Script { content, around } = &run.script;
    let user = system::user(&around.user)
        .ok_or_else(|| Failure::new(format!("there is no user `{}` in the machine", around.user)))?;
    if !Path::new(&around.workdir).is_dir() {
        return Err(Failure::new(format!("there is no directory {} in the machine", around.workdir)));
    }
    context.channel.request(&[*content]).map_err(|e| Failure::at("script", e))?;
    let script = context.channel.bytes(*content).map_err(|e| Failure::at("script", e))?;
    context.network(around.network)?;
    context.ledger.note(&Entry::Run { undo: run.undo.clone(), around: around.clone() })?;
    let secrets = Secrets::lay_out(&run.secrets, &user, context)?;
    let output = Output { hidden: &secrets.hidden, ..context.output() };
    execute(&script, around, &user, &output).map(|()| true)
}

/// The directory of secrets, in memory.
const SECRETS: &str = "/run/secrets";

/// Shorter secrets are not hidden in the output of a script: too many words would be
/// hidden.
const SHORTEST: usize = 4;
/// Shorter lines of a secret are not hidden: keys and certificates have lines such as `}`.
const LINE: usize = 8;

/// The files of the secrets of a script. Drop removes them.
struct Secrets {
    hidden: Vec<Vec<u8>>,
    laid: bool,
    mounted: bool,
}

impl Secrets {
    fn lay_out(names: &[String], user: &system::Account, context: &mut Context) -> Result<Self, Failure> {
        let mut secrets = Self { hidden: Vec::new(), laid: false, mounted: false };
        if names.is_empty() {
            return Ok(secrets);
        }
        let fail = |e| Failure::at(SECRETS, e);
        // Secrets must never be on a disk: /run may be a plain directory.
        let found = rustix::fs::statfs("/run").map_err(|e| fail(e.into()))?;
        if found.f_type as i64 != TMPFS {
            return Err(Failure::new("secrets need a tmpfs at /run, and the machine has none"));
        }
        // The directory belongs to root, so that no user can create files in it.
        fs::DirBuilder::new().mode(0o711).create(SECRETS).map_err(fail)?;
        secrets.laid = true;
        if swaps() {
            // A ramfs is never written to swap.
            let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
            rustix::mount::mount("ramfs", SECRETS, "ramfs", flags, c"mode=0711")
                .map_err(|e| fail(e.into()))?;
            secrets.mounted = true;
        }
        for name in names {
            let value = context.channel.secret(name).map_err(fail)?;
            let path = Path::new(SECRETS).join(name);
            let mut open = fs::OpenOptions::new();
            open.write(true).create_new(true).mode(0o400);
            let written = open.open(&path).and_then(|mut file| {
                file.write_all(&value)?;
                fchown(&file, Some(user.uid), Some(user.gid))
            });
            written.map_err(fail)?;
            secrets.hide(&value);
        }
        // A secret that contains another must come before it.
        secrets.hidden.sort_by_key(|secret| std::cmp::Reverse(secret.len()));
        Ok(secrets)
    }
}

impl Secrets {
    /// Hides a value in the output of the script, as a whole and line by line.
    fn hide(&mut self, value: &[u8]) {
        let whole = value.trim_ascii_end();
        let lines = whole.split(|b| *b == b'\n').map(<[u8]>::trim_ascii);
        let lines = lines.filter(|line| line.len() >= LINE);
        for shown in std::iter::once(whole).filter(|whole| whole.len() >= SHORTEST).chain(lines) {
            if !self.hidden.iter().any(|known| known == shown) {
                self.hidden.push(shown.to_vec());
            }
        }
    }
}

/// Whether the machine has swap.
fn swaps() -> bool {
    // The first line is the heading. Offline, this is the swap of another machine.
    !offline::is() && fs::read_to_string("/proc/swaps").is_ok_and(|text| text.lines().nth(1).is_some())
}

impl Drop for Secrets {
    fn drop(&mut self) {
        if self.mounted {
            let _ = rustix::mount::unmount(SECRETS, UnmountFlags::DETACH);
        }
        if self.laid {
            let _ = fs::remove_dir_all(SECRETS);
        }
    }
}

/// The kernel's number of tmpfs (`TMPFS_MAGIC` in `linux/magic.h`).
const TMPFS: i64 = 0x0102_1994;

/// Runs the `undo` of a script.
pub(super) fn revert(entry: &Entry, context: &mut Context) -> Result<(), Failure> {
    let Entry::Run { undo, around } = entry else { return Ok(()) };
    let Some(undo) = undo else {
        return Err(Failure::new("one of its scripts has no `undo`"));
    };
    let user = system::user(&around.user)
        .ok_or_else(|| Failure::new(format!("there is no longer a user `{}` in the machine", around.user)))?;
    context.network(around.network)?;
    execute(undo.as_bytes(), around, &user, &context.output())
}

fn execute(script: &[u8], around: &Around, user: &system::Account, output: &Output) -> Result<(), Failure> {
    // Not in /run, which Debian mounts with noexec.
    let dir = Path::new(HOME).join("tmp");
    let path = dir.join("script");
    let write = || {
        fs::create_dir_all(&dir)?;
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o711))?;
        fs::write(&path, script)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))
    };
    write().map_err(|e| Failure::at(&path, e))?;
    let mut command = command::script(&path, around, user).map_err(|e| Failure::at(&path, e))?;
    let result = command::run(&mut command, Duration::from_secs(around.timeout), output);
    let _ = fs::remove_file(&path);
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_line_of_a_secret_is_hidden() {
        let mut secrets = Secrets { hidden: Vec::new(), laid: false, mounted: false };
        secrets.hide(b"-----BEGIN KEY-----\nabcdefgh1234\n}\n");
        let hidden: Vec<&str> = secrets.hidden.iter().map(|h| std::str::from_utf8(h).unwrap()).collect();
        assert_eq!(hidden, ["-----BEGIN KEY-----\nabcdefgh1234\n}", "-----BEGIN KEY-----", "abcdefgh1234"]);
    }
}

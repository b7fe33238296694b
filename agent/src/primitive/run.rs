//! `run`: a script. It can't be looked at, so it is run each time it is
//! applied; that it is applied once is what the layer's key is for.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;
use std::time::Duration;

use super::Context;
use crate::command::{self, Output};
use crate::failure::{Failure, HOME};
use crate::ledger::Entry;
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
    context.ledger.note(&Entry::Run { undo: run.undo.clone(), around: around.clone() })?;
    let secrets = Secrets::lay_out(&run.secrets, &user, context)?;
    let output = Output { hidden: &secrets.hidden, ..context.output() };
    execute(&script, around, &user, &output).map(|()| true)
}

/// Where scripts find their secrets: in memory.
const SECRETS: &str = "/run/secrets";

/// Secrets shorter than this are not looked for in what a script prints: all
/// kinds of words would be taken for them.
const SHORTEST: usize = 4;

/// Secrets that lie ready. Dropped, they are gone.
struct Secrets {
    hidden: Vec<Vec<u8>>,
    laid: bool,
}

impl Secrets {
    fn lay_out(names: &[String], user: &system::Account, context: &mut Context) -> Result<Self, Failure> {
        let mut secrets = Self { hidden: Vec::new(), laid: false };
        if names.is_empty() {
            return Ok(secrets);
        }
        let fail = |e| Failure::at(SECRETS, e);
        // Never on a disk, whatever the machine has at /run.
        let found = rustix::fs::statfs("/run").map_err(|e| fail(e.into()))?;
        if found.f_type as i64 != TMPFS {
            return Err(Failure::new("secrets need a /run that is in memory, and the machine's is not"));
        }
        fs::create_dir_all(SECRETS).map_err(fail)?;
        secrets.laid = true;
        chown(SECRETS, Some(user.uid), Some(user.gid)).map_err(fail)?;
        fs::set_permissions(SECRETS, fs::Permissions::from_mode(0o700)).map_err(fail)?;
        for name in names {
            let value = context.channel.secret(name).map_err(fail)?;
            let path = Path::new(SECRETS).join(name);
            let written = fs::write(&path, &value).and_then(|()| {
                chown(&path, Some(user.uid), Some(user.gid))?;
                fs::set_permissions(&path, fs::Permissions::from_mode(0o400))
            });
            written.map_err(fail)?;
            let shown = value.trim_ascii_end().to_vec();
            if shown.len() >= SHORTEST {
                secrets.hidden.push(shown);
            }
        }
        // What holds another comes first.
        secrets.hidden.sort_by_key(|secret| std::cmp::Reverse(secret.len()));
        Ok(secrets)
    }
}

impl Drop for Secrets {
    fn drop(&mut self) {
        if self.laid {
            let _ = fs::remove_dir_all(SECRETS);
        }
    }
}

/// The kernel's number for it (`TMPFS_MAGIC` in `linux/magic.h`).
const TMPFS: i64 = 0x0102_1994;

/// Runs the script that takes back what another did.
pub(super) fn revert(entry: &Entry, context: &Context) -> Result<(), Failure> {
    let Entry::Run { undo, around } = entry else { return Ok(()) };
    let Some(undo) = undo else {
        return Err(Failure::new("a script of it has no `undo`"));
    };
    let user = system::user(&around.user)
        .ok_or_else(|| Failure::new(format!("there is no user `{}` in the machine any more", around.user)))?;
    execute(undo.as_bytes(), around, &user, &context.output())
}

fn execute(script: &[u8], around: &Around, user: &system::Account, output: &Output) -> Result<(), Failure> {
    // Not /run, which Debian mounts noexec.
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

//! `run`: a script. It can't be looked at, so it is run each time it is
//! applied; that it is applied once is what the layer's key is for.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use super::Context;
use crate::command;
use crate::failure::{Failure, HOME};
use crate::ledger::Entry;
use crate::protocol::Run;
use crate::system;

pub(super) fn apply(run: &Run, context: &mut Context) -> Result<bool, Failure> {
    let user = system::user(&run.user)
        .ok_or_else(|| Failure::new(format!("there is no user `{}` in the machine", run.user)))?;
    if !Path::new(&run.workdir).is_dir() {
        return Err(Failure::new(format!("there is no directory {} in the machine", run.workdir)));
    }
    context.channel.request(&[run.script]).map_err(|e| Failure::at("script", e))?;
    let script = context.channel.bytes(run.script).map_err(|e| Failure::at("script", e))?;
    context.ledger.note(&Entry::Run {
        undo: run.undo.clone(),
        env: run.env.clone(),
        user: run.user.clone(),
        workdir: run.workdir.clone(),
        timeout: run.timeout,
    })?;
    let surroundings = Surroundings { env: &run.env, user: &user, workdir: &run.workdir };
    execute(&script, &surroundings, run.timeout, context).map(|()| true)
}

/// What a script finds around it.
struct Surroundings<'a> {
    env: &'a BTreeMap<String, String>,
    user: &'a system::Account,
    workdir: &'a str,
}

/// Runs the script that takes back what another did.
pub(super) fn revert(entry: &Entry, context: &Context) -> Result<(), Failure> {
    let Entry::Run { undo, env, user, workdir, timeout } = entry else { return Ok(()) };
    let Some(undo) = undo else {
        return Err(Failure::new("a script of it has no `undo`"));
    };
    let user = system::user(user)
        .ok_or_else(|| Failure::new(format!("there is no user `{user}` in the machine any more")))?;
    execute(undo.as_bytes(), &Surroundings { env, user: &user, workdir }, *timeout, context)
}

fn execute(
    script: &[u8],
    surroundings: &Surroundings<'_>,
    timeout: u64,
    context: &Context,
) -> Result<(), Failure> {
    let Surroundings { env, user, workdir } = *surroundings;
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
    let words = if script.starts_with(b"#!") { vec![] } else { vec!["/bin/sh", "-eu"] };
    let mut command = as_user(user, &words, &path);
    command.env("HOME", &user.home).env("USER", &user.name).env("LOGNAME", &user.name);
    command.env("SHELL", &user.shell).envs(env).current_dir(workdir);
    let result = command::run(&mut command, Duration::from_secs(timeout), &context.output());
    let _ = fs::remove_file(&path);
    result
}

fn as_user(user: &system::Account, words: &[&str], script: &Path) -> Command {
    if user.uid == 0 {
        let mut command = match words {
            [] => command::command(&script.to_string_lossy()),
            [first, rest @ ..] => {
                let mut command = command::command(first);
                command.args(rest).arg(script);
                command
            }
        };
        command.current_dir("/");
        return command;
    }
    let mut command = command::command("setpriv");
    command
        .arg(format!("--reuid={}", user.uid))
        .arg(format!("--regid={}", user.gid))
        .arg("--init-groups")
        .arg("--")
        .args(words)
        .arg(script);
    command
}

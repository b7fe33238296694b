//! `run`: a script. It can't be looked at, so it is run each time it is
//! applied; that it is applied once is what the layer's key is for.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use super::Context;
use crate::command;
use crate::failure::{Failure, HOME};
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
    // Not /run, which Debian mounts noexec.
    let dir = Path::new(HOME).join("tmp");
    let path = dir.join("script");
    let write = || {
        fs::create_dir_all(&dir)?;
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o711))?;
        fs::write(&path, &script)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))
    };
    write().map_err(|e| Failure::at(&path, e))?;
    let words = if script.starts_with(b"#!") { vec![] } else { vec!["/bin/sh", "-eu"] };
    let mut command = as_user(&user, &words, &path);
    command.env("HOME", &user.home).env("USER", &user.name).env("LOGNAME", &user.name);
    command.env("SHELL", &user.shell).envs(&run.env).current_dir(&run.workdir);
    let result = command::run(&mut command, Duration::from_secs(run.timeout), &context.output());
    let _ = fs::remove_file(&path);
    result.map(|()| true)
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

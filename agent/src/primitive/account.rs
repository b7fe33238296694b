//! `user` and `group`, by the machine's own useradd and groupadd.

use std::process::Command;
use std::time::Duration;

use super::Context;
use crate::command;
use crate::failure::Failure;
use crate::protocol::User;
use crate::system;

fn run(mut command: Command, context: &Context) -> Result<(), Failure> {
    let program = command.get_program().to_string_lossy().into_owned();
    command::run(&mut command, Duration::from_secs(120), &context.output()).map_err(|mut failure| {
        failure.message = format!("{program}: {}", failure.message);
        failure
    })
}

pub(super) fn group(name: &str, gid: Option<u32>, system: bool, context: &Context) -> Result<bool, Failure> {
    if let Some(found) = system::group(name) {
        let Some(gid) = gid.filter(|gid| *gid != found.gid) else { return Ok(false) };
        let mut groupmod = command::command("groupmod");
        groupmod.arg("--gid").arg(gid.to_string()).arg(name);
        run(groupmod, context)?;
        return Ok(true);
    }
    let mut groupadd = command::command("groupadd");
    if system {
        groupadd.arg("--system");
    }
    if let Some(gid) = gid {
        groupadd.arg("--gid").arg(gid.to_string());
    }
    groupadd.arg(name);
    run(groupadd, context)?;
    Ok(true)
}

pub(super) fn user(user: &User, context: &Context) -> Result<bool, Failure> {
    let found = system::user(&user.name);
    let mut options: Vec<(&str, String)> = Vec::new();
    let differs = |now: Option<String>, wanted: &str| now.as_deref() != Some(wanted);
    if let Some(uid) = user.uid
        && differs(found.as_ref().map(|f| f.uid.to_string()), &uid.to_string())
    {
        options.push(("--uid", uid.to_string()));
    }
    if let Some(group) = &user.group {
        let gid = system::group(group)
            .ok_or_else(|| Failure::new(format!("there is no group `{group}` in the machine")))?
            .gid;
        if found.as_ref().is_none_or(|f| f.gid != gid) {
            options.push(("--gid", group.clone()));
        }
    }
    let texts = [
        ("--home-dir", &user.home, found.as_ref().map(|f| f.home.clone())),
        ("--shell", &user.shell, found.as_ref().map(|f| f.shell.clone())),
        ("--comment", &user.comment, found.as_ref().map(|f| f.comment.clone())),
    ];
    for (option, wanted, now) in texts {
        if let Some(wanted) = wanted
            && differs(now, wanted)
        {
            options.push((option, wanted.clone()));
        }
    }
    let member = |group: &str| system::group(group).is_some_and(|g| g.members.contains(&user.name));
    if let Some(missing) = user.groups.iter().find(|g| system::group(g).is_none()) {
        return Err(Failure::new(format!("there is no group `{missing}` in the machine")));
    }
    let groups: Vec<&str> = user.groups.iter().map(String::as_str).filter(|g| !member(g)).collect();
    if !groups.is_empty() {
        options.push(("--groups", groups.join(",")));
    }
    let mut program = if found.is_some() {
        if options.is_empty() {
            return Ok(false);
        }
        let mut usermod = command::command("usermod");
        if !groups.is_empty() {
            usermod.arg("--append");
        }
        usermod
    } else {
        let mut useradd = command::command("useradd");
        match (&user.group, system::group(&user.name)) {
            (Some(_), _) => useradd.arg("--no-user-group"),
            // A group of its name is there: it is the user's own.
            (None, Some(_)) => useradd.args(["--no-user-group", "--gid", &user.name]),
            (None, None) => useradd.arg("--user-group"),
        };
        let home = if user.system && user.home.is_none() { "--no-create-home" } else { "--create-home" };
        useradd.arg(home);
        if user.system {
            useradd.arg("--system");
        }
        useradd
    };
    for (option, value) in options {
        // usermod has another name for it.
        let option = if found.is_some() && option == "--home-dir" { "--home" } else { option };
        program.arg(option).arg(value);
    }
    program.arg(&user.name);
    run(program, context)?;
    Ok(true)
}

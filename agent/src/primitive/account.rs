//! `user` and `group`, by the machine's own useradd and groupadd.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use super::context::Context;
use super::lay;
use crate::command;
use crate::failure::Failure;
use crate::ledger::Entry;
use crate::place::Place;
use crate::protocol::User;
use crate::system::{self, Account};

fn run(mut command: Command, context: &Context) -> Result<(), Failure> {
    let program = command.get_program().to_string_lossy().into_owned();
    command::run(&mut command, Duration::from_secs(120), &context.output()).map_err(|mut failure| {
        failure.message = format!("{program}: {}", failure.message);
        failure
    })
}

pub(super) fn group(
    name: &str,
    gid: Option<u32>,
    system: bool,
    context: &mut Context,
) -> Result<bool, Failure> {
    let found = system::group(name);
    let differs = found.as_ref().is_none_or(|found| gid.is_some_and(|gid| gid != found.gid));
    if !differs {
        return Ok(false);
    }
    let was = found.map(|found| found.gid);
    context.ledger.note(&Entry::Group { name: name.to_owned(), was })?;
    if let (Some(_), Some(gid)) = (was, gid) {
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

pub(super) fn user(user: &User, context: &mut Context) -> Result<bool, Failure> {
    let found = system::user(&user.name);
    let mut options = options(user, found.as_ref())?;
    let groups = missing_groups(user)?;
    if !groups.is_empty() {
        options.push(("--groups", groups.join(",")));
    }
    if found.is_some() && options.is_empty() {
        return Ok(false);
    }
    let program = program(user, found.is_some(), &groups, options);
    let home = user.home.clone().unwrap_or_else(|| format!("/home/{}", user.name));
    let (new, was_there) = (found.is_none(), Path::new(&home).is_dir());
    context.ledger.note(&Entry::User {
        name: user.name.clone(),
        was: found,
        groups: groups_of(&user.name),
        home: Some(home.clone()).filter(|home| std::fs::symlink_metadata(home).is_err()),
    })?;
    // useradd leaves an existing home directory unchanged.
    let takes = new && was_there && !user.system && system::is_home(&home);
    let first = if takes { first_files(Path::new(&home))? } else { Vec::new() };
    if takes {
        let home = std::iter::once(Path::new(&home));
        context.ledger.paths(home.chain(first.iter().map(|piece| piece.to.as_path())))?;
    }
    run(program, context)?;
    if takes && let Some(account) = system::user(&user.name) {
        take_home(&account, &first)?;
    }
    Ok(true)
}

/// Lists the wanted groups that the user is not a member of. All of them must exist.
fn missing_groups(user: &User) -> Result<Vec<&str>, Failure> {
    if let Some(missing) = user.groups.iter().find(|g| system::group(g).is_none()) {
        return Err(Failure::new(format!("there is no group `{missing}` in the machine")));
    }
    let member = |group: &str| system::group(group).is_some_and(|g| g.members.contains(&user.name));
    Ok(user.groups.iter().map(String::as_str).filter(|g| !member(g)).collect())
}

/// The options of useradd for what differs from the account that was found, except
/// for its groups.
fn options(user: &User, found: Option<&Account>) -> Result<Vec<(&'static str, String)>, Failure> {
    let mut options: Vec<(&str, String)> = Vec::new();
    let differs = |now: Option<String>, wanted: &str| now.as_deref() != Some(wanted);
    if let Some(uid) = user.uid
        && differs(found.map(|f| f.uid.to_string()), &uid.to_string())
    {
        options.push(("--uid", uid.to_string()));
    }
    if let Some(group) = &user.group {
        let gid = system::group(group)
            .ok_or_else(|| Failure::new(format!("there is no group `{group}` in the machine")))?
            .gid;
        if found.is_none_or(|f| f.gid != gid) {
            options.push(("--gid", group.clone()));
        }
    }
    let texts = [
        ("--home-dir", &user.home, found.map(|f| f.home.clone())),
        ("--shell", &user.shell, found.map(|f| f.shell.clone())),
        ("--comment", &user.comment, found.map(|f| f.comment.clone())),
    ];
    for (option, wanted, now) in texts {
        if let Some(wanted) = wanted
            && differs(now, wanted)
        {
            options.push((option, wanted.clone()));
        }
    }
    Ok(options)
}

/// Makes the command: usermod for an account that `exists`, otherwise useradd.
fn program(user: &User, exists: bool, groups: &[&str], options: Vec<(&str, String)>) -> Command {
    let mut program = command::command(if exists { "usermod" } else { "useradd" });
    if exists {
        if !groups.is_empty() {
            program.arg("--append");
        }
    } else {
        match (&user.group, system::group(&user.name)) {
            (Some(_), _) => program.arg("--no-user-group"),
            // An existing group of this name becomes the user's own group.
            (None, Some(_)) => program.args(["--no-user-group", "--gid", &user.name]),
            (None, None) => program.arg("--user-group"),
        };
        let home = if user.system && user.home.is_none() { "--no-create-home" } else { "--create-home" };
        program.arg(home);
        if user.system {
            program.arg("--system");
        }
    }
    for (option, value) in options {
        // usermod names this option differently.
        let option = if exists && option == "--home-dir" { "--home" } else { option };
        program.arg(option).arg(value);
    }
    program.arg(&user.name);
    program
}

/// Lists the first files of a home directory (`/etc/skel`, useradd(8)) that do not exist
/// in this one.
fn first_files(home: &Path) -> Result<Vec<lay::Piece>, Failure> {
    let skel = Path::new("/etc/skel");
    if !skel.is_dir() {
        return Ok(Vec::new());
    }
    // The user's id is not known yet, but it only affects existing entries, and these are
    // left out.
    let mut pieces = lay::differing(skel, home, (0, 0)).map_err(|e| Failure::at(skel, e))?;
    pieces.retain(|piece| std::fs::symlink_metadata(&piece.to).is_err());
    Ok(pieces)
}

/// Makes an existing directory the home of a new user.
fn take_home(account: &Account, first: &[lay::Piece]) -> Result<(), Failure> {
    let (home, owner) = (Path::new(&account.home), (account.uid, account.gid));
    let fail = |e| Failure::at(home, e);
    let mode = std::fs::metadata(home).map_err(fail)?.mode() & 0o7777;
    Place::find(home).and_then(|place| place.set(mode, owner)).map_err(fail)?;
    lay::lay(first, owner, lay::By::Copying)
}

/// Lists the groups that have a user as a member.
fn groups_of(user: &str) -> Vec<String> {
    let member = |group: &system::Group| group.members.iter().any(|m| m == user);
    system::groups().into_iter().filter(member).map(|g| g.name).collect()
}

/// Restores a group; deletes it if it did not exist.
pub(super) fn revert_group(name: &str, was: Option<u32>, context: &Context) -> Result<(), Failure> {
    let now = system::group(name).map(|group| group.gid);
    match (was, now) {
        (None, Some(_)) => {
            let mut groupdel = command::command("groupdel");
            groupdel.arg(name);
            run(groupdel, context)
        }
        (Some(gid), Some(now)) if gid != now => {
            let mut groupmod = command::command("groupmod");
            groupmod.arg("--gid").arg(gid.to_string()).arg(name);
            run(groupmod, context)
        }
        _ => Ok(()),
    }
}

/// Restores a user; deletes it if it did not exist, with the home directory that was
/// created for it.
pub(super) fn revert_user(entry: &Entry, context: &Context) -> Result<(), Failure> {
    let Entry::User { name, was, groups, home } = entry else { return Ok(()) };
    if system::user(name).is_none() {
        return Ok(());
    }
    let Some(was) = was else {
        let mut userdel = command::command("userdel");
        userdel.arg(name);
        run(userdel, context)?;
        return match home {
            Some(home) if Path::new(home).is_dir() => {
                std::fs::remove_dir_all(home).map_err(|e| Failure::at(home, e))
            }
            _ => Ok(()),
        };
    };
    let mut usermod = command::command("usermod");
    usermod.arg("--uid").arg(was.uid.to_string()).arg("--gid").arg(was.gid.to_string());
    usermod.args(["--home", &was.home, "--shell", &was.shell, "--comment", &was.comment]);
    usermod.arg("--groups").arg(groups.join(",")).arg(name);
    run(usermod, context)
}

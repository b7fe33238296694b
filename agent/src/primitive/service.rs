//! `service`: a systemd unit, at boot and now.

use std::time::Duration;

use super::Context;
use crate::command;
use crate::failure::Failure;
use crate::offline;
use crate::protocol::ServiceState;

pub(super) fn apply(
    unit: &str,
    enabled: Option<bool>,
    state: Option<ServiceState>,
    context: &Context,
) -> Result<bool, Failure> {
    if !offline::is() {
        reload(unit, context)?;
    }
    let mut changed = false;
    if let Some(enabled) = enabled
        && is("is-enabled", unit)? != enabled
    {
        systemctl(if enabled { "enable" } else { "disable" }, unit, context)?;
        changed = true;
    }
    if offline::is() {
        // What runs is up to the next boot.
        return Ok(changed);
    }
    let verb = match state {
        Some(ServiceState::Running) if !is("is-active", unit)? => Some("start"),
        Some(ServiceState::Stopped) if is("is-active", unit)? => Some("stop"),
        Some(ServiceState::Restarted) => Some("restart"),
        _ => None,
    };
    if let Some(verb) = verb {
        systemctl(verb, unit, context)?;
        changed = true;
    }
    Ok(changed)
}

/// A unit whose file changed must be read again, or its old form would run
/// until the next boot.
fn reload(unit: &str, context: &Context) -> Result<(), Failure> {
    let mut show = command::command("systemctl");
    show.args(["show", "--property=NeedDaemonReload", "--value", "--", unit]);
    if command::query(&mut show, command::QUESTION)?.1.starts_with("yes") {
        let mut reload = command::command("systemctl");
        reload.arg("daemon-reload");
        command::run(&mut reload, Duration::from_secs(600), &context.output())?;
    }
    Ok(())
}

fn is(question: &str, unit: &str) -> Result<bool, Failure> {
    let mut systemctl = command::command("systemctl");
    systemctl.args(["--quiet", question, "--", unit]);
    Ok(command::query(&mut systemctl, command::QUESTION)?.0)
}

fn systemctl(verb: &str, unit: &str, context: &Context) -> Result<(), Failure> {
    let mut systemctl = command::command("systemctl");
    systemctl.args([verb, "--", unit]);
    command::run(&mut systemctl, Duration::from_secs(600), &context.output()).map_err(|mut failure| {
        // systemctl says to look at the journal; so do it.
        let mut journal = command::command("journalctl");
        journal.args(["--no-pager", "--lines=20", "--output=cat", "--unit", unit]);
        let _ = command::run(&mut journal, Duration::from_secs(60), &context.output());
        failure.message = format!("systemctl {verb} {unit}: {}", failure.message);
        failure
    })
}

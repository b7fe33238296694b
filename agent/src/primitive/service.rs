//! `service`: a systemd unit, at boot and now.

use std::time::Duration;

use super::Context;
use crate::command;
use crate::failure::Failure;
use crate::protocol::ServiceState;

pub(super) fn apply(
    unit: &str,
    enabled: Option<bool>,
    state: Option<ServiceState>,
    context: &Context,
) -> Result<bool, Failure> {
    let mut changed = false;
    if let Some(enabled) = enabled
        && is("is-enabled", unit)? != enabled
    {
        systemctl(if enabled { "enable" } else { "disable" }, unit, context)?;
        changed = true;
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

fn is(question: &str, unit: &str) -> Result<bool, Failure> {
    let mut systemctl = command::command("systemctl");
    systemctl.args(["--quiet", question, "--", unit]);
    Ok(command::query(&mut systemctl)?.status.success())
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

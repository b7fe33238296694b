//! `service`: enables or disables a systemd unit and, in a booted machine, starts or stops
//! it.

use std::time::Duration;

use super::context::Context;
use crate::command;
use crate::failure::Failure;
use crate::ledger::Entry;
use crate::offline;
use crate::protocol::ServiceState;

pub(super) fn apply(
    unit: &str,
    enabled: Option<bool>,
    state: Option<ServiceState>,
    context: &mut Context,
) -> Result<bool, Failure> {
    let active = if offline::is() { None } else { Some(runs(unit, context)?) };
    let (at_boot, was) = at_boot(unit)?;
    let other = match enabled {
        Some(enabled) if at_boot != enabled => Some(if enabled { "enable" } else { "disable" }),
        _ => None,
    };
    // Offline, nothing is started or stopped.
    let verb = match (state, active) {
        (Some(ServiceState::Running), Some(false)) => Some("start"),
        (Some(ServiceState::Stopped), Some(true)) => Some("stop"),
        (Some(ServiceState::Restarted), Some(_)) => Some("restart"),
        _ => None,
    };
    if other.or(verb).is_none() {
        return Ok(false);
    }
    context.ledger.note(&Entry::Service { unit: unit.to_owned(), enabled: was, active })?;
    for verb in other.into_iter().chain(verb) {
        systemctl(verb, unit, context)?;
    }
    if let Some("start" | "restart") = verb {
        context.switch.is_new(unit);
    }
    Ok(true)
}

/// Restores whether a unit starts at boot, and whether it runs.
pub(super) fn revert(
    unit: &str,
    enabled: &str,
    active: Option<bool>,
    context: &Context,
) -> Result<(), Failure> {
    let live = !offline::is();
    let (_, now) = at_boot(unit)?;
    match (enabled, now.as_str()) {
        ("enabled", "disabled") => systemctl("enable", unit, context)?,
        // The unit came with the layer, or was disabled before.
        (was, "enabled") if was != "enabled" => systemctl("disable", unit, context)?,
        _ => {}
    }
    if live && is("is-active", unit)? != active.unwrap_or(enabled == "enabled") {
        systemctl(if active.unwrap_or(enabled == "enabled") { "start" } else { "stop" }, unit, context)?;
    }
    Ok(())
}

/// Reloads systemd if the reverted entries include its files.
pub(super) fn reread(entries: &[Entry], context: &Context) -> Result<(), Failure> {
    let stale = |entry: &Entry| matches!(entry, Entry::Path { path, .. } if path.contains("/systemd/"));
    if offline::is() || !entries.iter().any(stale) { Ok(()) } else { reload(context) }
}

/// Lists units that were running before a layer was applied. After its revert they must
/// read the restored files.
pub(super) fn running(entries: &[Entry]) -> Vec<String> {
    let unit = |entry: &Entry| match entry {
        Entry::Service { unit, active: Some(true), .. } if !offline::is() => Some(unit.clone()),
        _ => None,
    };
    entries.iter().filter_map(unit).collect()
}

/// Stops units; those that do not run are no error.
pub(super) fn stop_all(units: &[String], context: &Context) -> Result<(), Failure> {
    if units.is_empty() {
        return Ok(());
    }
    let mut stop = command::command("systemctl");
    stop.args(["stop", "--"]).args(units);
    command::run(&mut stop, Duration::from_secs(600), &context.output()).map_err(|mut failure| {
        failure.message = format!("systemctl stop {}: {}", units.join(" "), failure.message);
        failure
    })
}

/// Returns whether a unit starts at boot, and the output of `systemctl is-enabled`, which
/// is empty if there is no such unit.
pub(super) fn at_boot(unit: &str) -> Result<(bool, String), Failure> {
    let mut systemctl = command::command("systemctl");
    systemctl.args(["is-enabled", "--", unit]);
    let (enabled, text) = command::query(&mut systemctl, command::QUESTION)?;
    Ok((enabled, text.trim().to_owned()))
}

/// Whether a unit runs. Reloads systemd first if the file of the unit has changed:
/// otherwise the old version would be used until the next boot.
pub(super) fn runs(unit: &str, context: &Context) -> Result<bool, Failure> {
    let mut show = command::command("systemctl");
    show.args(["show", "--property=NeedDaemonReload,ActiveState", "--", unit]);
    let (_, text) = command::query(&mut show, command::QUESTION)?;
    if text.lines().any(|line| line == "NeedDaemonReload=yes") {
        reload(context)?;
    }
    Ok(text.lines().any(|line| ["ActiveState=active", "ActiveState=reloading"].contains(&line)))
}

/// Makes systemd read its files again.
fn reload(context: &Context) -> Result<(), Failure> {
    let mut reload = command::command("systemctl");
    reload.arg("daemon-reload");
    command::run(&mut reload, Duration::from_secs(600), &context.output())
}

fn is(question: &str, unit: &str) -> Result<bool, Failure> {
    let mut systemctl = command::command("systemctl");
    systemctl.args(["--quiet", question, "--", unit]);
    Ok(command::query(&mut systemctl, command::QUESTION)?.0)
}

pub(super) fn systemctl(verb: &str, unit: &str, context: &Context) -> Result<(), Failure> {
    let mut systemctl = command::command("systemctl");
    systemctl.args([verb, "--", unit]);
    command::run(&mut systemctl, Duration::from_secs(600), &context.output()).map_err(|mut failure| {
        // Print the journal, because systemctl refers to it.
        let mut journal = command::command("journalctl");
        journal.args(["--no-pager", "--lines=20", "--output=cat", "--unit", unit]);
        let _ = command::run(&mut journal, Duration::from_secs(60), &context.output());
        failure.message = format!("systemctl {verb} {unit}: {}", failure.message);
        failure
    })
}

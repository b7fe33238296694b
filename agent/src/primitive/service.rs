//! `service`: a systemd unit, at boot and now.

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
    // What runs is up to the next boot if nothing does now.
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

/// Has a unit start at boot, and run, as it did.
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
        // It came with the layer, or was there and disabled.
        (was, "enabled") if was != "enabled" => systemctl("disable", unit, context)?,
        _ => {}
    }
    if live && is("is-active", unit)? != active.unwrap_or(enabled == "enabled") {
        systemctl(if active.unwrap_or(enabled == "enabled") { "start" } else { "stop" }, unit, context)?;
    }
    Ok(())
}

/// Has systemd read its files anew if some of a layer that was taken back were
/// among them.
pub(super) fn reread(entries: &[Entry], context: &Context) -> Result<(), Failure> {
    let stale = |entry: &Entry| matches!(entry, Entry::Path { path, .. } if path.contains("/systemd/"));
    if offline::is() || !entries.iter().any(stale) { Ok(()) } else { reload(context) }
}

/// Units that a layer found running. Once it was taken back they have to read
/// their files anew: now those of before are there.
pub(super) fn running(entries: &[Entry]) -> Vec<String> {
    let unit = |entry: &Entry| match entry {
        Entry::Service { unit, active: Some(true), .. } if !offline::is() => Some(unit.clone()),
        _ => None,
    };
    entries.iter().filter_map(unit).collect()
}

/// Stops units, as far as they run.
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

/// Whether a unit starts at boot, and what `systemctl is-enabled` says of it;
/// nothing if there is none.
pub(super) fn at_boot(unit: &str) -> Result<(bool, String), Failure> {
    let mut systemctl = command::command("systemctl");
    systemctl.args(["is-enabled", "--", unit]);
    let (enabled, text) = command::query(&mut systemctl, command::QUESTION)?;
    Ok((enabled, text.trim().to_owned()))
}

/// Whether a unit runs. One whose file changed is read again, or its old form
/// would run until the next boot.
pub(super) fn runs(unit: &str, context: &Context) -> Result<bool, Failure> {
    let mut show = command::command("systemctl");
    show.args(["show", "--property=NeedDaemonReload,ActiveState", "--", unit]);
    let (_, text) = command::query(&mut show, command::QUESTION)?;
    if text.lines().any(|line| line == "NeedDaemonReload=yes") {
        reload(context)?;
    }
    Ok(text.lines().any(|line| ["ActiveState=active", "ActiveState=reloading"].contains(&line)))
}

/// Has systemd read its files again.
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
        // systemctl says to look at the journal; so do it.
        let mut journal = command::command("journalctl");
        journal.args(["--no-pager", "--lines=20", "--output=cat", "--unit", unit]);
        let _ = command::run(&mut journal, Duration::from_secs(60), &context.output());
        failure.message = format!("systemctl {verb} {unit}: {}", failure.message);
        failure
    })
}

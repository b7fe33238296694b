//! `service`: enables, disables or masks a unit and, in a booted machine, starts or stops it.

use std::path::Path;

use super::context::Context;
use super::symlink;
use crate::failure::Failure;
use crate::init::{self, Verb};
use crate::ledger::Entry;
use crate::offline;
use crate::place::Place;
use crate::protocol::ServiceState;

pub(super) fn apply(
    name: &str,
    enabled: Option<bool>,
    masked: Option<bool>,
    state: Option<ServiceState>,
    context: &mut Context,
) -> Result<bool, Failure> {
    let init = init::find()?;
    let unit = match (init.unit(name, enabled.is_some()), masked) {
        // A mask also keeps a package that comes later from starting its unit.
        (Err(_), Some(_)) if enabled != Some(true) => name.to_owned(),
        (unit, _) => unit?,
    };
    // A unit that is enabled can't stay masked.
    let masked = masked.or(enabled.filter(|enabled| *enabled).map(|_| false));
    let other_mask = masked.map_or(Ok(false), |masked| set_mask(&unit, masked, context))?;
    let active = if offline::is() { None } else { Some(init.runs(&unit, &context.output())?) };
    let (at_boot, was) = init.at_boot(&unit)?;
    let other = enabled.filter(|enabled| at_boot != *enabled);
    // Offline, nothing is started or stopped.
    let verb = match (state, active) {
        (Some(ServiceState::Running), Some(false)) => Some(Verb::Start),
        (Some(ServiceState::Stopped), Some(true)) => Some(Verb::Stop),
        (Some(ServiceState::Restarted), Some(_)) => Some(Verb::Restart),
        (Some(ServiceState::Running), Some(true) | None)
        | (Some(ServiceState::Stopped), Some(false) | None)
        | (Some(ServiceState::Restarted), None)
        | (None, _) => None,
    };
    if other.is_none() && verb.is_none() {
        return Ok(other_mask);
    }
    context.ledger.note(&Entry::Service { unit: unit.clone(), enabled: was, active })?;
    if let Some(enabled) = other {
        init.set_at_boot(&unit, enabled, &context.output())?;
    }
    if let Some(verb) = verb {
        init.control(verb, &unit, &context.output())?;
    }
    if let Some(Verb::Start | Verb::Restart) = verb {
        context.switch.is_new(&unit);
    }
    Ok(true)
}

/// Masks a unit or removes its mask; returns whether that changed anything.
fn set_mask(unit: &str, wanted: bool, context: &mut Context) -> Result<bool, Failure> {
    let init = init::find()?;
    let (link, is) = init.mask(unit, wanted)?;
    if is == wanted {
        return Ok(false);
    }
    context.ledger.path(&link)?;
    match wanted {
        true => symlink::put(&link, Path::new("/dev/null"), (0, 0))?,
        false => Place::find(&link).and_then(|place| place.remove()).map_err(|e| Failure::at(&link, e))?,
    }
    if !offline::is() {
        init.reload(&context.output())?;
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
    let (init, output) = (init::find()?, context.output());
    let live = !offline::is();
    let (_, now) = init.at_boot(unit)?;
    match (enabled, now.as_str()) {
        ("enabled", "disabled") => init.set_at_boot(unit, true, &output)?,
        // The unit came with the layer, or was disabled before.
        (was, "enabled") if was != "enabled" => init.set_at_boot(unit, false, &output)?,
        _ => {}
    }
    let ran = active.unwrap_or(enabled == "enabled");
    if live && init.is_active(unit)? != ran {
        init.control(if ran { Verb::Start } else { Verb::Stop }, unit, &output)?;
    }
    Ok(())
}

/// Reloads the init system if the reverted entries include its files.
pub(super) fn reread(entries: &[Entry], context: &Context) -> Result<(), Failure> {
    // No other init system has read files.
    let Ok(init) = init::find() else { return Ok(()) };
    let stale = |entry: &Entry| matches!(entry, Entry::Path { path, .. } if init.reads(path));
    if offline::is() || !entries.iter().any(stale) { Ok(()) } else { init.reload(&context.output()) }
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

/// Restarts units that run.
pub(super) fn restart(units: impl IntoIterator<Item = String>, context: &Context) -> Result<(), Failure> {
    units.into_iter().try_for_each(|unit| init::find()?.control(Verb::TryRestart, &unit, &context.output()))
}

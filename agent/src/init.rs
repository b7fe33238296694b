//! The init system of the machine. A new one is a file here and a line in the table.

mod first_boot;
mod manager;
mod show;
mod units;
mod systemd;

use crate::failure::Failure;

pub(crate) use manager::{Init, Observed, State, Verb};

/// The init systems that the agent knows.
const KNOWN: &[&dyn Init] = &[&systemd::Systemd];

/// Finds the init system that is installed in this machine.
///
/// # Errors
///
/// The agent knows none of those that are installed.
pub(crate) fn find() -> Result<&'static dyn Init, Failure> {
    KNOWN.iter().copied().find(|init| init.is_installed()).ok_or_else(|| {
        let names: Vec<&str> = KNOWN.iter().map(|init| init.name()).collect();
        Failure::new(format!("the machine has no init system that vimg supports: {}", names.join(", ")))
    })
}

//! What the agent needs of an init system.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use crate::command::Output;
use crate::failure::Failure;

/// What to do with a unit of a running machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verb {
    Start,
    Stop,
    Restart,
    /// Restart it if it runs.
    TryRestart,
    /// Have it read its files again if it runs, or else restart it.
    TryReload,
}

/// What a unit does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Observed {
    pub(crate) state: State,
    /// How often the init system has started it again.
    pub(crate) restarts: u64,
    /// The state in words, for people.
    pub(crate) words: String,
}

/// Whether a unit is up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    /// It has processes, and has been up for this long.
    Runs(Duration),
    /// It is up and has no process that could end, or its work is done.
    Stands,
    /// It may still come up.
    Down,
    /// It ended with a failure, and the init system does not start it again.
    Failed,
}

/// An init system. A unit is what it starts and stops.
pub(crate) trait Init: Sync {
    /// Its name, for messages.
    fn name(&self) -> &'static str;

    /// Whether it is installed in this machine.
    fn is_installed(&self) -> bool;

    /// Whether it has started this machine.
    fn is_up(&self) -> bool;

    /// Waits until it has started everything, for at most `limit` seconds; returns the
    /// units that failed, up to 20.
    fn wait_until_up(&self, limit: u64) -> Vec<String>;

    /// Begins to stop all units and to switch the machine off; does not wait for it.
    fn power_off(&self) -> Result<(), Failure>;

    /// Whether it is stopping the machine.
    fn is_going_off(&self) -> bool;

    /// Finds a unit, and returns the name of its file: `name` may be an alias. With `file`,
    /// it must have one, and not only exist while the machine runs.
    ///
    /// # Errors
    ///
    /// There is no such unit.
    fn unit(&self, name: &str, file: bool) -> Result<String, Failure>;

    /// Decides whether a unit starts at boot.
    ///
    /// # Errors
    ///
    /// The unit can't be enabled or disabled; the message says what to do instead.
    fn set_at_boot(&self, unit: &str, enabled: bool, output: &Output) -> Result<(), Failure>;

    /// Returns whether a unit starts at boot, and a word for the ledger: `enabled`, maybe
    /// with a suffix, if it was set to start; `disabled` if it could be; another word, or
    /// none if there is no such unit.
    fn at_boot(&self, unit: &str) -> Result<(bool, String), Failure>;

    /// Returns the place of the link to `/dev/null` that masks a unit, so that nothing
    /// starts it, and whether the unit is masked, at the next boot too.
    ///
    /// # Errors
    ///
    /// The mask can't be made there, or can't be removed.
    fn mask(&self, unit: &str, wanted: bool) -> Result<(PathBuf, bool), Failure>;

    /// Does something with a unit. After a failure, `output` gets what the unit has logged.
    fn control(&self, verb: Verb, unit: &str, output: &Output) -> Result<(), Failure>;

    /// Stops units. Those that do not run are no error.
    fn stop_all(&self, units: &[String], output: &Output) -> Result<(), Failure>;

    /// Whether a unit runs with its current file; reads changed files first.
    fn runs(&self, unit: &str, output: &Output) -> Result<bool, Failure>;

    /// Whether a unit is active.
    fn is_active(&self, unit: &str) -> Result<bool, Failure>;

    /// Looks at what a unit does; the error says why it will never be up.
    fn observe(&self, unit: &str) -> Result<Observed, String>;

    /// How long a service of this machine must run before it counts as started well. A
    /// machine that boots slowly also fails slowly.
    fn moment(&self) -> Duration;

    /// Prints the last lines that a unit has logged.
    fn print_log(&self, unit: &str, output: &Output);

    /// Returns the name of the file that defines a unit.
    fn file_of(&self, unit: &str) -> String;

    /// Whether it has read the file at `path`, and must read it again after a change.
    fn reads(&self, path: &str) -> bool;

    /// Reads its files again.
    fn reload(&self, output: &Output) -> Result<(), Failure>;

    /// Lists the units that are among `files`; for a template, a pattern that matches all
    /// its instances.
    fn units_among(&self, files: &str) -> Vec<String>;

    /// Stops all units with files to close, before the machine is sealed. Units that can't
    /// be stopped are no error.
    fn stop_services(&self);

    /// Makes the next boot the machine's first: runs programs once, before all services,
    /// and keeps which services start at boot as it is.
    fn prepare_first_boot(&self, commands: &[&str]) -> io::Result<()>;
}

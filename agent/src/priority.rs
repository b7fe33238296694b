//! Raises the agent's priority while the host waits for it.
//!
//! When a fork resumes, many of its services react, because the clock was stepped. Their
//! work can wait; the request of the host can't. Programs that the agent starts have
//! normal priority.

use std::process::{Child, Command};

use rustix::process::setpriority_process;

/// The highest nice level.
const FIRST: i32 = -20;
/// The normal nice level.
const USUAL: i32 = 0;

/// Gives this thread the highest priority. Ignores errors.
pub(crate) fn begin() {
    let _ = setpriority_process(None, FIRST);
}

/// Gives this thread normal priority again.
pub(crate) fn end() {
    let _ = setpriority_process(None, USUAL);
}

/// Starts a program with normal priority: it would inherit a high one.
pub(crate) fn start(command: &mut Command) -> std::io::Result<Child> {
    end();
    command.spawn()
}

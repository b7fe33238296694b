//! Goes first where somebody waits.
//!
//! That a fork wakes is news to half of its services: the clock was stepped.
//! What they do about it can wait, and what the agent was told to do can't.
//! Programs that it starts have the priority that they would have anyway.

use std::process::{Child, Command};

use rustix::process::setpriority_process;

/// The highest priority of programs that share the processors.
const FIRST: i32 = -20;
/// What programs have.
const USUAL: i32 = 0;

/// Has this thread go before all others, as far as that is allowed.
pub(crate) fn begin() {
    let _ = setpriority_process(None, FIRST);
}

/// Has it wait for its turn again.
pub(crate) fn end() {
    let _ = setpriority_process(None, USUAL);
}

/// Starts a program, which would go first as well.
pub(crate) fn start(command: &mut Command) -> std::io::Result<Child> {
    end();
    command.spawn()
}

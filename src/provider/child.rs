//! Programs of the host that must not outlive vimg.

use rustix::process::{Signal, getpid, getppid, set_parent_process_death_signal};
use tokio::process::Command;

/// Has the kernel kill the program when vimg dies, however it dies.
pub(super) fn die_with_us(command: &mut Command) {
    let parent = getpid();
    // SAFETY: the closure makes system calls and touches no memory that the
    // parent shares.
    unsafe {
        command.pre_exec(move || {
            set_parent_process_death_signal(Some(Signal::KILL))?;
            // vimg may have died before the line above.
            if getppid() == Some(parent) {
                Ok(())
            } else {
                Err(std::io::Error::from(std::io::ErrorKind::Interrupted))
            }
        });
    }
}

//! Whether the terminal shows control keys, such as Ctrl-C as `^C`.
//!
//! After each draw of the live view the cursor is at the right margin. There, `^C`
//! would begin another line, and the view would be cleared one line too low.

use std::sync::atomic::{AtomicBool, Ordering};

use rustix::process::getpgrp;
use rustix::termios::{LocalModes, OptionalActions, tcgetattr, tcgetpgrp, tcsetattr};

/// Whether this process hides control keys.
static HIDDEN: AtomicBool = AtomicBool::new(false);

/// Keeps the terminal from showing control keys.
pub(super) fn hide_keys() {
    if set_shown(false) {
        HIDDEN.store(true, Ordering::Relaxed);
    }
}

/// Lets the terminal show control keys again, if [`hide_keys`] has changed that.
pub fn show_keys() {
    if HIDDEN.swap(false, Ordering::Relaxed) {
        set_shown(true);
    }
}

/// Sets whether the terminal shows control keys. Returns whether it was changed:
/// the kernel would stop a process in the background that tries.
fn set_shown(shown: bool) -> bool {
    let terminal = std::io::stderr();
    let Ok(mut modes) = tcgetattr(&terminal) else { return false };
    let is_in_front = tcgetpgrp(&terminal).is_ok_and(|group| group == getpgrp());
    if !is_in_front || modes.local_modes.contains(LocalModes::ECHOCTL) == shown {
        return false;
    }
    modes.local_modes.set(LocalModes::ECHOCTL, shown);
    tcsetattr(&terminal, OptionalActions::Now, &modes).is_ok()
}

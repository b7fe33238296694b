//! How things are shown.

use std::io::IsTerminal;

/// How to show things.
#[derive(Debug, Clone, Copy)]
pub struct Style {
    /// With colours.
    pub colour: bool,
    /// As JSON lines on standard output.
    pub json: bool,
    /// Only what went wrong.
    pub quiet: bool,
    /// Each line that programs print, even on a terminal.
    pub verbose: bool,
}

impl Style {
    /// Whether a live view can be shown.
    pub(super) fn live(self) -> bool {
        !self.json && !self.quiet && !self.verbose && std::io::stderr().is_terminal()
    }
}

//! The style of output.

use std::io::IsTerminal;

/// The style of output.
#[derive(Debug, Clone, Copy)]
pub struct Style {
    /// Use colours on standard error.
    pub colour: bool,
    /// Use colours on standard output.
    pub colour_out: bool,
    /// Print JSON lines on standard output.
    pub json: bool,
    /// Print only errors.
    pub quiet: bool,
    /// Print each phase and each line that programs print, as lines.
    pub verbose: bool,
}

impl Style {
    /// Whether a live view can be shown.
    pub(super) fn live(self) -> bool {
        !self.json && !self.quiet && !self.verbose && std::io::stderr().is_terminal()
    }
}

//! Events of a build. The executor shows progress only through events; no module
//! below [`crate::report`] prints.
//!
//! The JSON form of events is a public interface. `docs/reference/events.md` lists
//! it, and a test compares the two.

use serde::Serialize;

/// Something that happened in a build.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// The plan is ready: the first event of a build, before caches are asked,
    /// and again each time that the plan changes.
    Planned {
        /// Nodes that this build needs.
        nodes: usize,
        /// How many of these nodes exist already.
        reused: usize,
    },
    /// A node exists already.
    Reused {
        /// Its name, for instance `web@nginx`.
        node: String,
        /// Its key.
        key: String,
    },
    /// Work on a node begins.
    Started {
        /// Its name.
        node: String,
        /// Its key.
        key: String,
        /// Why vimg builds it.
        reason: String,
    },
    /// A node enters a phase, such as `boot` or `apply`.
    Phase {
        /// Its name.
        node: String,
        /// The name of the phase.
        phase: String,
    },
    /// A line that a node's programs printed.
    Output {
        /// The node's name.
        node: String,
        /// The line, without its line break.
        line: String,
    },
    /// A node is built.
    Built {
        /// Its name.
        node: String,
        /// Its key.
        key: String,
        /// How long this node alone took, in seconds.
        seconds: f64,
        /// Its size on disk, in bytes.
        bytes: u64,
    },
    /// Early cutoff: a rebuilt node is identical to an earlier state, so nodes that
    /// depend on it keep their keys.
    Same {
        /// Its name.
        node: String,
        /// Its key.
        key: String,
        /// The key of the identical state.
        of: String,
    },
    /// Progress of a transfer of a node's state from or to a cache.
    Moving {
        /// Its name.
        node: String,
        /// The cache.
        cache: String,
        /// Whether it is an upload.
        sent: bool,
        /// How much of a file is transferred, in bytes.
        done: u64,
        /// The size of the file, in bytes.
        all: u64,
        /// How long the transfer has taken so far, in seconds.
        seconds: f64,
    },
    /// A node's state was fetched from a cache.
    Fetched {
        /// Its name.
        node: String,
        /// Its key.
        key: String,
        /// The cache.
        from: String,
        /// How long it took, in seconds.
        seconds: f64,
        /// How much was read, in bytes.
        bytes: u64,
    },
    /// A node's state was sent to a cache.
    Sent {
        /// Its name.
        node: String,
        /// Its key.
        key: String,
        /// The cache.
        to: String,
    },
    /// Totals of a cache in this build.
    Cache {
        /// The cache.
        cache: String,
        /// States that were fetched.
        hits: usize,
        /// States that no cache had.
        misses: usize,
        /// States that were sent.
        sent: usize,
        /// How much was read, in bytes.
        down: u64,
        /// How much was written, in bytes.
        up: u64,
        /// How many requests were made.
        requests: u64,
    },
    /// A node could not be built.
    Failed {
        /// Its name.
        node: String,
        /// Why, in a sentence.
        message: String,
    },
    /// A node was not tried, because a node below it failed or the build stopped.
    Skipped {
        /// Its name.
        node: String,
    },
    /// An output is in its place.
    Written {
        /// The image's name.
        image: String,
        /// The path of the output.
        path: String,
        /// Its size on disk, in bytes.
        bytes: u64,
        /// Whether it was up to date, so that nothing was written.
        unchanged: bool,
    },
    /// A note for people, which needs no action.
    Notice {
        /// The text of the note.
        text: String,
    },
    /// All nodes are done.
    Finished {
        /// Nodes that were built.
        built: usize,
        /// Nodes that existed already.
        reused: usize,
        /// Nodes that failed.
        failed: usize,
        /// How long it took, in seconds.
        seconds: f64,
        /// How many machines were booted.
        boots: usize,
    },
}

/// A function that takes events. It must not block for long.
pub type Sink = std::sync::Arc<dyn Fn(Event) + Send + Sync>;

/// Escapes control characters, which could move a terminal's cursor.
pub fn plain(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    out
}

/// Removes control sequences and control characters from the output of a machine.
/// On a terminal they could set a title, inject input or hide lines. Line breaks
/// and tabs stay.
pub fn stripped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '\u{1b}' => match chars.next() {
                // Parameters are followed by one final byte (ECMA-48, 5.4).
                Some('[') => {
                    while chars.next_if(|c| (' '..='?').contains(c)).is_some() {}
                    chars.next_if(|c| ('@'..='~').contains(c));
                }
                // Strings, such as a title, end with BEL or with ESC \.
                Some(']' | 'P' | 'X' | '^' | '_') => {
                    while let Some(c) = chars.next_if(|c| *c != '\n') {
                        if c == '\u{7}' || c == '\u{1b}' && chars.next_if_eq(&'\\').is_some() {
                            break;
                        }
                    }
                }
                Some('\n') => out.push('\n'),
                _ => {}
            },
            '\n' | '\t' => out.push(c),
            c if c.is_control() => {}
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_would_move_a_terminal_is_taken_out() {
        let printed = "a\u{1b}[31;1mred\u{1b}[0m\tb\r\n\u{1b}]0;title\u{7}c\u{1b}]52;c;eA==\u{1b}\\d\u{9b}2Je\u{8}\u{1b}";
        assert_eq!(stripped(printed), "ared\tb\ncd2Je");
        // A sequence without an end removes the rest of its line, and no more.
        assert_eq!(stripped("\u{1b}]0;x\ny\u{1b}\nz"), "\ny\nz");
        assert_eq!(stripped("\u{1b}[\nПривет x\u{1b}[3"), "\nПривет x");
    }
}

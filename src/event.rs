//! What a build tells whoever watches. Events are the only way from the
//! executor to a screen; nothing below [`crate::report`] prints.
//!
//! The JSON form of these is an interface: `docs/reference/events.md` lists it, and a
//! test compares the two.

use serde::Serialize;

/// Something that happened in a build.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// What will be done is known.
    Planned {
        /// Nodes that this build needs.
        nodes: usize,
        /// Of these, how many are there already.
        reused: usize,
    },
    /// A node is there already.
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
        /// Why it is built.
        reason: String,
    },
    /// A node enters a phase, such as `boot` or `apply`.
    Phase {
        /// Its name.
        node: String,
        /// What is done now, in a few words.
        phase: String,
    },
    /// A line that a node's programs printed.
    Output {
        /// The node's name.
        node: String,
        /// The line, without its end.
        line: String,
    },
    /// A node is there now.
    Built {
        /// Its name.
        node: String,
        /// Its key.
        key: String,
        /// How long its own work took, in seconds.
        seconds: f64,
        /// What it takes on disk, in bytes.
        bytes: u64,
    },
    /// A node that was made anew holds what it held before, so that what is
    /// made from it is what it was.
    Same {
        /// Its name.
        node: String,
        /// Its key.
        key: String,
        /// The key of the state that holds the same.
        of: String,
    },
    /// A node's state is on its way from or to a cache.
    Moving {
        /// Its name.
        node: String,
        /// The cache.
        cache: String,
        /// Whether it is sent there.
        sent: bool,
        /// How much of a file is done, in bytes.
        done: u64,
        /// How much that is in all, in bytes.
        all: u64,
        /// How long it has been under way, in seconds.
        seconds: f64,
    },
    /// A node's state was taken over from a cache.
    Fetched {
        /// Its name.
        node: String,
        /// Its key.
        key: String,
        /// The cache.
        from: String,
        /// How long it took, in seconds.
        seconds: f64,
        /// What was read, in bytes.
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
    /// What a build had of a cache, and gave it.
    Cache {
        /// The cache.
        cache: String,
        /// States that were taken over.
        hits: usize,
        /// States that were looked for and not there.
        misses: usize,
        /// States that were sent.
        sent: usize,
        /// What was read, in bytes.
        down: u64,
        /// What was written, in bytes.
        up: u64,
        /// How often it was asked.
        requests: u64,
    },
    /// A node could not be built.
    Failed {
        /// Its name.
        node: String,
        /// Why, in a sentence.
        message: String,
    },
    /// A node was not tried, because one below it failed.
    Skipped {
        /// Its name.
        node: String,
    },
    /// A file was written.
    Written {
        /// The image's name.
        image: String,
        /// Where.
        path: String,
        /// Its size on disk in bytes.
        bytes: u64,
        /// It was there already, as it should be.
        unchanged: bool,
    },
    /// Something that a person should know and need not act upon.
    Notice {
        /// A sentence.
        text: String,
    },
    /// The build is over.
    Finished {
        /// Nodes that were built.
        built: usize,
        /// Nodes that were there.
        reused: usize,
        /// Nodes that failed.
        failed: usize,
        /// How long it took, in seconds.
        seconds: f64,
        /// How many machines were booted.
        boots: usize,
    },
}

/// Where events go. It must not block for long.
pub type Sink = std::sync::Arc<dyn Fn(Event) + Send + Sync>;

/// A text without what would move a terminal's cursor.
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

/// A text that a machine printed, without control sequences and characters for a
/// terminal: they could set a title, inject input or hide lines. Line breaks and
/// tabs stay.
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
        // What is never ended takes its line and no more.
        assert_eq!(stripped("\u{1b}]0;x\ny\u{1b}\nz"), "\ny\nz");
        assert_eq!(stripped("\u{1b}[\nПривет x\u{1b}[3"), "\nПривет x");
    }
}

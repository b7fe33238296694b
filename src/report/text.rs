//! Events as lines of text.

use std::io::Write;

use super::style::Style;
use crate::event::Event;

/// Formats a number of bytes: `378 MiB`.
pub fn bytes(n: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = n as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 || value >= 10.0 {
        format!("{value:.0} {}", UNITS[unit])
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}

/// Formats a number of seconds: `0.4 s`, `2 min 5 s`, `1 h 2 min`, `3 d 4 h`.
pub fn duration(seconds: f64) -> String {
    if seconds < 59.95 {
        return format!("{seconds:.1} s");
    }
    passed(seconds.round() as u64)
}

/// Formats a number of seconds that grows on the screen: `4 s`, `2 min 5 s`.
pub(super) fn passed(seconds: u64) -> String {
    match (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60, seconds % 60) {
        (0, 0, 0, s) => format!("{s} s"),
        (0, 0, min, s) => format!("{min} min {s} s"),
        (0, h, min, _) => format!("{h} h {min} min"),
        (d, h, _, _) => format!("{d} d {h} h"),
    }
}

/// Formats the progress of a transfer: `12 MiB of 40 MiB, 8.1 MiB/s`.
pub(super) fn moving(done: u64, all: u64, seconds: f64) -> String {
    let rate = (done as f64 / seconds.max(0.001)) as u64;
    format!("{} of {}, {}/s", bytes(done), bytes(all), bytes(rate))
}

/// Writes a line to standard error, if there is one. A build does not fail because
/// its standard error is closed.
pub(super) fn say(line: Option<String>) {
    if let Some(line) = line {
        let _ = writeln!(std::io::stderr().lock(), "{line}");
    }
}

/// Colours text for a terminal, if that is wanted.
#[derive(Debug, Clone, Copy)]
pub struct Paint(pub bool);

impl Paint {
    /// Paints it green.
    pub fn green(&self, text: &str) -> String {
        self.paint("32", text)
    }

    /// Paints it red.
    pub fn red(&self, text: &str) -> String {
        self.paint("31", text)
    }

    /// Paints it yellow.
    pub fn yellow(&self, text: &str) -> String {
        self.paint("33", text)
    }

    /// Paints it cyan.
    pub fn cyan(&self, text: &str) -> String {
        self.paint("36", text)
    }

    /// Makes it fainter.
    pub fn dim(&self, text: &str) -> String {
        self.paint("2", text)
    }

    fn paint(&self, code: &str, text: &str) -> String {
        if self.0 { format!("\u{1b}[{code}m{text}\u{1b}[0m") } else { text.to_owned() }
    }
}

/// Width of output, in columns. Few terminals are narrower.
const WIDTH: usize = 80;
/// Indentation of the text of a notice, in columns.
const INDENT: usize = 6;

/// Formats events as lines of text.
pub(super) struct Plain {
    paint: Paint,
    quiet: bool,
    verbose: bool,
}

impl Plain {
    pub(super) fn new(style: Style) -> Self {
        Self { paint: Paint(style.colour), quiet: style.quiet, verbose: style.verbose }
    }

    pub(super) fn event(&self, event: &Event) -> Option<String> {
        if self.quiet && !matches!(event, Event::Failed { .. }) {
            return None;
        }
        match event {
            Event::Phase { .. } | Event::Output { .. } if !self.verbose => None,
            Event::Phase { node, phase } => Some(self.paint.dim(&format!("      {node}: {phase}"))),
            Event::Output { line, .. } => Some(self.paint.dim(&format!("      | {line}"))),
            other => self.lasting(other),
        }
    }

    /// Returns the line of an event, if it stays visible above a live view.
    pub(super) fn lasting(&self, event: &Event) -> Option<String> {
        let paint = &self.paint;
        Some(match event {
            Event::Started { node, reason, .. } => format!("build {node}: {reason}"),
            Event::Built { node, seconds, bytes: n, .. } => {
                format!("{} {node} in {}, {}", paint.green(" done"), duration(*seconds), bytes(*n))
            }
            Event::Same { node, .. } => {
                format!("{} {node} is identical to the previous one", paint.dim(" same"))
            }
            Event::Failed { node, message } => {
                let first = message.lines().next().unwrap_or("");
                format!("{} {node}: {first}", paint.red(" fail"))
            }
            Event::Skipped { node } => format!("{} {node}: not tried", paint.dim(" skip")),
            Event::Written { path, bytes: n, unchanged: false, .. } => {
                format!("{} {path}, {}", paint.green("wrote"), bytes(*n))
            }
            Event::Written { path, .. } => format!("{} {path} is up to date", paint.dim(" kept")),
            Event::Notice { text } => {
                let indented = textwrap::Options::new(WIDTH - INDENT).break_words(false);
                let lines = textwrap::wrap(text, indented).join(&format!("\n{:INDENT$}", ""));
                format!("{} {lines}", paint.yellow(" note"))
            }
            Event::Finished { built, reused, failed, seconds, boots } => {
                let failed = if *failed > 0 { format!(", {failed} failed") } else { String::new() };
                let boots = match boots {
                    0 => "nothing booted".to_owned(),
                    1 => "1 boot".to_owned(),
                    n => format!("{n} boots"),
                };
                format!("{built} built, {reused} reused{failed} in {} ({boots})", duration(*seconds))
            }
            Event::Fetched { node, from, seconds, bytes: n, .. } => {
                let read = bytes(*n);
                format!("{} {node} from {from} in {}, {read} read", paint.green(" took"), duration(*seconds))
            }
            Event::Sent { node, to, .. } => format!("{} {node} to {to}", paint.green(" sent")),
            Event::Cache { cache, hits, misses, sent, down, up, requests } => {
                let moved = format!("{} read, {} written, {requests} requests", bytes(*down), bytes(*up));
                match sent {
                    0 if hits + misses > 0 => {
                        format!("cache {cache}: {hits} fetched, {misses} missing; {moved}")
                    }
                    sent => format!("cache {cache}: {sent} sent; {moved}"),
                }
            }
            Event::Planned { .. }
            | Event::Reused { .. }
            | Event::Phase { .. }
            | Event::Output { .. }
            | Event::Moving { .. } => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(396 << 20), "396 MiB");
        assert_eq!(duration(0.04), "0.0 s");
        assert_eq!(duration(59.97), "1 min 0 s");
        assert_eq!(duration(125.4), "2 min 5 s");
        assert_eq!(duration(3725.0), "1 h 2 min");
        assert_eq!(duration(273_600.0), "3 d 4 h");
        assert_eq!((passed(7), passed(60)), ("7 s".to_owned(), "1 min 0 s".to_owned()));
    }

    #[test]
    fn programs_are_quoted_only_if_that_is_asked_for() {
        let output = Event::Output { node: "a".into(), line: "x".into() };
        let phase = Event::Phase { node: "a".into(), phase: "boot".into() };
        let skipped = Event::Skipped { node: "b".into() };
        let failed = Event::Failed { node: "a".into(), message: "no\nmore".into() };
        let seen = |quiet, verbose| {
            let plain = Plain::new(Style { colour: false, colour_out: false, json: false, quiet, verbose });
            [&output, &phase, &skipped, &failed].map(|event| plain.event(event).unwrap_or_default())
        };
        assert_eq!(seen(false, false), ["", "", " skip b: not tried", " fail a: no"]);
        assert_eq!(seen(false, true), ["      | x", "      a: boot", " skip b: not tried", " fail a: no"]);
        for verbose in [false, true] {
            assert_eq!(seen(true, verbose), ["", "", "", " fail a: no"]);
        }
    }
}

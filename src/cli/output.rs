//! Output of commands, their errors, and exit codes.

use std::io::{IsTerminal, Write};
use std::path::Path;

use vimg_lang::{Diagnostic, Sources};

use crate::event::{Event, stripped};
use crate::execute::{Failure, FailureKind};
use crate::host::{limits, space};
use crate::report::{Shown, Style, diagnostics_json, render};

/// Why a command failed.
pub(super) enum Error {
    /// A message, a help text and the exit code.
    Message(String, Option<String>, u8),
    /// Mistakes in recipes.
    Recipe(Box<Sources>, Vec<Diagnostic>),
    /// Nodes that could not be built.
    Build(Box<Sources>, Vec<Failure>),
    /// An exit code, if the command has already printed everything.
    Code(u8),
}

pub(super) const USAGE: u8 = 2;
pub(super) const RECIPE: u8 = 3;
pub(super) const HOST: u8 = 4;
pub(super) const STORE: u8 = 5;
pub(super) const INTERRUPTED: u8 = 130;

impl Error {
    pub(super) fn host(message: impl Into<String>) -> Self {
        Self::Message(message.into(), None, HOST)
    }
}

impl From<crate::store::StoreError> for Error {
    fn from(error: crate::store::StoreError) -> Self {
        let other = "name another place with --store DIR or VIMG_STORE";
        let help = match error.is_full() {
            true => format!("the disk is full: `vimg store gc` removes what nothing needs; or {other}"),
            false => limits::advice(&error.source).unwrap_or_else(|| other.to_owned()),
        };
        Self::Message(error.to_string(), Some(help), STORE)
    }
}

/// Advice about a full disk with a file of the user.
pub(super) const FULL: &str = "the disk is full: make room there, or name another place";

/// The error for a file of the user that can't be written.
pub(super) fn unwritten(path: &Path, error: &std::io::Error, code: u8) -> Error {
    let help = match space::is_full(error) {
        true => Some(FULL.to_owned()),
        false => limits::advice(error),
    };
    Error::Message(format!("can't write {}: {error}", path.display()), help, code)
}

pub(super) type Outcome = Result<(), Error>;

/// Prints to standard output. A closed pipe is no error.
pub(super) fn print(text: &str) -> Outcome {
    match std::io::stdout().lock().write_all(text.as_bytes()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Error::host(format!("can't write to standard output: {e}")))
        }
        _ => Ok(()),
    }
}

/// Prints to standard error. A closed standard error is no reason to fail.
pub(super) fn eprint(text: &str) {
    let _ = std::io::stderr().lock().write_all(text.as_bytes());
}

/// Prints a note for people, beside the output of a command.
pub(super) fn note(text: String, style: Style) {
    let style = Style { json: false, ..style };
    if let Some(line) = crate::report::line(&Event::Notice { text }, style) {
        eprint(&format!("{line}\n"));
    }
}

/// Prints the output of a machine: unchanged to a file or pipe, and without
/// control sequences to a terminal.
pub(super) fn print_foreign(text: &str) -> Outcome {
    if std::io::stdout().is_terminal() { print(&stripped(text)) } else { print(text) }
}

pub(super) fn print_json(value: &serde_json::Value) -> Outcome {
    print(&format!("{}\n", serde_json::to_string_pretty(value).unwrap_or_default()))
}

/// Prints warnings about a recipe to standard error.
pub(super) fn warn(sources: &Sources, warnings: &[Diagnostic], style: Style) {
    let mut err = std::io::stderr().lock();
    for warning in warnings {
        let _ = write!(err, "{}", render(&Shown::new(sources, warning), style));
    }
}

/// Prints why a command failed, and returns the exit code.
pub(super) fn report(error: &Error, style: Style) -> u8 {
    let mut err = std::io::stderr().lock();
    match error {
        Error::Code(code) => *code,
        Error::Message(message, help, code) if style.json => {
            let error = serde_json::json!({ "message": message, "help": help });
            let _ = print_json(&serde_json::json!({ "error": error }));
            *code
        }
        Error::Message(message, help, code) => {
            let shown = Shown::plain(message).help(help.clone());
            let _ = write!(err, "{}", render(&shown, style));
            *code
        }
        Error::Recipe(sources, diagnostics) => {
            if style.json {
                let _ = print_json(&diagnostics_json(sources, diagnostics));
                return RECIPE;
            }
            for diagnostic in diagnostics {
                let _ = write!(err, "{}", render(&Shown::new(sources, diagnostic), style));
            }
            let n = diagnostics.len();
            let more = if n >= vimg_lang::MOST { " and possibly more" } else { "" };
            let what = if n == 1 { "mistake" } else { "mistakes" };
            let _ = writeln!(err, "{n} {what}{more} in {}", mistaken(sources, diagnostics));
            RECIPE
        }
        Error::Build(sources, failures) => {
            for failure in failures {
                let _ = write!(err, "{}", failure_text(sources, failure, style));
            }
            let kind = |kind| failures.iter().any(|f| f.kind == kind);
            if kind(FailureKind::Recipe) {
                1
            } else if kind(FailureKind::Store) || kind(FailureKind::Full) {
                STORE
            } else {
                HOST
            }
        }
    }
}

/// Names the text that has mistakes: a settings file, or the recipe.
fn mistaken(sources: &Sources, diagnostics: &[Diagnostic]) -> String {
    let places = diagnostics.iter().filter_map(|diagnostic| diagnostic.primary.as_ref());
    let mut names = places.map(|(span, _)| sources.get(span.source).name.as_str());
    match names.next() {
        Some(first) if !first.ends_with(".vimg") && names.all(|name| name == first) => first.to_owned(),
        _ => "the recipe".to_owned(),
    }
}

/// Formats a failed node: its last output, then the place in the recipe.
pub fn failure_text(sources: &Sources, failure: &Failure, style: Style) -> String {
    let mut out = String::new();
    if !failure.tail.is_empty() {
        out.push_str(&format!("last output of {}:\n", failure.node));
        for line in &failure.tail {
            out.push_str(&format!("  | {line}\n"));
        }
    }
    let mut shown = Shown::plain(&failure.message).help(failure.help.clone());
    shown.place(sources, failure.span, "");
    if let Some((span, text)) = &failure.related {
        shown.also(sources, *span, text);
    }
    out.push_str(&render(&shown, style));
    if failure.log.is_some() {
        out.push_str(&format!("the whole log: vimg log {}\n", failure.node));
    }
    out
}

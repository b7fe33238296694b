//! Shows diagnostics, failures and the events of a build: on terminals, in logs,
//! and as JSON. Knows neither nodes nor the store, only texts and events.

mod style;
mod time;
mod diagnostic;
mod text;
mod live;

use std::io::Write;
use std::sync::Arc;
use std::time::SystemTime;

use serde::Serialize;

pub use diagnostic::{Shown, diagnostics_json, render};
pub use style::Style;
pub use text::{bytes, duration};
pub use time::rfc3339;

use crate::event::{Event, Sink};

/// Creates a reporter for the events of one build.
pub fn reporter(style: Style) -> Reporter {
    if style.json {
        return Reporter { sink: Arc::new(json_line), live: None };
    }
    if style.live() {
        let live = Arc::new(live::Live::new(style));
        let shown = live.clone();
        return Reporter { sink: Arc::new(move |event| shown.event(&event)), live: Some(live) };
    }
    Reporter { sink: Arc::new(move |event| say(line(&event, style))), live: None }
}

/// Returns the line of text that a log shows for an event; `None` if it shows
/// none.
pub fn line(event: &Event, style: Style) -> Option<String> {
    text::Plain::new(style).event(event)
}

/// Shows events; see [`reporter`].
pub struct Reporter {
    sink: Sink,
    live: Option<Arc<live::Live>>,
}

impl Reporter {
    /// Returns the function that takes events.
    pub fn sink(&self) -> Sink {
        self.sink.clone()
    }

    /// Ends a live view. Call it before anything else is printed.
    pub fn end(&self) {
        if let Some(live) = &self.live {
            live.end();
        }
    }
}

/// Writes a line to standard error, if there is one. A build does not fail because
/// its standard error is closed.
fn say(line: Option<String>) {
    if let Some(line) = line {
        let _ = writeln!(std::io::stderr().lock(), "{line}");
    }
}

/// An event as programs read it.
#[derive(Serialize)]
struct Stamped {
    #[serde(flatten)]
    event: Event,
    time: String,
}

fn json_line(event: Event) {
    let stamped = Stamped { event, time: rfc3339(SystemTime::now()) };
    if let Ok(line) = serde_json::to_string(&stamped) {
        let _ = writeln!(std::io::stdout().lock(), "{line}");
    }
}

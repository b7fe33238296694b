//! Shows diagnostics, failures and the events of a build: on terminals, in logs,
//! and as JSON. Knows neither nodes nor the store, only texts and events.

mod style;
mod time;
mod diagnostic;
mod text;
mod keys;
pub mod graph;
mod live;

use std::io::Write;
use std::sync::Arc;
use std::time::SystemTime;

use serde::Serialize;

pub use diagnostic::{Shown, diagnostics_json, render};
pub use keys::show_keys;
pub use style::Style;
pub use text::{Paint, bytes, duration};
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
    Reporter { sink: Arc::new(move |event| text::say(line(&event, style))), live: None }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_says_when_it_was_written() {
        let event = Event::Skipped { node: "a".into() };
        let line = serde_json::to_string(&Stamped { event, time: rfc3339(SystemTime::UNIX_EPOCH) });
        let expected = r#"{"event":"skipped","node":"a","time":"1970-01-01T00:00:00.000Z"}"#;
        assert_eq!(line.unwrap(), expected);
    }
}

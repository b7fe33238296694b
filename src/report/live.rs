//! The live view on a terminal: a line for each node in progress, with its time
//! and its phase or last line of output, and a line with the totals. Finished
//! nodes are above.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressState, ProgressStyle};

use super::keys::{hide_keys, show_keys};
use super::style::Style;
use super::text::{Plain, moving, passed, say};
use crate::event::Event;

pub(super) struct Live {
    all: MultiProgress,
    lines: Mutex<Lines>,
    plain: Plain,
}

#[derive(Default)]
struct Lines {
    nodes: HashMap<String, ProgressBar>,
    /// The line with the totals, if the build has something to do.
    totals: Option<ProgressBar>,
    /// Whether the view has ended. Nodes that are stopped may still send events.
    ended: bool,
    built: usize,
    reused: usize,
    all: usize,
}

impl Lines {
    fn show_totals(&self) {
        if let Some(bar) = &self.totals {
            let left = self.all.saturating_sub(self.built + self.reused);
            bar.set_message(format!("{} built, {} reused, {left} to go", self.built, self.reused));
        }
    }
}

impl Live {
    pub(super) fn new(style: Style) -> Self {
        Self { all: MultiProgress::new(), lines: Mutex::default(), plain: Plain::new(style) }
    }

    pub(super) fn event(&self, event: &Event) {
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        if lines.ended {
            drop(lines);
            say(self.plain.lasting(event));
            return;
        }
        match event {
            Event::Planned { nodes, reused } => {
                (lines.all, lines.reused) = (*nodes, *reused);
                lines.built = 0;
                if nodes > reused && lines.totals.is_none() {
                    hide_keys();
                    let bar = self.all.add(ProgressBar::new_spinner());
                    set_style(&bar, "  {time} {wide_msg}");
                    bar.enable_steady_tick(Duration::from_secs(1));
                    lines.totals = Some(bar);
                }
            }
            Event::Started { node, .. } => self.begin(&mut lines, node),
            Event::Moving { node, cache, sent, done, all, seconds } => {
                if !lines.nodes.contains_key(node) {
                    self.begin(&mut lines, node);
                }
                if let Some(bar) = lines.nodes.get(node) {
                    let way = if *sent { "to" } else { "from" };
                    bar.set_message(format!("{way} {cache}: {}", moving(*done, *all, *seconds)));
                }
            }
            Event::Fetched { node, .. } | Event::Sent { node, .. } => {
                if let Some(bar) = lines.nodes.remove(node) {
                    bar.finish_and_clear();
                }
            }
            Event::Phase { node, phase: text } | Event::Output { node, line: text } => {
                if let Some(bar) = lines.nodes.get(node) {
                    bar.set_message(text.clone());
                }
            }
            Event::Built { node, .. } | Event::Failed { node, .. } => {
                lines.built += usize::from(matches!(event, Event::Built { .. }));
                if let Some(bar) = lines.nodes.remove(node) {
                    bar.finish_and_clear();
                }
            }
            Event::Reused { .. } => lines.reused += 1,
            Event::Finished { .. } => {
                if let Some(bar) = lines.totals.take() {
                    bar.finish_and_clear();
                }
            }
            _ => {}
        }
        lines.show_totals();
        if let Some(line) = self.plain.lasting(event) {
            let _ = self.all.println(line);
        }
    }

    /// Adds a line for a node.
    fn begin(&self, lines: &mut Lines, node: &str) {
        hide_keys();
        let bar = ProgressBar::new_spinner();
        let bar = match &lines.totals {
            Some(totals) => self.all.insert_before(totals, bar),
            None => self.all.add(bar),
        };
        set_style(&bar, "{spinner} {prefix} {time} {wide_msg}");
        bar.set_prefix(node.to_owned());
        bar.enable_steady_tick(Duration::from_millis(120));
        lines.nodes.insert(node.to_owned(), bar);
    }

    pub(super) fn end(&self) {
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        lines.ended = true;
        let nodes = std::mem::take(&mut lines.nodes);
        // A line that is only dropped stays on the screen.
        for bar in nodes.into_values().chain(lines.totals.take()) {
            bar.finish_and_clear();
        }
        let _ = self.all.clear();
        show_keys();
    }
}

/// Sets the template of a line. `{time}` is the time since the line appeared.
fn set_style(bar: &ProgressBar, template: &str) {
    if let Ok(style) = ProgressStyle::with_template(template) {
        let time = |state: &ProgressState, out: &mut dyn std::fmt::Write| {
            let _ = out.write_str(&passed(state.elapsed().as_secs()));
        };
        bar.set_style(style.with_key("time", time));
    }
}

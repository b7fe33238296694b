//! The view on a terminal: a line for each node that is being made, with its
//! phase, its time and what was printed last; finished nodes above.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use super::Style;
use super::text::Plain;
use crate::event::Event;

pub(super) struct Live {
    all: MultiProgress,
    lines: Mutex<HashMap<String, ProgressBar>>,
    plain: Plain,
}

impl Live {
    pub(super) fn new(style: Style) -> Self {
        Self { all: MultiProgress::new(), lines: Mutex::default(), plain: Plain::new(style) }
    }

    pub(super) fn event(&self, event: &Event) {
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        match event {
            Event::Started { node, .. } => {
                let bar = self.all.add(ProgressBar::new_spinner());
                let template = "{spinner} {prefix} {elapsed} {wide_msg}";
                if let Ok(style) = ProgressStyle::with_template(template) {
                    bar.set_style(style);
                }
                bar.set_prefix(node.clone());
                bar.enable_steady_tick(Duration::from_millis(120));
                lines.insert(node.clone(), bar);
            }
            Event::Phase { node, phase } => {
                if let Some(bar) = lines.get(node) {
                    bar.set_message(phase.clone());
                }
            }
            Event::Output { node, line } => {
                if let Some(bar) = lines.get(node) {
                    bar.set_message(line.clone());
                }
            }
            Event::Built { node, .. } | Event::Failed { node, .. } => {
                if let Some(bar) = lines.remove(node) {
                    bar.finish_and_clear();
                }
            }
            _ => {}
        }
        if let Some(line) = self.plain.lasting(event) {
            let _ = self.all.println(line);
        }
    }

    pub(super) fn end(&self) {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).clear();
        let _ = self.all.clear();
    }
}

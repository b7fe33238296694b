//! `vimg check`

use serde_json::json;

use super::global::Global;
use super::output::{Outcome, print_json};
use super::project;
use crate::report::Style;

/// Check the recipe for mistakes; needs neither QEMU nor a network
#[derive(Debug, clap::Args)]
pub(super) struct Args {}

pub(super) fn run(global: &Global, style: Style) -> Outcome {
    let mut loaded = project::load(global)?;
    project::graph(&mut loaded)?;
    project::keep_stamps(&loaded.notes, loaded.project);
    if style.json {
        return print_json(&json!({ "diagnostics": [] }));
    }
    if style.quiet {
        return Ok(());
    }
    let (files, images) = (loaded.sources.iter().count(), loaded.model.images.len());
    let s = |n: usize| if n == 1 { "" } else { "s" };
    super::output::print(&format!("no mistakes in {files} file{}, {images} image{}\n", s(files), s(images)))
}

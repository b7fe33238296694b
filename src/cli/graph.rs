//! `vimg graph`

use super::global::{Format, Global};
use super::output::{Outcome, print};
use super::project;
use crate::graph::{Format as GraphFormat, show};
use crate::report::Style;

/// Show all nodes as a tree, or with `--format dot|mermaid|json`
#[derive(Debug, clap::Args)]
pub(super) struct Args {}

pub(super) fn run(global: &Global, style: Style) -> Outcome {
    let mut loaded = project::load(global, &project::structure(&[]))?;
    let graph = project::graph(&mut loaded)?;
    loaded.tell_open(style);
    project::keep_stamps(&loaded.notes, loaded.project);
    let format = match global.format {
        Format::Text => GraphFormat::Text,
        Format::Json => GraphFormat::Json,
        Format::Dot => GraphFormat::Dot,
        Format::Mermaid => GraphFormat::Mermaid,
    };
    print(&show(&graph, format))
}

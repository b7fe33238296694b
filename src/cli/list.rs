//! `vimg list`

use std::collections::HashMap;

use serde_json::json;

use super::global::Global;
use super::output::{Outcome, print, print_json};
use super::project;
use crate::graph::NodeId;
use crate::report::{Style, bytes};

/// List the images of the recipe and how much of them is built
#[derive(Debug, clap::Args)]
pub(super) struct Args {}

pub(super) fn run(global: &Global, style: Style) -> Outcome {
    let mut loaded = project::load(global, &project::structure(&[]))?;
    let graph = project::graph(&mut loaded)?;
    loaded.tell_open(style);
    project::keep_stamps(&loaded.notes, loaded.project);
    // Visits each node once: its totals are those of its parent plus its own.
    let mut chains: HashMap<NodeId, (usize, usize, u64)> = HashMap::new();
    let mut known = HashMap::new();
    for id in graph.ids() {
        let node = graph.node(id);
        let (states, there, size) = node.parent().and_then(|p| chains.get(&p).copied()).unwrap_or_default();
        let complete = loaded.store.complete(&node.key, &mut known).is_some();
        let record = if complete { loaded.store.record(&node.key) } else { None };
        let own = record.map_or((0, 0), |r| (1, r.bytes));
        chains.insert(id, (states + 1, there + own.0, size + own.1));
    }
    let mut outputs: HashMap<&str, Vec<&str>> = HashMap::new();
    for target in graph.targets() {
        outputs.entry(&target.image).or_default().push(&target.output.path);
    }
    let rows: Vec<_> = graph
        .images()
        .iter()
        .map(|(name, top)| {
            let (states, there, size) = chains.get(top).copied().unwrap_or_default();
            (name, states, there, size, outputs.remove(name.as_str()).unwrap_or_default())
        })
        .collect();
    if style.json {
        let images: Vec<_> = rows
            .iter()
            .map(|(name, states, there, bytes, outputs)| {
                json!({ "image": name, "states": states, "built": there, "bytes": bytes, "outputs": outputs })
            })
            .collect();
        return print_json(&json!({ "images": images }));
    }
    let width = rows.iter().map(|r| r.0.chars().count()).max().unwrap_or(0).max(5);
    let mut out = format!("{:width$}  built  {:>8}  outputs\n", "image", "on disk");
    for (name, states, there, size, outputs) in rows {
        let built = format!("{there}/{states}");
        out.push_str(&format!("{name:width$}  {built:>5}  {:>8}  {}\n", bytes(size), outputs.join(", ")));
    }
    let lines: Vec<&str> = out.lines().map(str::trim_end).collect();
    print(&format!("{}\n", lines.join("\n")))
}

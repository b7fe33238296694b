//! `vimg list`

use serde_json::json;

use super::{Global, Outcome, print, print_json, project};
use crate::report::{Style, bytes};

/// List the images of the recipe and what the store has of them
#[derive(Debug, clap::Args)]
pub(super) struct Args {}

pub(super) fn run(global: &Global, style: Style) -> Outcome {
    let mut loaded = project::load(global)?;
    let graph = project::graph(&mut loaded)?;
    project::keep_stamps(&loaded.notes, loaded.project);
    let mut rows = Vec::new();
    for (name, top) in graph.images() {
        let chain = graph.chain(*top);
        let there: Vec<_> = chain.iter().filter_map(|id| loaded.store.record(&graph.node(*id).key)).collect();
        let outputs: Vec<&str> =
            graph.targets().iter().filter(|t| t.image == *name).map(|t| t.output.path.as_str()).collect();
        rows.push((name, chain.len(), there.len(), there.iter().map(|r| r.bytes).sum::<u64>(), outputs));
    }
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

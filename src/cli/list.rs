//! `vimg list`

use std::collections::{BTreeMap, HashMap, HashSet};

use serde_json::json;

use super::global::Global;
use super::output::{Outcome, print, print_json};
use super::project::{self, Extent};
use crate::plan::Plan;
use crate::report::{Paint, Style, bytes};

/// List the images of the recipe and how much of them is built
///
/// A state counts for the image that declares it: the size of a base is not part
/// of the images that start from it. `vimg store du` shows what the store takes in
/// total.
#[derive(Debug, clap::Args)]
pub(super) struct Args {}

pub(super) fn run(global: &Global, style: Style) -> Outcome {
    let mut loaded = project::load(global, &project::structure(&[]))?;
    let graph = project::graph(&mut loaded)?;
    loaded.tell_open(style);
    let last = loaded.last();
    project::keep_stamps(&loaded.notes, loaded.project);
    // Each state counts for the image that declares it, so that the sizes of all
    // images add up.
    let mut sizes: HashMap<&str, u64> = HashMap::new();
    let mut seen = HashSet::new();
    for node in graph.ids().map(|id| graph.node(id)) {
        let record = loaded.store.record(&node.key).filter(|_| seen.insert(node.key));
        *sizes.entry(&node.image).or_default() += record.map_or(0, |record| record.bytes);
    }
    let mut outputs: HashMap<&str, Vec<&str>> = HashMap::new();
    for target in graph.targets() {
        outputs.entry(&target.image).or_default().push(&target.output.path);
    }
    let rows: Vec<_> = graph
        .images()
        .iter()
        .map(|(name, _)| {
            // What a build would need: a state below one that exists is not needed.
            let nodes = project::nodes_of(&graph, std::slice::from_ref(name), Extent::Outputs);
            let plan = Plan::new(&graph, &loaded.store, &last, &BTreeMap::new(), &nodes);
            let (states, there) = (plan.steps.len(), plan.reused());
            let size = sizes.get(name.as_str()).copied().unwrap_or_default();
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
    let paint = Paint(style.colour_out);
    let mut out = format!("{:width$}  built  {:>8}  outputs\n", "image", "on disk");
    for (name, states, there, size, outputs) in rows {
        let built = format!("{:>5}", format!("{there}/{states}"));
        let built = if there == states { paint.green(&built) } else { paint.yellow(&built) };
        out.push_str(&format!("{name:width$}  {built}  {:>8}  {}\n", bytes(size), outputs.join(", ")));
    }
    let lines: Vec<&str> = out.lines().map(str::trim_end).collect();
    print(&format!("{}\n", lines.join("\n")))
}

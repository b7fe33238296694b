//! `vimg graph`

use std::collections::{BTreeMap, HashMap};

use serde_json::json;

use super::global::{Format, Global};
use super::output::{Error, Outcome, print, print_json};
use super::project::{self, Extent, Loaded};
use crate::graph::{Graph, NodeId, Work};
use crate::report::Style;
use crate::report::graph::{Drawn, Status, dot, mermaid, tree};

/// Show nodes and their states, as a tree or with `--format dot|mermaid|json`
///
/// A node is stored (built here), fetched (from a cache), to build, or failed (to
/// build, and its last build failed). In the tree, a column is a chain of layers,
/// and the checks of an image share a line.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Images or layers to show, with all below them [default: all images that the
    /// project declares]
    #[arg(value_name = "IMAGE[@LAYER]")]
    nodes: Vec<String>,
    /// Leave out checks
    #[arg(long)]
    no_checks: bool,
    /// Show images of the library, too, even if no image uses them
    #[arg(long, conflicts_with = "nodes")]
    all: bool,
}

pub(super) fn run(args: &Args, global: &Global, style: Style) -> Outcome {
    let mut loaded = project::load(global, &project::structure(&args.nodes))?;
    let graph = project::graph(&mut loaded)?;
    loaded.tell_open(style);
    let shown = selected(args, &graph, &loaded)?;
    let drawn = drawn(&graph, &loaded, &shown);
    project::keep_stamps(&loaded.notes, loaded.project);
    match global.format {
        Format::Text => print(&tree(&drawn, style.colour_out)),
        Format::Dot => print(&dot(&drawn)),
        Format::Mermaid => print(&mermaid(&drawn)),
        Format::Json => print_json(&as_json(&graph, &shown, &drawn)),
    }
}

/// Returns the nodes to show, with all below them; those below come first.
fn selected(args: &Args, graph: &Graph, loaded: &Loaded) -> Result<Vec<NodeId>, Error> {
    let mut wanted: Vec<NodeId> = Vec::new();
    if args.all {
        wanted.extend(graph.ids());
    } else {
        let (images, layers): (Vec<String>, Vec<String>) =
            args.nodes.iter().cloned().partition(|name| graph.image(name).is_some());
        for layer in &layers {
            wanted.push(project::node(graph, layer)?);
        }
        if layers.is_empty() || !images.is_empty() {
            let images = project::wanted(graph, loaded, &images)?;
            wanted.extend(project::nodes_of(graph, &images, Extent::Outputs));
            wanted.extend(images.iter().filter_map(|image| graph.image(image)));
        }
    }
    let is_check = |id: NodeId| matches!(graph.node(id).work, Work::Check(_));
    wanted.retain(|id| !args.no_checks || !is_check(*id));
    let mut shown = std::collections::BTreeSet::new();
    while let Some(id) = wanted.pop() {
        if shown.insert(id) {
            wanted.extend(graph.node(id).inputs());
        }
    }
    Ok(shown.into_iter().collect())
}

/// Finds out what the store has of the nodes.
fn drawn(graph: &Graph, loaded: &Loaded, shown: &[NodeId]) -> Vec<Drawn> {
    let index: BTreeMap<NodeId, usize> = shown.iter().enumerate().map(|(n, id)| (*id, n)).collect();
    let mut known = HashMap::new();
    let draw = |id: &NodeId| {
        let node = graph.node(*id);
        let there = loaded.store.complete(&node.key, &mut known).is_some();
        let record = if there { loaded.store.record(&node.key) } else { None };
        let status = match &record {
            Some(record) if record.origin.is_some() => Status::Fetched,
            Some(_) => Status::Stored,
            None if loaded.notes.failed_log(&node.name).exists() => Status::Failed,
            None => Status::ToBuild,
        };
        Drawn {
            name: node.name.clone(),
            image: node.image.clone(),
            is_check: matches!(node.work, Work::Check(_)),
            status,
            bytes: record.as_ref().map(|record| record.bytes),
            seconds: record.as_ref().map(|record| record.seconds),
            parent: node.parent().and_then(|parent| index.get(&parent).copied()),
            inputs: node.inputs().filter_map(|input| index.get(&input).copied()).collect(),
        }
    };
    shown.iter().map(draw).collect()
}

fn as_json(graph: &Graph, shown: &[NodeId], drawn: &[Drawn]) -> serde_json::Value {
    let nodes: Vec<_> = shown
        .iter()
        .zip(drawn)
        .map(|(id, drawn)| {
            let node = graph.node(*id);
            json!({
                "name": node.name,
                "kind": node.work.kind(),
                "image": node.image,
                "key": node.key,
                "parent": node.parent().map(|p| graph.node(p).name.clone()),
                "inputs": node.inputs().map(|input| graph.node(input).name.clone()).collect::<Vec<_>>(),
                "status": drawn.status.word(),
                "bytes": drawn.bytes,
                "seconds": drawn.seconds,
            })
        })
        .collect();
    json!({ "nodes": nodes })
}

//! `vimg why`

use serde_json::json;

use super::caching::CacheArgs;
use super::global::Global;
use super::output::{Outcome, print, print_json};
use super::project;
use crate::digest::FieldKind;
use crate::plan::{Reason, Step};
use crate::report::Style;

/// Explain why a node would be built, and what its key depends on
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// An image, or one of its layers
    #[arg(value_name = "IMAGE[@LAYER]")]
    node: String,
    #[command(flatten)]
    cache: CacheArgs,
}

pub(super) fn run(args: &Args, global: &Global, style: Style) -> Outcome {
    let mut loaded = project::load(global, &project::structure([&args.node]))?;
    let graph = project::graph(&mut loaded)?;
    let id = project::node(&graph, &args.node)?;
    let last = loaded.last();
    loaded.tell_open(style);
    let plan = super::plan::previewed(&args.cache, &graph, &loaded, &last, &[id], style)?;
    project::keep_stamps(&loaded.notes, loaded.project);
    let node = graph.node(id);
    if style.json {
        let step = plan.steps.get(&id);
        return print_json(&json!({
            "node": node.name,
            "key": node.key,
            "reason": match step {
                Some(Step::Build(reason)) => Some(reason.to_string()),
                _ => None,
            },
            "changes": match step {
                Some(Step::Build(Reason::Changed(changes) | Reason::Cached(changes))) => changes.iter().map(|c| c.text.clone()).collect(),
                _ => Vec::new(),
            },
            "description": node.description,
        }));
    }
    let mut out = String::new();
    for id in graph.chain(id) {
        let name = &graph.node(id).name;
        match plan.steps.get(&id) {
            Some(Step::Build(Reason::Changed(changes))) => {
                out.push_str(&format!("build  {name}\n"));
                for change in changes {
                    out.push_str(&format!("         {}\n", change.text));
                }
            }
            Some(Step::Build(Reason::Cached(changes))) => {
                out.push_str(&format!("build  {name}: differs from the cached one in:\n"));
                for change in changes {
                    out.push_str(&format!("         {}\n", change.text));
                }
            }
            Some(Step::Fetch(cache)) => out.push_str(&format!("fetch  {name}: from {cache}\n")),
            Some(Step::Build(reason)) => out.push_str(&format!("build  {name}: {reason}\n")),
            Some(Step::Reuse) => out.push_str(&format!("reuse  {name}\n")),
            None => out.push_str(&format!("       {name}: not needed\n")),
        }
    }
    out.push_str(&format!("\nthe key of {}, {}, comes from:\n", node.name, node.key.short()));
    for field in &node.description.fields {
        let value = match field.kind {
            FieldKind::Content => field.value.chars().take(12).collect(),
            _ => field.value.clone(),
        };
        let note = if field.kind == FieldKind::Note { "  (not in the key)" } else { "" };
        let name = crate::event::plain(&field.name);
        let value =
            if value.is_empty() { String::new() } else { format!(": {}", crate::event::plain(&value)) };
        out.push_str(&format!("  {name}{value}{note}\n"));
    }
    print(&out)
}

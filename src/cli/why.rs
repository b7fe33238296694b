//! `vimg why`

use serde_json::json;

use super::{Global, Outcome, print, print_json, project};
use crate::digest::FieldKind;
use crate::plan::{Plan, Reason, Step};
use crate::report::Style;

/// Explain a node: why it would be built, and what its key depends on
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// An image, or one of its layers
    #[arg(value_name = "IMAGE[@LAYER]")]
    node: String,
}

pub(super) fn run(args: &Args, global: &Global, style: Style) -> Outcome {
    let mut loaded = project::load(global)?;
    let graph = project::graph(&mut loaded)?;
    let id = project::node(&graph, &args.node)?;
    let last = loaded.last();
    let plan = Plan::new(&graph, &loaded.store, &last, &[id]);
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
                Some(Step::Build(Reason::Changed(changes))) => changes.iter().map(|c| c.text.clone()).collect(),
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
            Some(Step::Build(reason)) => out.push_str(&format!("build  {name}: {reason}\n")),
            _ => out.push_str(&format!("reuse  {name}\n")),
        }
    }
    out.push_str(&format!("\nthe key of {}, {}, comes from:\n", node.name, node.key.short()));
    for field in &node.description.fields {
        let value = match field.kind {
            FieldKind::Content => field.value.chars().take(12).collect(),
            _ => field.value.clone(),
        };
        let note = if field.kind == FieldKind::Note { "  (not in the key)" } else { "" };
        let name = crate::plan::plain(&field.name);
        let value =
            if value.is_empty() { String::new() } else { format!(": {}", crate::plan::plain(&value)) };
        out.push_str(&format!("  {name}{value}{note}\n"));
    }
    print(&out)
}

//! The graph as text, for people and for programs.

use std::fmt::Write;

use serde_json::json;

use super::dag::Graph;
use super::node::NodeId;

/// A format for a graph.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// A tree of text.
    Text,
    /// Graphviz.
    Dot,
    /// Mermaid.
    Mermaid,
    /// JSON: a list of nodes.
    Json,
}

/// Formats a graph.
pub fn show(graph: &Graph, format: Format) -> String {
    match format {
        Format::Text => text(graph),
        Format::Dot => dot(graph),
        Format::Mermaid => mermaid(graph),
        Format::Json => json(graph),
    }
}

fn edges(graph: &Graph) -> impl Iterator<Item = (NodeId, NodeId)> {
    graph.ids().flat_map(|id| graph.node(id).inputs().map(move |input| (input, id)))
}

fn text(graph: &Graph) -> String {
    let mut out = String::new();
    // A stack, not a recursion: images may be thousands of layers deep.
    let mut stack: Vec<(NodeId, String, String)> = Vec::new();
    for root in
        graph.ids().filter(|id| graph.node(*id).parent().is_none()).collect::<Vec<_>>().into_iter().rev()
    {
        stack.push((root, String::new(), String::new()));
    }
    while let Some((id, lead, rest)) = stack.pop() {
        let node = graph.node(id);
        let _ = writeln!(out, "{lead}{}  {}", node.name, node.key.short());
        // A node with several inputs stands below its parent only.
        let mut children = graph.children(id);
        children.retain(|child| graph.node(*child).parent() == Some(id));
        // A single child is not indented, so that a long chain does not move to
        // the right.
        if let [only] = children.as_slice() {
            stack.push((*only, rest.clone(), rest));
            continue;
        }
        // Deeper lines would be all indent.
        let deep = rest.chars().count() >= 3 * 20;
        for (n, child) in children.iter().enumerate().rev() {
            if deep {
                stack.push((*child, rest.clone(), rest.clone()));
                continue;
            }
            let last = n + 1 == children.len();
            let (branch, below) = if last { ("└─ ", "   ") } else { ("├─ ", "│  ") };
            stack.push((*child, format!("{rest}{branch}"), format!("{rest}{below}")));
        }
    }
    out
}

fn dot(graph: &Graph) -> String {
    let mut out = "digraph vimg {\n    rankdir=LR;\n    node [shape=box];\n".to_owned();
    for id in graph.ids() {
        let node = graph.node(id);
        let _ = writeln!(out, "    n{} [label=\"{}\\n{}\"];", id.0, node.name, node.key.short());
    }
    for (from, to) in edges(graph) {
        let _ = writeln!(out, "    n{} -> n{};", from.0, to.0);
    }
    out.push_str("}\n");
    out
}

fn mermaid(graph: &Graph) -> String {
    let mut out = "graph LR\n".to_owned();
    for id in graph.ids() {
        let _ = writeln!(out, "    n{}[\"{}\"]", id.0, graph.node(id).name);
    }
    for (from, to) in edges(graph) {
        let _ = writeln!(out, "    n{} --> n{}", from.0, to.0);
    }
    out
}

fn json(graph: &Graph) -> String {
    let nodes: Vec<_> = graph
        .ids()
        .map(|id| {
            let node = graph.node(id);
            json!({
                "name": node.name,
                "kind": node.work.kind(),
                "image": node.image,
                "key": node.key,
                "parent": node.parent().map(|p| graph.node(p).name.clone()),
            })
        })
        .collect();
    let mut out = serde_json::to_string_pretty(&json!({ "nodes": nodes })).unwrap_or_default();
    out.push('\n');
    out
}

//! A graph of nodes as a tree of text, for Graphviz and for Mermaid.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::text::{Paint, bytes, duration};

/// A node as it is drawn.
#[derive(Debug, Clone, PartialEq)]
pub struct Drawn {
    /// Its name.
    pub name: String,
    /// The image that declares it.
    pub image: String,
    /// Whether it is a check.
    pub is_check: bool,
    /// Whether it exists.
    pub status: Status,
    /// Its size on disk, in bytes, if it exists.
    pub bytes: Option<u64>,
    /// How long its build took, in seconds, if it exists.
    pub seconds: Option<f64>,
    /// The index of the node below; earlier than its own.
    pub parent: Option<usize>,
    /// The indices of all nodes that it is made from.
    pub inputs: Vec<usize>,
}

/// Whether the state of a node exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Status {
    /// It was built here.
    Stored,
    /// It came from a cache.
    Fetched,
    /// A build would build it.
    ToBuild,
    /// A build would build it, and its last build failed.
    Failed,
}

impl Status {
    /// Returns its name.
    pub fn word(self) -> &'static str {
        match self {
            Self::Stored => "stored",
            Self::Fetched => "fetched",
            Self::ToBuild => "to build",
            Self::Failed => "failed",
        }
    }

    /// Its sign in a tree.
    fn sign(self) -> &'static str {
        match self {
            Self::Stored | Self::Fetched => "●",
            Self::ToBuild => "○",
            Self::Failed => "✗",
        }
    }

    fn painted(self, paint: &Paint, text: &str) -> String {
        match self {
            Self::Stored => paint.green(text),
            Self::Fetched => paint.cyan(text),
            Self::ToBuild => paint.yellow(text),
            Self::Failed => paint.red(text),
        }
    }

    /// The colour of its box, light enough for black text.
    fn fill(self) -> &'static str {
        match self {
            Self::Stored => "#c8e6c9",
            Self::Fetched => "#b3e5fc",
            Self::ToBuild => "#fff3c4",
            Self::Failed => "#ffcdd2",
        }
    }

    const ALL: [Self; 4] = [Self::Stored, Self::Fetched, Self::ToBuild, Self::Failed];
}

impl Drawn {
    /// Returns its size and time, as far as they are known.
    fn facts(&self) -> Vec<String> {
        let size = self.bytes.filter(|_| !self.is_check).map(bytes);
        size.into_iter().chain(self.seconds.map(duration)).collect()
    }
}

/// Widest column of names in a tree, in columns.
const NAMES: usize = 44;
/// Deepest indent. Deeper lines would be all indent.
const DEEP: usize = 2 * 12;

/// A line of a tree: the lines and the sign before it, and its texts.
struct Line {
    /// Whether an empty line separates it from what is above.
    apart: bool,
    lead: String,
    name: String,
    status: Status,
    size: String,
    time: String,
}

/// Draws a tree. A chain is a column; what branches off stands to the right of
/// it. Several checks of one image are one line.
pub fn tree(nodes: &[Drawn], colour: bool) -> String {
    let mut children: Vec<Vec<usize>> = vec![Vec::new(); nodes.len()];
    let mut roots = Vec::new();
    for (n, node) in nodes.iter().enumerate() {
        match node.parent {
            Some(parent) => children[parent].push(n),
            None => roots.push(n),
        }
    }
    let mut lines = Vec::new();
    // A stack, not a recursion: images may be thousands of layers deep.
    let mut stack: Vec<(Vec<usize>, String, String)> =
        roots.into_iter().rev().map(|root| (vec![root], String::new(), String::new())).collect();
    while let Some((group, lead, rest)) = stack.pop() {
        let is_root = nodes[group[0]].parent.is_none();
        lines.push(Line { apart: is_root && !lines.is_empty(), ..line(nodes, &group, lead) });
        let groups = match group.as_slice() {
            [only] => grouped(nodes, &children[*only]),
            _ => continue,
        };
        let deep = rest.chars().count() >= DEEP;
        let last = groups.len().saturating_sub(1);
        for (n, group) in groups.into_iter().enumerate().rev() {
            let (branch, below) = match n {
                // The last child continues the column.
                n if n == last => ("", ""),
                _ if deep => ("", ""),
                _ => ("├─", "│ "),
            };
            stack.push((group, format!("{rest}{branch}"), format!("{rest}{below}")));
        }
    }
    rows(&lines, &Paint(colour))
}

/// Puts the checks of one image together, and before what is built on the
/// image.
fn grouped(nodes: &[Drawn], children: &[usize]) -> Vec<Vec<usize>> {
    let (checks, others): (Vec<usize>, Vec<usize>) = children.iter().partition(|n| nodes[**n].is_check);
    let mut of: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    for check in checks {
        of.entry(&nodes[check].image).or_default().push(check);
    }
    of.into_values().chain(others.into_iter().map(|n| vec![n])).collect()
}

fn line(nodes: &[Drawn], group: &[usize], lead: String) -> Line {
    let first = &nodes[group[0]];
    if let [only] = group {
        let node = &nodes[*only];
        let size = node.bytes.filter(|_| !node.is_check).map(bytes).unwrap_or_default();
        let time = node.seconds.map(duration).unwrap_or_default();
        return Line { apart: false, lead, name: node.name.clone(), status: node.status, size, time };
    }
    let status = group.iter().map(|n| nodes[*n].status).max().unwrap_or(first.status);
    let seconds: Vec<f64> = group.iter().filter_map(|n| nodes[*n].seconds).collect();
    let time = if seconds.is_empty() { String::new() } else { duration(seconds.iter().sum()) };
    let name = format!("{}: {} checks", first.image, group.len());
    Line { apart: false, lead, name, status, size: String::new(), time }
}

fn rows(lines: &[Line], paint: &Paint) -> String {
    let width = |line: &Line| line.lead.chars().count() + 2 + line.name.chars().count();
    let names = lines.iter().map(width).max().unwrap_or(0).min(NAMES);
    let mut out = String::new();
    for line in lines {
        if line.apart {
            out.push('\n');
        }
        let gap = " ".repeat(names.saturating_sub(width(line)));
        let (sign, word) = (line.status.sign(), line.status.word());
        let sign = line.status.painted(paint, sign);
        let facts = format!("  {:>8}  {:>11}", line.size, line.time);
        let facts = facts.trim_end();
        let word = if facts.is_empty() { word.to_owned() } else { format!("{word:8}") };
        let word = line.status.painted(paint, &word);
        let _ = writeln!(out, "{}{sign} {}{gap}  {word}{facts}", paint.dim(&line.lead), line.name);
    }
    out
}

/// Groups nodes by image, in the order of their first nodes.
fn by_image(nodes: &[Drawn]) -> Vec<(&str, Vec<usize>)> {
    let mut images: Vec<(&str, Vec<usize>)> = Vec::new();
    for (n, node) in nodes.iter().enumerate() {
        match images.iter_mut().find(|(image, _)| *image == node.image) {
            Some((_, own)) => own.push(n),
            None => images.push((&node.image, vec![n])),
        }
    }
    images
}

fn edges(nodes: &[Drawn]) -> impl Iterator<Item = (usize, usize)> {
    nodes.iter().enumerate().flat_map(|(n, node)| node.inputs.iter().map(move |input| (*input, n)))
}

/// Draws a graph for Graphviz, with a cluster for each image.
pub fn dot(nodes: &[Drawn]) -> String {
    let quoted = |text: &str| text.replace('\\', "\\\\").replace('"', "\\\"");
    let mut out = "digraph vimg {\n    rankdir=LR;\n    \
                   node [shape=box, style=\"rounded,filled\", fontname=\"sans-serif\"];\n"
        .to_owned();
    for (cluster, (image, own)) in by_image(nodes).into_iter().enumerate() {
        let _ = writeln!(out, "    subgraph cluster_{cluster} {{\n        label=\"{}\";", quoted(image));
        for n in own {
            let node = &nodes[n];
            let facts = std::iter::once(node.status.word().to_owned()).chain(node.facts());
            let facts = facts.collect::<Vec<_>>().join(", ");
            let (name, fill) = (quoted(&node.name), node.status.fill());
            let _ = writeln!(out, "        n{n} [label=\"{name}\\n{facts}\", fillcolor=\"{fill}\"];");
        }
        out.push_str("    }\n");
    }
    for (from, to) in edges(nodes) {
        let _ = writeln!(out, "    n{from} -> n{to};");
    }
    out.push_str("}\n");
    out
}

/// Draws a graph for Mermaid, with a subgraph for each image.
pub fn mermaid(nodes: &[Drawn]) -> String {
    let quoted = |text: &str| text.replace('"', "#quot;");
    let class = |status: Status| status.word().replace(' ', "-");
    let mut out = "graph LR\n".to_owned();
    for (cluster, (image, own)) in by_image(nodes).into_iter().enumerate() {
        let _ = writeln!(out, "    subgraph s{cluster}[\"{}\"]", quoted(image));
        for n in own {
            let node = &nodes[n];
            let facts = std::iter::once(node.status.word().to_owned()).chain(node.facts());
            let facts = facts.collect::<Vec<_>>().join(", ");
            let _ = writeln!(
                out,
                "        n{n}[\"{}<br/>{facts}\"]:::{}",
                quoted(&node.name),
                class(node.status)
            );
        }
        out.push_str("    end\n");
    }
    for (from, to) in edges(nodes) {
        let _ = writeln!(out, "    n{from} --> n{to}");
    }
    for status in Status::ALL {
        let _ = writeln!(out, "    classDef {} fill:{},color:#000", class(status), status.fill());
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Makes nodes from their names, images, parents and statuses.
    fn nodes(all: &[(&str, &str, Option<usize>, Status)]) -> Vec<Drawn> {
        let node = |(name, image, parent, status): &(&str, &str, Option<usize>, Status)| Drawn {
            name: (*name).into(),
            image: (*image).into(),
            is_check: name.contains("check"),
            status: *status,
            bytes: (*status == Status::Stored).then_some(14 << 20),
            seconds: (*status == Status::Stored).then_some(75.5),
            parent: *parent,
            inputs: parent.iter().copied().collect(),
        };
        all.iter().map(node).collect()
    }

    fn example() -> Vec<Drawn> {
        nodes(&[
            ("base:base", "base", None, Status::Stored),
            ("web@nginx", "web", Some(0), Status::Stored),
            ("web@site", "web", Some(1), Status::ToBuild),
            ("web:check/a", "web", Some(2), Status::ToBuild),
            ("web:check/b", "web", Some(2), Status::Failed),
            ("web:seal", "web", Some(2), Status::ToBuild),
            ("db@\"x\"", "db", Some(0), Status::Fetched),
        ])
    }

    #[test]
    fn chains_are_columns_and_branches_have_lines() {
        let text = tree(&example(), false);
        let expected = "\
● base:base          stored      14 MiB   1 min 16 s
├─● web@nginx        stored      14 MiB   1 min 16 s
│ ○ web@site         to build
│ ├─✗ web: 2 checks  failed
│ ○ web:seal         to build
● db@\"x\"             fetched
";
        assert_eq!(text, expected);
        assert!(text.lines().all(|line| line.chars().count() <= 80));
        let coloured = tree(&example(), true);
        assert!(coloured.contains("\u{1b}[31mfailed\u{1b}[0m"), "{coloured}");
    }

    #[test]
    fn a_deep_tree_stays_narrow() {
        let mut all = nodes(&[("base:base", "base", None, Status::Stored)]);
        for n in 0..3000 {
            let chain = ("x@y", "x", Some(if n == 0 { 0 } else { all.len() - 2 }), Status::ToBuild);
            let branch = ("x:check", "x", chain.2, Status::Stored);
            all.extend(nodes(&[branch, chain]));
        }
        let widest = tree(&all, false).lines().map(|line| line.chars().count()).max();
        assert!(widest <= Some(80), "{widest:?}");
    }

    #[test]
    fn programs_get_clusters_and_quoted_names() {
        let dot = dot(&example());
        assert!(dot.contains("subgraph cluster_1 {\n        label=\"web\";"), "{dot}");
        assert!(dot.contains("label=\"db@\\\"x\\\"\\nfetched\""), "{dot}");
        assert!(dot.contains("n0 [label=\"base:base\\nstored, 14 MiB, 1 min 16 s\", fillcolor"), "{dot}");
        assert!(dot.contains("n2 -> n5;"), "{dot}");
        let mermaid = mermaid(&example());
        assert!(mermaid.contains("n6[\"db@#quot;x#quot;<br/>fetched\"]:::fetched"), "{mermaid}");
        assert!(mermaid.contains("subgraph s1[\"web\"]") && mermaid.contains("n2 --> n5"), "{mermaid}");
        assert!(mermaid.contains("classDef to-build fill:"), "{mermaid}");
    }
}

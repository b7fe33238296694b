//! Decides which nodes are built and which are reused, and why.

use std::collections::{BTreeMap, BTreeSet};

use crate::digest::{Description, Field, FieldKind, Key};
use crate::event::plain;
use crate::graph::{Graph, NodeId};
use crate::store::{Last, Store};

/// What happens to a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Its state is in the store.
    Reuse,
    /// A cache has it; the cache's label.
    Fetch(String),
    /// It must be built.
    Build(Reason),
}

/// Why a node must be built.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reason {
    /// This project has not built a node of this name.
    New,
    /// Fields of its description differ from those it was last built with.
    Changed(Vec<Change>),
    /// Only the state below changes. If its new build is identical to the old
    /// one, this node is reused (early cutoff).
    Parent(String),
    /// Nothing changed, but the state is no longer in the store.
    Missing,
    /// It was never built here. A cache has a node of this name, and these
    /// fields of its description differ.
    Cached(Vec<Change>),
}

/// A difference between two descriptions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// The difference, for example `input port: 80 -> 8080`.
    pub text: String,
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::New => f.write_str("never built here"),
            Self::Missing => f.write_str("no longer in the store"),
            Self::Parent(name) => write!(f, "parent {name} rebuilt"),
            Self::Changed(changes) | Self::Cached(changes) => {
                if matches!(self, Self::Cached(_)) {
                    f.write_str("differs from the cached one in: ")?;
                }
                let shown: Vec<&str> = changes.iter().take(3).map(|c| c.text.as_str()).collect();
                f.write_str(&shown.join(", "))?;
                match changes.len().saturating_sub(3) {
                    0 => Ok(()),
                    more => write!(f, " and {more} more"),
                }
            }
        }
    }
}

/// The steps for the requested nodes and all nodes below them.
#[derive(Debug, Default)]
pub struct Plan {
    /// The steps; nodes below come first.
    pub steps: BTreeMap<NodeId, Step>,
}

impl Plan {
    /// Plans the wanted nodes. States that are complete in `last` are not
    /// examined again; nodes in `cached` need not be built. Nothing is needed
    /// below an existing state; the plan lists what exists there as well.
    pub fn new(
        graph: &Graph,
        store: &Store,
        last: &Last,
        cached: &BTreeMap<Key, String>,
        wanted: &[NodeId],
    ) -> Self {
        let mut steps: BTreeMap<NodeId, Step> = BTreeMap::new();
        let mut known = last.complete.clone();
        // Ids grow upwards, so children are settled before their parents.
        let mut asked: BTreeMap<NodeId, bool> = wanted.iter().map(|id| (*id, true)).collect();
        while let Some((id, needed)) = asked.pop_last() {
            let node = graph.node(id);
            let step = if store.complete(&node.key, &mut known).is_some() {
                Some(Step::Reuse)
            } else if !needed {
                None
            } else if let Some(cache) = cached.get(&node.key) {
                Some(Step::Fetch(cache.clone()))
            } else {
                // The reason is added when it is known what is built below.
                Some(Step::Build(Reason::New))
            };
            for input in node.inputs() {
                *asked.entry(input).or_default() |= matches!(step, Some(Step::Build(_)));
            }
            steps.extend(step.map(|step| (id, step)));
        }
        let build: Vec<NodeId> =
            steps.iter().filter(|(_, s)| matches!(s, Step::Build(_))).map(|(id, _)| *id).collect();
        for id in build {
            let is_built = |input: &NodeId| matches!(steps.get(input), Some(Step::Build(_)));
            let built = graph.node(id).inputs().find(is_built);
            steps.insert(id, Step::Build(reason(graph, store, last, id, built)));
        }
        Self { steps }
    }

    /// Explains nodes that were never built here, by comparing them with those
    /// in a cache.
    pub fn explain(&mut self, graph: &Graph, previous: &BTreeMap<String, Description>) {
        for (id, step) in &mut self.steps {
            let node = graph.node(*id);
            let Step::Build(reason @ (Reason::New | Reason::Parent(_))) = step else { continue };
            let Some(before) = previous.get(&node.name) else { continue };
            let changes = changes(before, &node.description);
            match node.parent() {
                _ if !changes.is_empty() => *reason = Reason::Cached(changes),
                Some(parent) => *reason = Reason::Parent(graph.node(parent).name.clone()),
                None => {}
            }
        }
    }

    /// Lists the nodes to build, those below first.
    pub fn to_build(&self) -> impl Iterator<Item = (NodeId, &Reason)> {
        self.steps.iter().filter_map(|(id, step)| match step {
            Step::Build(reason) => Some((*id, reason)),
            Step::Reuse | Step::Fetch(_) => None,
        })
    }

    /// Returns the number of nodes that are reused.
    pub fn reused(&self) -> usize {
        self.steps.values().filter(|s| **s == Step::Reuse).count()
    }
}

/// Says why a node is built. `built` is an input of it that is built as well.
fn reason(graph: &Graph, store: &Store, last: &Last, id: NodeId, built: Option<NodeId>) -> Reason {
    let node = graph.node(id);
    let Some(key) = last.nodes.get(&node.name) else { return Reason::New };
    if *key == node.key {
        return built.map_or(Reason::Missing, |input| Reason::Parent(graph.node(input).name.clone()));
    }
    let Some(record) = store.record(key) else {
        // Its last description differed, and is gone.
        return Reason::Changed(vec![Change { text: "changed since it was last built".into() }]);
    };
    let changes = changes(&record.description, &node.description);
    match built.or(node.parent()) {
        Some(parent) if changes.is_empty() => Reason::Parent(graph.node(parent).name.clone()),
        _ if changes.is_empty() => Reason::Missing,
        _ => Reason::Changed(changes),
    }
}

/// Compares two descriptions; causes come before effects. The parent is left
/// out: it has its own reasons.
pub fn changes(old: &Description, new: &Description) -> Vec<Change> {
    let (before, after) = (by_name(old), by_name(new));
    let mut notes = Vec::new();
    let mut found = Vec::new();
    let names: BTreeSet<&str> = before.keys().chain(after.keys()).copied().collect();
    for name in names {
        let empty = Vec::new();
        let (was, now) = (before.get(name).unwrap_or(&empty), after.get(name).unwrap_or(&empty));
        // The same name may occur several times, as in two `run`s. Equal values
        // are removed first, and the rest is compared in order.
        let mut gone: Vec<&Field> = was.clone();
        let come: Vec<&Field> = now
            .iter()
            .filter(|field| match gone.iter().position(|g| g.value == field.value) {
                Some(at) => {
                    gone.remove(at);
                    false
                }
                None => true,
            })
            .copied()
            .collect();
        for n in 0..gone.len().max(come.len()) {
            let (text, kind) = difference(name, gone.get(n).copied(), come.get(n).copied());
            let list = if kind == FieldKind::Note { &mut notes } else { &mut found };
            list.push(Change { text });
        }
    }
    if found.is_empty() {
        let order =
            |d: &Description| d.own().filter(|f| f.kind != FieldKind::Note).cloned().collect::<Vec<_>>();
        // Notes alone are no reason, because they are not part of the key.
        return if order(old) == order(new) {
            Vec::new()
        } else {
            vec![Change { text: "order of its steps changed".into() }]
        };
    }
    notes.extend(found);
    notes
}

fn by_name(description: &Description) -> BTreeMap<&str, Vec<&Field>> {
    let mut map: BTreeMap<&str, Vec<&Field>> = BTreeMap::new();
    for field in description.own() {
        map.entry(&field.name).or_default().push(field);
    }
    map
}

fn difference(name: &str, was: Option<&Field>, now: Option<&Field>) -> (String, FieldKind) {
    let kind = now.or(was).map_or(FieldKind::Value, |f| f.kind);
    let name = plain(name);
    let with = |field: &Field| match field.kind {
        FieldKind::Content => name.clone(),
        _ if field.value.is_empty() => name.clone(),
        _ => format!("{name} {}", brief(&field.value)),
    };
    let text = match (was, now) {
        (Some(was), Some(now)) if name == "package" || name == "packages" => words(&was.value, &now.value),
        (Some(was), Some(now)) if was.kind != FieldKind::Content && now.kind != FieldKind::Content => {
            format!("{name}: {} -> {}", brief(&was.value), brief(&now.value))
        }
        (None, Some(now)) => format!("{} added", with(now)),
        (Some(was), None) => format!("{} removed", with(was)),
        _ => format!("{name} changed"),
    };
    (text, kind)
}

/// Describes added and removed packages.
fn words(was: &str, now: &str) -> String {
    let set = |text: &str| text.split(' ').map(str::to_owned).collect::<BTreeSet<_>>();
    let (was, now) = (set(was), set(now));
    let list = |set: Vec<&String>| set.into_iter().map(String::as_str).collect::<Vec<_>>().join(" ");
    let (come, gone) = (list(now.difference(&was).collect()), list(was.difference(&now).collect()));
    match (come.is_empty(), gone.is_empty()) {
        (false, false) => format!("package {} added, {} removed", brief(&come), brief(&gone)),
        (false, true) => format!("package {} added", brief(&come)),
        _ => format!("package {} removed", brief(&gone)),
    }
}

/// Shortens a value to fit in a line.
fn brief(value: &str) -> String {
    let value = plain(value);
    if value.is_empty() {
        return "nothing".into();
    }
    if value.chars().count() <= 40 {
        return value;
    }
    let start: String = value.chars().take(37).collect();
    format!("{start}...")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(old: &Description, new: &Description) -> Vec<String> {
        changes(old, new).into_iter().map(|c| c.text).collect()
    }

    #[test]
    fn causes_come_before_effects() {
        let mut old = Description::default();
        old.note("input port", 80);
        old.content("content of file /x", "a");
        old.value("package", "a");
        let mut new = Description::default();
        new.note("input port", 8080);
        new.content("content of file /x", "b");
        new.value("package", "a b");
        new.content("file site/a.css", "c");
        assert_eq!(
            texts(&old, &new),
            [
                "input port: 80 -> 8080",
                "content of file /x changed",
                "file site/a.css added",
                "package b added"
            ]
        );
    }

    #[test]
    fn equal_values_of_one_name_are_no_change() {
        let description = |scripts: &[&str]| {
            let mut d = Description::default();
            for script in scripts {
                d.content("content of script", script);
            }
            d
        };
        assert_eq!(texts(&description(&["a", "b"]), &description(&["b"])), ["content of script removed"]);
        assert_eq!(
            texts(&description(&["a", "b"]), &description(&["b", "a"])),
            ["order of its steps changed"]
        );
        let mut escape = Description::default();
        escape.value("symlink /a", "\u{1b}[2J");
        assert_eq!(texts(&Description::default(), &escape), ["symlink /a \\u{1b}[2J added"]);
    }

    #[test]
    fn notes_alone_are_no_reason_and_order_is() {
        let mut old = Description::default();
        old.note("input port", 80);
        old.value("a", 1);
        old.value("b", 1);
        let mut new = Description::default();
        new.note("input port", 81);
        new.value("a", 1);
        new.value("b", 1);
        assert!(texts(&old, &new).is_empty());
        new.fields.swap(1, 2);
        assert_eq!(texts(&old, &new), ["order of its steps changed"]);
    }
}

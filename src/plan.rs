//! Which nodes are there, which must be built, and why. Reads the store and
//! never writes it.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use crate::digest::{Description, Field, FieldKind, Key};
use crate::graph::{Graph, NodeId};
use crate::store::Store;

/// What happens to a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Its state is there.
    Reuse,
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
    /// Only the state below is another one. Once states carry a digest of
    /// their files this node may turn out to be there already.
    Parent(String),
    /// Nothing changed, but the state is not in the store any more.
    Missing,
}

/// A difference between two descriptions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// What differs, as people say it: `input port: 80 -> 8080`.
    pub text: String,
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::New => f.write_str("never built here"),
            Self::Missing => f.write_str("no longer in the store"),
            Self::Parent(name) => write!(f, "parent {name} rebuilt"),
            Self::Changed(changes) => {
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

/// What is to be done, for the nodes that were asked for and all below them.
#[derive(Debug)]
pub struct Plan {
    /// The steps; nodes below come first.
    pub steps: BTreeMap<NodeId, Step>,
}

impl Plan {
    /// Plans the given nodes.
    pub fn new(graph: &Graph, store: &Store, last: &BTreeMap<String, Key>, wanted: &[NodeId]) -> Self {
        let mut needed: BTreeSet<NodeId> = BTreeSet::new();
        for id in wanted {
            let mut next = Some(*id);
            while let Some(id) = next
                && needed.insert(id)
            {
                next = graph.node(id).parent;
            }
        }
        let mut steps: BTreeMap<NodeId, Step> = BTreeMap::new();
        let mut present: HashMap<Key, bool> = HashMap::new();
        // Ids grow upwards, so a parent is always planned before its children.
        for id in needed {
            let node = graph.node(id);
            let parent = node.parent.map(|p| (p, steps.get(&p)));
            let below = parent.is_none_or(|(_, step)| step == Some(&Step::Reuse));
            let there = *present.entry(node.key).or_insert_with(|| store.has(&node.key));
            // A state without what lies below it can't be used.
            let step = if there && below { Step::Reuse } else { Step::Build(reason(graph, store, last, id)) };
            steps.insert(id, step);
        }
        Self { steps }
    }

    /// The nodes to build, those below first.
    pub fn to_build(&self) -> impl Iterator<Item = (NodeId, &Reason)> {
        self.steps.iter().filter_map(|(id, step)| match step {
            Step::Build(reason) => Some((*id, reason)),
            Step::Reuse => None,
        })
    }

    /// How many nodes are there already.
    pub fn reused(&self) -> usize {
        self.steps.values().filter(|s| **s == Step::Reuse).count()
    }
}

fn reason(graph: &Graph, store: &Store, last: &BTreeMap<String, Key>, id: NodeId) -> Reason {
    let node = graph.node(id);
    let Some(key) = last.get(&node.name) else { return Reason::New };
    if *key == node.key {
        return Reason::Missing;
    }
    let Some(record) = store.record(key) else {
        // It was built with another description, which is gone.
        return Reason::Changed(vec![Change { text: "changed since it was last built".into() }]);
    };
    let changes = changes(&record.description, &node.description);
    match node.parent {
        Some(parent) if changes.is_empty() => Reason::Parent(graph.node(parent).name.clone()),
        _ if changes.is_empty() => Reason::Missing,
        _ => Reason::Changed(changes),
    }
}

/// What differs between two descriptions, causes before effects. The parent
/// is left out: it has reasons of its own.
pub fn changes(old: &Description, new: &Description) -> Vec<Change> {
    let index = |d: &Description| {
        let mut map: BTreeMap<(String, usize), Field> = BTreeMap::new();
        let mut count: HashMap<String, usize> = HashMap::new();
        for field in d.fields.iter().filter(|f| f.name != "parent") {
            // The same name may stand several times, as in two `run`s.
            let n = count.entry(field.name.clone()).or_default();
            map.insert((field.name.clone(), *n), field.clone());
            *n += 1;
        }
        map
    };
    let (before, after) = (index(old), index(new));
    let mut notes = Vec::new();
    let mut found = Vec::new();
    for (place, field) in &after {
        let text = match before.get(place) {
            Some(was) if was.value == field.value => continue,
            Some(was) if field.kind == FieldKind::Content || was.kind == FieldKind::Content => {
                format!("{} changed", field.name)
            }
            Some(was) => format!("{}: {} -> {}", field.name, brief(&was.value), brief(&field.value)),
            None if field.kind == FieldKind::Content => format!("{} added", field.name),
            None => format!("{} {} added", field.name, brief(&field.value)),
        };
        let list = if field.kind == FieldKind::Note { &mut notes } else { &mut found };
        list.push(Change { text });
    }
    for (place, field) in before.iter().filter(|(place, _)| !after.contains_key(*place)) {
        let text = match field.kind {
            FieldKind::Content => format!("{} removed", place.0),
            _ => format!("{} {} removed", place.0, brief(&field.value)),
        };
        let list = if field.kind == FieldKind::Note { &mut notes } else { &mut found };
        list.push(Change { text });
    }
    if found.is_empty() {
        let order = |d: &Description| {
            d.fields
                .iter()
                .filter(|f| f.name != "parent" && f.kind != FieldKind::Note)
                .cloned()
                .collect::<Vec<_>>()
        };
        // Notes alone are no reason: the key does not know them.
        return if order(old) == order(new) {
            Vec::new()
        } else {
            vec![Change { text: "order of its steps changed".into() }]
        };
    }
    notes.extend(found);
    notes
}

fn brief(value: &str) -> String {
    if value.is_empty() {
        return "nothing".into();
    }
    if value.chars().count() <= 40 {
        return value.to_owned();
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
                "package: a -> a b"
            ]
        );
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

//! Digests, keys, and descriptions, of which keys are hashes.
//!
//! One walk over a node builds its description. The same list of fields is
//! hashed, and stored to explain the key later, so the two can't drift apart.

use std::collections::BTreeSet;
use std::fmt;

use serde::{Deserialize, Serialize};

pub use vimg_agent::protocol::{Blob, Digest};

/// Change it when the encoding of descriptions changes.
const DOMAIN: &str = "vimg 2026-11 node key v1";

/// The identity of a state: the hash of everything that it depends on.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Key(pub Digest);

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Key {
    /// Returns the first 12 digits, for people.
    pub fn short(&self) -> String {
        self.to_string()[..12].to_owned()
    }
}

/// The kind of a field.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FieldKind {
    /// A readable value, shown as `old -> new`.
    Value,
    /// A digest, shown as `changed`.
    Content,
    /// The key of the state below. A change of it is a reason of its own.
    Parent,
    /// Not part of the key. It only explains why other fields changed.
    Note,
}

/// One thing that a node depends on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Field {
    /// Its name, for instance `file site/index.html`.
    pub name: String,
    /// Its value.
    pub value: String,
    /// Whether it enters the key, and how it is shown.
    pub kind: FieldKind,
}

/// Facts of a node that other modules need. The calls that write the fields of
/// its description write these as well.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Facts {
    /// The key of the state below.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<Key>,
    /// Whether it needs the booted machine.
    #[serde(default)]
    pub booted: bool,
    /// The names of the secrets that its steps get.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub secrets: BTreeSet<String>,
    /// The architecture of a base.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub architecture: Option<String>,
}

/// Everything that a node depends on, in a fixed order.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Description {
    /// The fields.
    pub fields: Vec<Field>,
    /// What the program itself reads of them.
    pub facts: Facts,
}

impl Description {
    /// Adds a readable value.
    pub fn value(&mut self, name: impl Into<String>, value: impl fmt::Display) {
        self.push(name.into(), value.to_string(), FieldKind::Value);
    }

    /// Adds a digest.
    pub fn content(&mut self, name: impl Into<String>, value: impl fmt::Display) {
        self.push(name.into(), value.to_string(), FieldKind::Content);
    }

    /// Adds a note that explains other fields.
    pub fn note(&mut self, name: impl Into<String>, value: impl fmt::Display) {
        self.push(name.into(), value.to_string(), FieldKind::Note);
    }

    /// Adds the state below, or replaces its key. Returns whether that changed
    /// anything.
    pub fn parent(&mut self, key: Key) -> bool {
        if self.facts.parent.replace(key) == Some(key) {
            return false;
        }
        let value = key.to_string();
        match self.fields.iter_mut().find(|field| field.kind == FieldKind::Parent) {
            Some(field) => field.value = value,
            None => self.push("parent".into(), value, FieldKind::Parent),
        }
        true
    }

    /// Says that the node needs the booted machine.
    pub fn booted(&mut self) {
        self.facts.booted = true;
        self.value("needs", "booted");
    }

    /// Adds a secret that a step gets, and its version.
    pub fn secret(&mut self, name: &str, version: impl fmt::Display) {
        self.facts.secrets.insert(name.to_owned());
        self.value(format!("run secret {name}"), version);
    }

    /// Adds the architecture of a base.
    pub fn architecture(&mut self, name: &str) {
        self.facts.architecture = Some(name.to_owned());
        self.value("architecture", name);
    }

    /// Whether the facts are those of the fields. The facts of a description
    /// that came from elsewhere are not in its key.
    pub fn is_consistent(&self) -> bool {
        let mut again = Self::default();
        for Field { name, value, kind } in &self.fields {
            match (kind, name.as_str()) {
                (FieldKind::Parent, _) => match value.parse() {
                    Ok(digest) => drop(again.parent(Key(digest))),
                    Err(_) => return false,
                },
                (FieldKind::Value, "needs") => again.booted(),
                (FieldKind::Value, "architecture") => again.architecture(value),
                (FieldKind::Value, name) => {
                    if let Some(secret) = name.strip_prefix("run secret ") {
                        again.secret(secret, value);
                    }
                }
                (FieldKind::Content | FieldKind::Note, _) => {}
            }
        }
        again.facts == self.facts
    }

    /// Returns the fields but the key of the state below.
    pub fn own(&self) -> impl Iterator<Item = &Field> {
        self.fields.iter().filter(|field| field.kind != FieldKind::Parent)
    }

    fn push(&mut self, name: String, value: String, kind: FieldKind) {
        self.fields.push(Field { name, value, kind });
    }

    /// Computes the key from all fields but notes. Each name and value is
    /// hashed with its length, so that no two lists read the same.
    pub fn key(&self) -> Key {
        let mut hasher = blake3::Hasher::new_derive_key(DOMAIN);
        for field in self.fields.iter().filter(|f| f.kind != FieldKind::Note) {
            for text in [&field.name, &field.value] {
                hasher.update(&(text.len() as u64).to_le_bytes());
                hasher.update(text.as_bytes());
            }
        }
        Key(Digest(*hasher.finalize().as_bytes()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(fields: &[(&str, &str)]) -> Key {
        let mut description = Description::default();
        for (name, value) in fields {
            description.value(*name, value);
        }
        description.key()
    }

    #[test]
    fn fields_do_not_run_together() {
        assert_ne!(key(&[("a", "bc")]), key(&[("ab", "c")]));
        assert_ne!(key(&[("a", "b"), ("c", "d")]), key(&[("a", "bcd")]));
        assert_ne!(key(&[("a", "1"), ("b", "2")]), key(&[("b", "2"), ("a", "1")]));
    }

    #[test]
    fn facts_are_those_of_the_fields() {
        let mut description = Description::default();
        description.architecture("amd64");
        description.booted();
        description.secret("token", 1);
        assert!(description.parent(key(&[("a", "1")])) && !description.parent(key(&[("a", "1")])));
        assert!(description.parent(key(&[("a", "2")])));
        assert!(description.is_consistent() && description.own().count() == 3);
        assert_eq!(description.facts.parent, Some(key(&[("a", "2")])));
        let mut spoiled = description.clone();
        spoiled.facts.secrets.clear();
        assert!(!spoiled.is_consistent());
        description.facts.parent = None;
        assert!(!description.is_consistent());
    }

    #[test]
    fn notes_explain_and_do_not_count() {
        let mut with = Description::default();
        with.value("a", 1);
        with.note("input port", 80);
        assert_eq!(with.key(), key(&[("a", "1")]));
    }
}

//! Digests, keys, and descriptions, of which keys are hashes.
//!
//! One walk over a node builds its description. The same list of fields is
//! hashed, and stored to explain the key later, so the two can't drift apart.

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

/// Everything that a node depends on, in a fixed order.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Description {
    /// The fields.
    pub fields: Vec<Field>,
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

    /// Replaces the value of the last field with this name. Returns whether the
    /// value changed.
    pub fn replace(&mut self, name: &str, value: impl fmt::Display) -> bool {
        let value = value.to_string();
        match self.fields.iter_mut().rev().find(|f| f.name == name) {
            Some(field) if field.value != value => {
                field.value = value;
                true
            }
            _ => false,
        }
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
    fn notes_explain_and_do_not_count() {
        let mut with = Description::default();
        with.value("a", 1);
        with.note("input port", 80);
        assert_eq!(with.key(), key(&[("a", "1")]));
    }
}

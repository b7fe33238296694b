//! Digests, keys, and the description of a node from which its key comes.
//!
//! A description is built by one walk over a node. The same list of fields is
//! what is hashed and what is stored to explain the key later, so the two
//! can't drift apart.

use std::fmt;

use serde::{Deserialize, Serialize};

pub use vimg_agent::protocol::{Blob, Digest};

/// Changes when the encoding of descriptions does.
const DOMAIN: &str = "vimg 2026-11 node key v1";

/// The identity of a state: everything that determines it, hashed.
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
    /// The first digits, enough for people.
    pub fn short(&self) -> String {
        self.to_string()[..12].to_owned()
    }
}

/// What a field of a description says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FieldKind {
    /// A value that people can read: shown as `old -> new`.
    Value,
    /// A digest: shown as `changed`.
    Content,
    /// No part of the key. It only explains why other fields changed.
    Note,
}

/// One thing that a node depends on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Field {
    /// What it is, for instance `file site/index.html`.
    pub name: String,
    /// What it says.
    pub value: String,
    /// How it enters the key, and how it is shown.
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
    /// Adds a value that people can read.
    pub fn value(&mut self, name: impl Into<String>, value: impl fmt::Display) {
        self.push(name.into(), value.to_string(), FieldKind::Value);
    }

    /// Adds a digest.
    pub fn content(&mut self, name: impl Into<String>, value: impl fmt::Display) {
        self.push(name.into(), value.to_string(), FieldKind::Content);
    }

    /// Adds what explains other fields.
    pub fn note(&mut self, name: impl Into<String>, value: impl fmt::Display) {
        self.push(name.into(), value.to_string(), FieldKind::Note);
    }

    /// Gives the last field of a name another value, if it has another one.
    /// Says whether it had.
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

    /// The key: every field but the notes, each name and value with its
    /// length before it, so that no two lists read the same.
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

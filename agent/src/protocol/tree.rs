//! Trees of files: the lists that directories of the project become.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::blob::Blob;

/// A tree of files, sorted by path: a directory comes before its entries.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Its entries. The first one has an empty path and is the top directory.
    pub entries: Vec<Entry>,
}

/// One file of a tree.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Relative to the top, without `..`.
    pub path: String,
    /// Its kind and content.
    pub node: Node,
}

/// The kind and content of an entry of a tree.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Node {
    /// A directory with its permission bits.
    Dir(u32),
    /// A file with its permission bits, content and extended attributes, whose values are
    /// in hexadecimal.
    File(u32, Blob, BTreeMap<String, String>),
    /// A symbolic link with its target.
    Link(String),
}

//! A node: a state that is to be there, and what it takes to make it.

use std::collections::BTreeMap;
use std::sync::Arc;

use vimg_agent::protocol::{Primitive, Probe};
use vimg_lang::model::{Bootstrap, DiskFormat, Machine};
use vimg_lang::{FileRef, Span};

use crate::digest::{Description, Digest, Key};
use crate::files::FileError;

/// A node's place in a [`super::dag::Graph`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(pub(super) u32);

#[cfg(test)]
impl NodeId {
    /// For who needs any.
    pub(crate) fn of(number: u32) -> Self {
        Self(number)
    }
}

/// A vertex: a state that is to be there.
#[derive(Debug, Clone)]
pub struct Node {
    /// Unique in the graph: `image:base`, `image@layer`, `image:check/name`,
    /// `image:seal`, `image:qcow2`.
    pub name: String,
    /// The image that declares it.
    pub image: String,
    /// What it takes to make it.
    pub work: Work,
    /// The state it is made from.
    pub parent: Option<NodeId>,
    /// What must be there while it is made.
    pub needs: Needs,
    /// The machine that it is of.
    pub machine: Machine,
    /// Everything that enters its key.
    pub description: Description,
    /// Its key.
    pub key: Key,
    /// The key that those made from it know it by: its own, unless it is known
    /// to hold the same as a state that was there before.
    pub stands_for: Key,
    /// Where it is declared.
    pub span: Span,
}

/// What must be there while a state is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Needs {
    /// Nothing of the machine.
    Nothing,
    /// Its disk, with the machine switched off.
    Disk,
    /// The machine, booted.
    Machine,
}

/// What it takes to make a state.
#[derive(Debug, Clone)]
pub enum Work {
    /// A base disk from a distribution.
    Bootstrap(Bootstrap),
    /// A base disk from a file of the project.
    Import {
        /// The file.
        file: FileRef,
        /// Its SHA-256 in hexadecimal.
        sha256: String,
    },
    /// A configuration, applied.
    Layer(Arc<LayerWork>),
    /// Questions to the machine of the state below; what comes of it is no
    /// disk.
    Check(Arc<CheckWork>),
    /// The sealed form of the state below.
    Seal,
    /// The state below as one disk.
    Export(DiskFormat),
}

impl Work {
    /// Names it in records.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Bootstrap(_) | Self::Import { .. } => "base",
            Self::Layer(_) => "layer",
            Self::Check(_) => "check",
            Self::Seal => "seal",
            Self::Export(_) => "output",
        }
    }

    /// The parts of layers below that it takes back first, by their names in
    /// the machine.
    pub fn takes_back(&self) -> Vec<&str> {
        let Self::Layer(work) = self else { return Vec::new() };
        let mut taken = Vec::new();
        for step in &work.steps {
            if let Primitive::Revert { layer } = step {
                taken.push(layer.as_str());
            }
        }
        taken
    }
}

/// What the agent is to do, and where that is declared.
#[derive(Debug)]
pub struct LayerWork {
    /// Its name in the machine, unless its steps say so.
    pub layer: Option<String>,
    /// The steps.
    pub steps: Vec<Primitive>,
    /// A place and a name for each step.
    pub places: Vec<(Span, String)>,
    /// Where the blobs of the steps come from.
    pub blobs: BTreeMap<Digest, BlobSource>,
    /// Notes to print when the layer is built.
    pub notes: Vec<String>,
}

/// What the agent is to ask, and where that is declared.
#[derive(Debug)]
pub struct CheckWork {
    /// The questions.
    pub probes: Vec<Probe>,
    /// A place and a name for each.
    pub places: Vec<(Span, String)>,
    /// Whether a script of it may use the network.
    pub network: bool,
}

/// Where a blob comes from.
#[derive(Debug, Clone)]
pub enum BlobSource {
    /// Rendered text, or a list of files.
    Bytes(Arc<[u8]>),
    /// A file of the project.
    File(FileRef),
}

/// A file that can't be hashed, and where the recipe names it.
#[derive(Debug)]
pub struct GraphError {
    /// Where.
    pub span: Span,
    /// What.
    pub error: FileError,
}

/// The field for [`parent_state_id`].
pub(super) const PARENT: &str = "parent";

/// What a state's children put into their keys for it.
pub(super) fn parent_state_id(parent: &Node) -> Key {
    parent.stands_for
}

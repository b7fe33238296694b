//! A node: a state that can be built, and how.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vimg_agent::protocol::{Order, Probe};
use vimg_lang::model::{Bootstrap, DiskFormat, Machine};
use vimg_lang::{FileRef, Span};

use super::parameters::KernelParameters;
use crate::digest::{Description, Digest, Key};
use crate::files::FileError;

/// Index of a node in a [`super::dag::Graph`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(pub(super) u32);

/// A state that can be built, with its key.
#[derive(Debug, Clone)]
pub struct Node {
    /// Unique in the graph: `image:base`, `image@layer`, `image:check/name`,
    /// `image:seal`, `image:qcow2`.
    pub name: String,
    /// The image that declares it.
    pub image: String,
    /// How to build it.
    pub work: Work,
    /// The states that it is made from. All of them must exist before it can
    /// be built.
    pub inputs: Vec<Edge>,
    /// What the build needs of the machine.
    pub needs: Needs,
    /// The machine of its image.
    pub machine: Machine,
    /// The kernel parameters of a machine that boots from it.
    pub parameters: KernelParameters,
    /// Everything that enters its key.
    pub description: Description,
    /// Its key.
    pub key: Key,
    /// The key that nodes above use for it: its own, or that of an identical
    /// earlier state.
    pub stands_for: Key,
    /// Where it is declared.
    pub span: Span,
}

impl Node {
    /// Returns the state below: its disk lies on that disk, or is made from it.
    pub fn parent(&self) -> Option<NodeId> {
        self.inputs.iter().find(|input| input.role == Role::Parent).map(|input| input.node)
    }

    /// Lists the states that it is made from, the one below among them.
    pub fn inputs(&self) -> impl Iterator<Item = NodeId> + Clone {
        self.inputs.iter().map(|input| input.node)
    }
}

/// An input of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Edge {
    /// What the node uses it for.
    pub role: Role,
    /// The other node.
    pub node: NodeId,
}

/// What a node uses an input for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// It is the state below.
    Parent,
    /// Files are copied from it.
    Files,
}

/// What the build of a state needs of the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Needs {
    /// Nothing of the machine.
    Nothing,
    /// Its disk, with the machine switched off.
    Disk,
    /// The machine, booted.
    Machine,
}

/// How to build a state.
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
    /// A configuration to apply.
    Layer(Arc<LayerWork>),
    /// Questions to the machine of the state below. The result has no disk.
    Check(Arc<CheckWork>),
    /// Sealing the state below.
    Seal {
        /// Whether the agent stays on the disk.
        agent: bool,
    },
    /// Converting the state below to one file.
    Export(Export),
}

/// The file that a sealed state becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Export {
    /// The format of the file.
    pub format: DiskFormat,
    /// The size of the disk in bytes, if it is larger than that of the state.
    pub size: Option<u64>,
}

impl Work {
    /// Returns the kind of node, as records name it.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Bootstrap(_) | Self::Import { .. } => "base",
            Self::Layer(_) => "layer",
            Self::Check(_) => "check",
            Self::Seal { .. } => "seal",
            Self::Export(_) => "output",
        }
    }

    /// Returns the kernel parameters of a machine that boots from it, if those of the
    /// state below are `below`.
    pub fn parameters(&self, below: &KernelParameters) -> KernelParameters {
        match self {
            Self::Layer(work) => below.after(work.order.layer.as_deref(), &work.order.steps),
            Self::Bootstrap(_)
            | Self::Import { .. }
            | Self::Check(_)
            | Self::Seal { .. }
            | Self::Export(_) => below.clone(),
        }
    }

    /// Lists the parts that it reverts first, by their names in the machine.
    pub fn takes_back(&self) -> Vec<&str> {
        let Self::Layer(work) = self else { return Vec::new() };
        let mut taken = Vec::new();
        for step in &work.order.steps {
            if let Order::Revert { layer } = step {
                taken.push(layer.as_str());
            }
        }
        taken
    }
}

/// A layer: what a worker is told of it, and what only the project knows.
#[derive(Debug)]
pub struct LayerWork {
    /// The part for a worker.
    pub order: LayerOrder,
    /// The place in the recipe of each step.
    pub spans: Vec<Span>,
    /// The sources of the blobs of the steps.
    pub blobs: BTreeMap<Digest, BlobSource>,
}

/// What a worker is told of a layer: the steps for the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerOrder {
    /// Its name in the machine; `None` if its steps say so.
    pub layer: Option<String>,
    /// The steps.
    pub steps: Vec<Order>,
    /// The name of each step, for people.
    pub labels: Vec<String>,
    /// Notes to print when the layer is built.
    pub notes: Vec<String>,
}

/// A check: what a worker is told of it, and its places in the recipe.
#[derive(Debug)]
pub struct CheckWork {
    /// The part for a worker.
    pub order: CheckOrder,
    /// The place in the recipe of each probe.
    pub spans: Vec<Span>,
}

/// What a worker is told of a check: the probes for the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckOrder {
    /// The probes.
    pub probes: Vec<Probe>,
    /// The name of each probe, for people.
    pub labels: Vec<String>,
    /// Whether its scripts may use the network.
    pub network: bool,
}

/// The source of a blob.
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
    /// The place in the recipe.
    pub span: Span,
    /// The error.
    pub error: GraphErrorKind,
}

impl std::fmt::Display for GraphErrorKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File(error) => write!(f, "`{}`: {}", error.file, error.why),
            Self::Distribution(name) => write!(f, "unknown distribution `{name}`"),
        }
    }
}

/// A mistake that the graph finds.
#[derive(Debug)]
pub enum GraphErrorKind {
    /// A file can't be read.
    File(FileError),
    /// No distribution has this name.
    Distribution(String),
}

/// Returns the key that nodes above put into their descriptions.
pub(super) fn parent_state_id(parent: &Node) -> Key {
    parent.stands_for
}

//! From a model to nodes with keys: what is to be there, and what each state
//! depends on. Files of the project are hashed here, each once.
//!
//! Knows nothing of the store: whether a state is there is the plan's matter.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use petgraph::graph::{DiGraph, NodeIndex};
use vimg_agent::protocol::{self, Primitive, Probe};
use vimg_lang::model::{Bootstrap, Check, DiskFormat, Image, Machine, Model, Origin, Output};
use vimg_lang::{FileRef, Span};

use crate::digest::{Description, Digest, Key};
use crate::files::{FileError, Project};

mod describe;
mod server;
mod show;

pub use describe::SECRET;
pub use server::{Difference, ServerPart, ServerPlan, ServerWork};
pub use show::{Format, show};

/// A node's place in a [`Graph`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(u32);

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

/// A file that an image is to be written to.
#[derive(Debug, Clone)]
pub struct Target {
    /// The image's name.
    pub image: String,
    /// The node that it is.
    pub node: NodeId,
    /// As declared.
    pub output: Output,
}

/// All nodes of a recipe.
#[derive(Debug, Clone)]
pub struct Graph {
    // Edges lead from a state to what is made from it.
    graph: DiGraph<Node, ()>,
    /// For each image, its name, its last state before any output, and the
    /// index of its first own node in order.
    images: Vec<(String, NodeId)>,
    /// For each image, its checks.
    checks: Vec<Vec<NodeId>>,
    targets: Vec<Target>,
    by_name: HashMap<String, NodeId>,
    image_index: HashMap<String, usize>,
}

/// A file that can't be hashed, and where the recipe names it.
#[derive(Debug)]
pub struct GraphError {
    /// Where.
    pub span: Span,
    /// What.
    pub error: FileError,
}

impl Graph {
    /// Builds the graph of a model. All files that can't be hashed are
    /// reported together.
    pub fn new(model: &Model, project: &Project) -> Result<Self, Vec<GraphError>> {
        let mut builder = Builder {
            graph: Self {
                graph: DiGraph::new(),
                images: Vec::new(),
                checks: Vec::new(),
                targets: Vec::new(),
                by_name: HashMap::new(),
                image_index: HashMap::new(),
            },
            model,
            project,
            states: Vec::new(),
            checks: Vec::new(),
            errors: Vec::new(),
        };
        for image in &model.images {
            builder.image(image);
        }
        if builder.errors.is_empty() { Ok(builder.graph) } else { Err(builder.errors) }
    }

    /// Gives all nodes the keys that they have where `stands_for` says which
    /// states hold the same. Says whether anything is known by another key.
    pub fn resolve(&mut self, stands_for: impl Fn(&Key) -> Key) -> bool {
        let mut changed = false;
        // Those below come first.
        for index in self.graph.node_indices() {
            let parent = self.graph[index].parent.map(|p| parent_state_id(self.node(p)));
            let node = &mut self.graph[index];
            if parent.is_some_and(|parent| node.description.replace(PARENT, parent)) {
                node.key = node.description.key();
                changed = true;
            }
            let now = match node.work {
                Work::Layer(_) => stands_for(&node.key),
                _ => node.key,
            };
            changed |= now != node.stands_for;
            node.stands_for = now;
        }
        changed
    }

    /// A node.
    pub fn node(&self, id: NodeId) -> &Node {
        &self.graph[NodeIndex::new(id.0 as usize)]
    }

    /// All nodes; those below come first.
    pub fn ids(&self) -> impl Iterator<Item = NodeId> + use<> {
        (0..self.graph.node_count() as u32).map(NodeId)
    }

    /// The node with this name: `image` means its last state.
    pub fn find(&self, name: &str) -> Option<NodeId> {
        self.image(name).or_else(|| self.by_name.get(name).copied())
    }

    /// The last state of an image, before any output.
    pub fn image(&self, name: &str) -> Option<NodeId> {
        self.image_index.get(name).map(|n| self.images[*n].1)
    }

    /// The checks of an image.
    pub fn checks(&self, image: &str) -> &[NodeId] {
        self.image_index.get(image).map_or(&[], |n| &self.checks[*n])
    }

    /// All images with their last states.
    pub fn images(&self) -> &[(String, NodeId)] {
        &self.images
    }

    /// All files to write.
    pub fn targets(&self) -> &[Target] {
        &self.targets
    }

    /// All names that [`Graph::find`] knows.
    pub fn names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.by_name.keys().map(String::as_str).collect();
        names.extend(self.images.iter().map(|(n, _)| n.as_str()));
        names.sort_unstable();
        names.dedup();
        names
    }

    /// What is made from a node.
    pub fn children(&self, id: NodeId) -> Vec<NodeId> {
        let index = NodeIndex::new(id.0 as usize);
        let mut children: Vec<NodeId> =
            self.graph.neighbors(index).map(|n| NodeId(n.index() as u32)).collect();
        children.sort_unstable();
        children
    }

    /// A node and all below it, the lowest first.
    pub fn chain(&self, id: NodeId) -> Vec<NodeId> {
        let mut chain = vec![id];
        while let Some(parent) = chain.last().and_then(|id| self.node(*id).parent) {
            chain.push(parent);
        }
        chain.reverse();
        chain
    }

    /// Where a part of this name in the machine is applied, below `node`.
    pub fn applied(&self, node: &Node, part: &str) -> Option<Span> {
        let mut next = node.parent;
        while let Some(node) = next.map(|id| self.node(id)) {
            if let Work::Layer(work) = &node.work {
                let named = |step: &Primitive| matches!(step, Primitive::Layer { name } if name == part);
                let place = work.steps.iter().rposition(named).map(|n| work.places[n].0);
                let first = || (work.layer.as_deref() == Some(part)).then_some(node.span);
                if let Some(span) = place.or_else(first) {
                    return Some(span);
                }
            }
            next = node.parent;
        }
        None
    }

    fn add(&mut self, node: Node) -> NodeId {
        let parent = node.parent;
        let name = node.name.clone();
        let index = self.graph.add_node(node);
        if let Some(parent) = parent {
            self.graph.add_edge(NodeIndex::new(parent.0 as usize), index, ());
        }
        let id = NodeId(index.index() as u32);
        self.by_name.insert(name, id);
        id
    }
}

/// The field for [`parent_state_id`].
const PARENT: &str = "parent";

/// What a state's children put into their keys for it.
fn parent_state_id(parent: &Node) -> Key {
    parent.stands_for
}

struct Builder<'a> {
    graph: Graph,
    model: &'a Model,
    project: &'a Project,
    /// For each image, the state that it starts from and those after each of
    /// its layers.
    states: Vec<Vec<NodeId>>,
    /// For each image, what its layers and those below them promise.
    checks: Vec<Vec<Promise<'a>>>,
    errors: Vec<GraphError>,
}

/// A check that a layer brings with it, and the layer's name in the machine.
type Promise<'a> = (&'a str, &'a Check);

impl<'a> Builder<'a> {
    fn image(&mut self, image: &'a Image) {
        let mut top = match &image.origin {
            Origin::Image(index, layers) => self.states[*index][*layers],
            Origin::Bootstrap(bootstrap) => {
                let description = describe::bootstrap(bootstrap, &image.machine);
                let work = (Work::Bootstrap(bootstrap.clone()), Needs::Nothing);
                self.push(image, format!("{}:base", image.name), work, None, description, image.origin_span)
            }
            Origin::Disk { file, sha256 } => {
                let work = (Work::Import { file: file.clone(), sha256: sha256.clone() }, Needs::Nothing);
                let description = describe::import(sha256);
                self.push(image, format!("{}:base", image.name), work, None, description, image.origin_span)
            }
        };
        // A disk from outside brings no kernel for an appliance, and no
        // filesystem that the host's kernel may be trusted with.
        let imported = self
            .graph
            .chain(top)
            .first()
            .is_some_and(|id| matches!(self.graph.node(*id).work, Work::Import { .. }));
        let mut states = vec![top];
        for layer in &image.layers {
            let booted = layer.booted || imported;
            match describe::layer(layer, booted, &image.machine, self.project) {
                Ok((work, description)) => {
                    let name = format!("{}@{}", image.name, layer.name);
                    let needs = if booted { Needs::Machine } else { Needs::Disk };
                    let work = (Work::Layer(Arc::new(work)), needs);
                    top = self.push(image, name, work, Some(top), description, layer.span);
                }
                Err(errors) => self.errors.extend(errors),
            }
            states.push(top);
        }
        self.states.push(states);
        self.graph.image_index.insert(image.name.clone(), self.graph.images.len());
        self.graph.images.push((image.name.clone(), top));
        self.checks(image, top);
        if image.outputs.is_empty() {
            return;
        }
        let span = image.outputs[0].span;
        let name = format!("{}:seal", image.name);
        // What has run is stopped in an orderly way before it is sealed.
        let ran = |id: &NodeId| self.graph.node(*id).needs == Needs::Machine;
        let booted = imported || self.graph.chain(top).iter().any(ran);
        let needs = if booted { Needs::Machine } else { Needs::Disk };
        let sealed = self.push(image, name, (Work::Seal, needs), Some(top), describe::seal(needs), span);
        let mut made: Vec<(DiskFormat, NodeId)> = Vec::new();
        for output in &image.outputs {
            let known = made.iter().find(|(format, _)| *format == output.format).map(|(_, id)| *id);
            let node = known.unwrap_or_else(|| {
                let name = format!("{}:{}", image.name, output.format.name());
                let description = describe::export(output.format);
                let id = self.push(
                    image,
                    name,
                    (Work::Export(output.format), Needs::Nothing),
                    Some(sealed),
                    description,
                    output.span,
                );
                made.push((output.format, id));
                id
            });
            self.graph.targets.push(Target { image: image.name.clone(), node, output: output.clone() });
        }
    }

    /// What layers promise must hold in every image that has them; an image's
    /// own checks are about that image.
    fn checks(&mut self, image: &'a Image, top: NodeId) {
        let promised = self.promised(image, image.layers.len());
        let own = image.checks.iter().map(|c| (String::new(), c));
        let all = promised.iter().map(|(layer, check)| (format!("{layer}/"), *check)).chain(own);
        let mut nodes = Vec::new();
        for (layer, check) in all {
            let name = format!("{}:check/{layer}{}", image.name, check.name);
            let mut unique = name.clone();
            for n in 2.. {
                if !self.graph.by_name.contains_key(&unique) {
                    break;
                }
                unique = format!("{name}#{n}");
            }
            let (work, description) = describe::check(check, &image.machine);
            let work = (Work::Check(Arc::new(work)), Needs::Machine);
            nodes.push(self.push(image, unique, work, Some(top), description, check.span));
        }
        self.graph.checks.push(nodes);
        self.checks.push(promised);
    }

    /// What the first layers of an image promise, and what is below them.
    fn promised(&self, image: &'a Image, layers: usize) -> Vec<Promise<'a>> {
        let mut promised = match &image.origin {
            Origin::Image(index, layers) if *layers == self.model.images[*index].layers.len() => {
                self.checks[*index].clone()
            }
            Origin::Image(index, layers) => self.promised(&self.model.images[*index], *layers),
            _ => Vec::new(),
        };
        for layer in &image.layers[..layers] {
            if !layer.reverts.is_empty() {
                promised.retain(|(id, _)| !layer.reverts.iter().any(|gone| gone == id));
            }
            promised.extend(layer.parts.iter().flat_map(|p| p.checks.iter().map(|c| (p.id.as_str(), c))));
        }
        promised
    }

    fn push(
        &mut self,
        image: &Image,
        name: String,
        (work, needs): (Work, Needs),
        parent: Option<NodeId>,
        mut description: Description,
        span: Span,
    ) -> NodeId {
        if let Some(parent) = parent {
            description.content(PARENT, parent_state_id(self.graph.node(parent)));
        }
        description.value("agent behaviour", format_args!("{}.{}", protocol::PROTOCOL, protocol::BEHAVIOUR));
        let key = description.key();
        self.graph.add(Node {
            name,
            image: image.name.clone(),
            work,
            parent,
            needs,
            machine: image.machine,
            description,
            key,
            stands_for: key,
            span,
        })
    }
}

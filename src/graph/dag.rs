//! All nodes of a recipe, with their inputs.

use std::collections::{BTreeSet, HashMap};

use petgraph::graph::{DiGraph, NodeIndex};
use vimg_agent::protocol::Order;
use vimg_lang::Span;
use vimg_lang::model::Output;

use super::node::{Node, NodeId, Work, parent_state_id};
use crate::digest::Key;

/// An output file of an image.
#[derive(Debug, Clone)]
pub struct Target {
    /// The image's name.
    pub image: String,
    /// Its node.
    pub node: NodeId,
    /// Its declaration.
    pub output: Output,
}

/// All nodes of a recipe.
#[derive(Debug, Clone)]
pub struct Graph {
    // Edges lead from a state to those made from it.
    pub(super) graph: DiGraph<Node, ()>,
    /// For each image, its name and its last state before any output.
    pub(super) images: Vec<(String, NodeId)>,
    /// For each image, its checks.
    pub(super) checks: Vec<Vec<NodeId>>,
    pub(super) targets: Vec<Target>,
    pub(super) by_name: HashMap<String, NodeId>,
    pub(super) image_index: HashMap<String, usize>,
    /// Images that lack files, and that nothing needs now.
    pub(super) left_out: BTreeSet<String>,
}

impl Graph {
    /// Recomputes all keys after `stands_for` says which states are identical
    /// to earlier ones. Returns whether a key changed.
    pub fn resolve(&mut self, stands_for: impl Fn(&Key) -> Key) -> bool {
        let mut changed = false;
        // Nodes below come first.
        for index in self.graph.node_indices() {
            let parent = self.graph[index].parent().map(|p| parent_state_id(self.node(p)));
            let node = &mut self.graph[index];
            if parent.is_some_and(|parent| node.description.parent(parent)) {
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

    /// Returns a node.
    pub fn node(&self, id: NodeId) -> &Node {
        &self.graph[NodeIndex::new(id.0 as usize)]
    }

    /// Lists all nodes; those below come first.
    pub fn ids(&self) -> impl Iterator<Item = NodeId> + use<> {
        (0..self.graph.node_count() as u32).map(NodeId)
    }

    /// Returns the keys of all nodes.
    pub fn keys(&self) -> impl Iterator<Item = Key> {
        self.graph.node_weights().map(|node| node.key)
    }

    /// Finds a node by name; `image` means its last state.
    pub fn find(&self, name: &str) -> Option<NodeId> {
        self.image(name).or_else(|| self.node_of(name))
    }

    /// Finds a node by its own name.
    pub fn node_of(&self, name: &str) -> Option<NodeId> {
        self.by_name.get(name).copied()
    }

    /// Returns the last state of an image, before any output.
    pub fn image(&self, name: &str) -> Option<NodeId> {
        self.image_index.get(name).map(|n| self.images[*n].1)
    }

    /// Whether a node of this name may belong to an image that is left out,
    /// because it lacks files and nothing needs it now.
    pub fn leaves_out(&self, node: &str) -> bool {
        self.left_out.contains(node.split(['@', ':']).next().unwrap_or_default())
    }

    /// Returns the checks of an image.
    pub fn checks(&self, image: &str) -> &[NodeId] {
        self.image_index.get(image).map_or(&[], |n| &self.checks[*n])
    }

    /// Lists all images with their last states.
    pub fn images(&self) -> &[(String, NodeId)] {
        &self.images
    }

    /// Lists all output files.
    pub fn targets(&self) -> &[Target] {
        &self.targets
    }

    /// Lists all names that [`Graph::find`] knows.
    pub fn names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.by_name.keys().map(String::as_str).collect();
        names.extend(self.images.iter().map(|(n, _)| n.as_str()));
        names.sort_unstable();
        names.dedup();
        names
    }

    /// Lists the nodes that a node is an input of.
    pub fn children(&self, id: NodeId) -> Vec<NodeId> {
        let index = NodeIndex::new(id.0 as usize);
        let mut children: Vec<NodeId> =
            self.graph.neighbors(index).map(|n| NodeId(n.index() as u32)).collect();
        children.sort_unstable();
        children.dedup();
        children
    }

    /// Returns nodes and everything that they are made from. Nodes that others
    /// are made from come first.
    pub fn needed(&self, nodes: impl IntoIterator<Item = NodeId>) -> BTreeSet<NodeId> {
        let mut needed = BTreeSet::new();
        let mut next: Vec<NodeId> = nodes.into_iter().collect();
        while let Some(id) = next.pop() {
            if needed.insert(id) {
                next.extend(self.node(id).inputs());
            }
        }
        needed
    }

    /// Returns a node and all states below it, the lowest first: the chain of
    /// its disks.
    pub fn chain(&self, id: NodeId) -> Vec<NodeId> {
        let mut chain = vec![id];
        while let Some(parent) = chain.last().and_then(|id| self.node(*id).parent()) {
            chain.push(parent);
        }
        chain.reverse();
        chain
    }

    /// Finds where a part with this name in the machine is applied below
    /// `node`.
    pub fn applied(&self, node: &Node, part: &str) -> Option<Span> {
        let mut next = node.parent();
        while let Some(node) = next.map(|id| self.node(id)) {
            if let Work::Layer(work) = &node.work {
                let named = |step: &Order| matches!(step, Order::Layer { name } if name == part);
                let place = work.order.steps.iter().rposition(named).map(|n| work.spans[n]);
                let first = || (work.order.layer.as_deref() == Some(part)).then_some(node.span);
                if let Some(span) = place.or_else(first) {
                    return Some(span);
                }
            }
            next = node.parent();
        }
        None
    }

    /// Adds an input to a node, for tests. It must have a lower ID.
    #[cfg(test)]
    pub(crate) fn connect(&mut self, id: NodeId, input: super::node::Edge) {
        self.graph[NodeIndex::new(id.0 as usize)].inputs.push(input);
        self.graph.add_edge(NodeIndex::new(input.node.0 as usize), NodeIndex::new(id.0 as usize), ());
    }

    pub(super) fn add(&mut self, node: Node) -> NodeId {
        let inputs: Vec<NodeId> = node.inputs().collect();
        let name = node.name.clone();
        let index = self.graph.add_node(node);
        for input in inputs {
            self.graph.add_edge(NodeIndex::new(input.0 as usize), index, ());
        }
        let id = NodeId(index.index() as u32);
        self.by_name.insert(name, id);
        id
    }
}

//! The order of a batch: all that a worker is told. It can be written as JSON,
//! and has no places in the recipe.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use vimg_lang::FileRef;
use vimg_lang::model::{Bootstrap, Machine};

use crate::digest::{Description, Digest, Key};
pub(super) use crate::graph::{CheckOrder, Export, LayerOrder, Needs};
use crate::graph::{Graph, KernelParameters, NodeId, Role, Work};
use crate::store::StateId;

/// The order to build the nodes of a batch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct BatchOrder {
    /// The build of the state that the first node is built from; `None` for a
    /// base, and if that state is not there. Checks run on any build of it.
    pub(super) parent: Option<(Key, StateId)>,
    /// The nodes, in the order in which they are built. Checks run in parallel.
    pub(super) nodes: Vec<NodeOrder>,
}

/// The order to build a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct NodeOrder {
    /// Its name in the graph.
    pub(super) name: String,
    /// Its kind, for the record.
    pub(super) kind: String,
    /// Its key.
    pub(super) key: Key,
    /// The key that nodes above use for it.
    pub(super) stands_for: Key,
    /// Everything that enters its key.
    pub(super) description: Description,
    /// The state below.
    pub(super) parent: Option<Key>,
    /// The other states that it is made from.
    pub(super) others: Vec<Key>,
    /// The state that the node had after the last build.
    pub(super) before: Option<Key>,
    /// What the build needs of the machine.
    pub(super) needs: Needs,
    /// The machine.
    pub(super) machine: Machine,
    /// The kernel parameters of a machine that boots from the state below.
    pub(super) parameters: KernelParameters,
    /// How to build it.
    pub(super) task: Task,
}

/// How to build a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Task {
    /// A base disk from a distribution.
    Bootstrap(Bootstrap),
    /// A base disk from a file of the project.
    Import {
        /// The file.
        file: FileRef,
        /// Its SHA-256 in hexadecimal.
        sha256: String,
    },
    /// A layer.
    Layer {
        /// Its steps. They name the secrets that they need.
        layer: LayerOrder,
        /// The blobs of the steps.
        blobs: BTreeSet<Digest>,
    },
    /// A check.
    Check(CheckOrder),
    /// Sealing the state below.
    Seal {
        /// Whether the agent stays on the disk.
        agent: bool,
    },
    /// Converting the state below to one file.
    Export {
        /// The file.
        export: Export,
        /// The highest layer below.
        layer: Option<Key>,
        /// Whether vimg made the disk, so that it boots by GRUB.
        own: bool,
    },
}

/// The order to start a fork for a check whose image does not exist yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct PrewarmOrder {
    /// The check.
    pub(super) check: NodeOrder,
    /// The states below it, the highest first.
    pub(super) below: Vec<Key>,
    /// The state that its image had after the last build.
    pub(super) before: Option<Key>,
}

impl BatchOrder {
    /// Makes the order for the nodes of a batch. `before` has the keys of the
    /// last build by the names of nodes, and `parent` is the state that the
    /// first node is built from.
    pub(super) fn new(
        graph: &Graph,
        ids: &[NodeId],
        before: &BTreeMap<String, Key>,
        parent: Option<(Key, StateId)>,
    ) -> Self {
        let nodes = ids.iter().map(|id| NodeOrder::new(graph, *id, before)).collect();
        Self { parent, nodes }
    }
}

impl NodeOrder {
    /// Makes the order for a node; see [`BatchOrder::new`].
    pub(super) fn new(graph: &Graph, id: NodeId, before: &BTreeMap<String, Key>) -> Self {
        let node = graph.node(id);
        let key = |id: NodeId| graph.node(id).key;
        let below = node.parent();
        let others = node.inputs.iter().filter(|input| input.role != Role::Parent);
        let task = match &node.work {
            Work::Bootstrap(bootstrap) => Task::Bootstrap(bootstrap.clone()),
            Work::Import { file, sha256 } => Task::Import { file: file.clone(), sha256: sha256.clone() },
            Work::Layer(work) => {
                Task::Layer { layer: work.order.clone(), blobs: work.blobs.keys().copied().collect() }
            }
            Work::Check(work) => Task::Check(work.order.clone()),
            Work::Seal { agent } => Task::Seal { agent: *agent },
            Work::Export(export) => {
                let layer = node.parent().map(|seal| graph.node(seal).parent().unwrap_or(seal));
                let own = matches!(graph.node(graph.chain(id)[0]).work, Work::Bootstrap(_));
                Task::Export { export: *export, layer: layer.map(key), own }
            }
        };
        Self {
            name: node.name.clone(),
            kind: node.work.kind().to_owned(),
            key: node.key,
            stands_for: node.stands_for,
            description: node.description.clone(),
            parent: below.map(key),
            others: others.map(|input| key(input.node)).collect(),
            before: before.get(&node.name).copied(),
            needs: node.needs,
            machine: node.machine,
            parameters: below.map(|id| graph.node(id).parameters.clone()).unwrap_or_default(),
            task,
        }
    }
}

impl Task {
    /// Returns the kernel parameters of a machine that boots after the first `steps` steps
    /// on a state that has `below`.
    pub(super) fn parameters(&self, below: &KernelParameters, steps: usize) -> KernelParameters {
        match self {
            Self::Layer { layer, .. } => {
                let steps = &layer.steps[..steps.min(layer.steps.len())];
                below.after(layer.layer.as_deref(), steps)
            }
            Self::Bootstrap(_)
            | Self::Import { .. }
            | Self::Check(_)
            | Self::Seal { .. }
            | Self::Export { .. } => below.clone(),
        }
    }
}

impl PrewarmOrder {
    /// Makes the order for a check of the graph; see [`BatchOrder::new`].
    pub(super) fn new(graph: &Graph, check: NodeId, before: &BTreeMap<String, Key>) -> Self {
        let image = graph.node(check).parent();
        let below = std::iter::successors(image, |id| graph.node(*id).parent());
        Self {
            check: NodeOrder::new(graph, check, before),
            below: below.map(|id| graph.node(id).key).collect(),
            before: image.and_then(|id| before.get(&graph.node(id).name).copied()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::executor::{Built, Report};
    use super::super::node_failure::NodeFailure;
    use super::*;
    use crate::store::Record;

    const RECIPE: &str = "secret \"token\" env=\"TOKEN\"
image \"a\" {
    bootstrap \"debian\" suite=\"bookworm\" { package \"less\" }
    layer \"site\"
    check \"works\" { file \"/site\"; run \"true\" }
    output \"qcow2\" path=\"a.qcow2\"
}
configuration \"site\" {
    file \"/site\" content=\"x\"
    file \"/file\" from=\"main.vimg\"
    run { script \"true\"; secret \"token\" }
}
";

    #[test]
    fn the_answers_to_an_order_survive_their_way_through_json() {
        let built = Built { seconds: 1.5, bytes: 1 << 40, same: Some(Key(Digest::of(b"same"))) };
        for report in [
            Report::Start,
            Report::Build(built.clone()),
            Report::Reuse,
            Report::Supersede(Some(built)),
            Report::Supersede(None),
        ] {
            let json = serde_json::to_string(&report).unwrap();
            assert_eq!(serde_json::from_str::<Report>(&json).unwrap(), report);
        }
        let mut failure = NodeFailure::full("a@site", None);
        failure.step = Some(2);
        let json = serde_json::to_string(&failure).unwrap();
        assert_eq!(serde_json::from_str::<NodeFailure>(&json).unwrap(), failure);
    }

    #[test]
    fn an_order_survives_its_way_through_json() {
        let dir = tempfile::tempdir().unwrap();
        let graph = Graph::of(dir.path(), RECIPE);
        let ids: Vec<NodeId> = graph.ids().collect();
        let kinds: BTreeSet<&str> = ids.iter().map(|id| graph.node(*id).work.kind()).collect();
        assert_eq!(kinds.into_iter().collect::<Vec<_>>(), ["base", "check", "layer", "output", "seal"]);
        let before: BTreeMap<_, _> =
            ids.iter().map(|id| (graph.node(*id).name.clone(), graph.node(*id).key)).collect();
        let base = graph.node(ids[0]);
        let disk = crate::store::Disk { kind: crate::store::DiskKind::Qcow2, backing: None, depth: 0 };
        let record = Record::new(base.key, "base", &base.name, base.description.clone(), disk);
        let order = BatchOrder::new(&graph, &ids, &before, Some((record.key, record.id)));
        let json = serde_json::to_string(&order).unwrap();
        assert_eq!(serde_json::from_str::<BatchOrder>(&json).unwrap(), order);
        // It has what a worker can't ask the graph for.
        let layer = order.nodes.iter().find(|node| node.name == "a@site").unwrap();
        let Task::Layer { layer: steps, blobs } = &layer.task else { panic!("{:?}", layer.task) };
        assert_eq!((steps.steps.len(), steps.labels.len(), blobs.len()), (3, 3, 3));
        assert_eq!((layer.parent, layer.before), (Some(base.key), Some(layer.key)));
        let output = order.nodes.iter().find(|node| node.name == "a:qcow2").unwrap();
        assert_eq!(
            output.task,
            Task::Export {
                export: Export { format: vimg_lang::model::DiskFormat::Qcow2, size: None },
                layer: Some(layer.key),
                own: true,
            }
        );
        let check = graph.node_of("a:check/works").unwrap();
        let prewarm = PrewarmOrder::new(&graph, check, &before);
        assert_eq!((prewarm.below, prewarm.before), (vec![layer.key, base.key], Some(layer.key)));
    }
}

//! Builds the graph of a model: nodes, their descriptions and keys.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use petgraph::graph::DiGraph;
use vimg_agent::protocol;
use vimg_lang::Span;
use vimg_lang::model::{Check, Image, Model, Origin};

use super::dag::{Graph, Target};
use super::describe;
use super::node::{
    Edge, Export, GraphError, GraphErrorKind, Needs, Node, NodeId, Role, Work, parent_state_id,
};
use crate::base::{self, Distribution};
use crate::digest::Description;
use crate::files::Project;

impl Graph {
    /// Builds the graph of a model. Reports all files that can't be hashed
    /// together. Leaves out images that lack files, if nothing needs them.
    ///
    /// # Errors
    ///
    /// Files that can't be read, and distributions that are not among these.
    pub fn new(
        model: &Model,
        project: &Project,
        distributions: &[&dyn Distribution],
    ) -> Result<Self, Vec<GraphError>> {
        let mut builder = Builder {
            graph: Self {
                graph: DiGraph::new(),
                images: Vec::new(),
                checks: Vec::new(),
                targets: Vec::new(),
                by_name: HashMap::new(),
                image_index: HashMap::new(),
                left_out: BTreeSet::new(),
            },
            model,
            project,
            distributions,
            states: Vec::new(),
            checks: Vec::new(),
            errors: Vec::new(),
        };
        for image in &model.images {
            builder.image(image);
        }
        if builder.errors.is_empty() { Ok(builder.graph) } else { Err(builder.errors) }
    }
}

/// For the tests of what stands above.
#[cfg(test)]
impl Graph {
    /// Builds the graph of a recipe whose files are in `dir`.
    pub(crate) fn of(dir: &std::path::Path, recipe: &str) -> Self {
        use vimg_lang::{FileRef, Request, Sources, compile};
        std::fs::write(dir.join("main.vimg"), recipe).unwrap();
        let project = Project::open(dir).unwrap();
        let entry = FileRef::project("main.vimg");
        let distributions = base::known(base::BUILT_IN);
        let (set, values, rebuilt) = (&[], None, None);
        let request = Request { files: &project, entry, set, values, rebuilt, distributions: &distributions };
        let model = compile(&request, &mut Sources::default()).unwrap();
        Self::new(&model, &project, base::BUILT_IN).unwrap()
    }
}

struct Builder<'a> {
    graph: Graph,
    model: &'a Model,
    project: &'a Project,
    distributions: &'a [&'a dyn Distribution],
    /// For each image, the state that it starts from and those after each of
    /// its layers.
    states: Vec<Vec<NodeId>>,
    /// For each image, the checks of its layers and of those below them.
    checks: Vec<Vec<Promise<'a>>>,
    errors: Vec<GraphError>,
}

/// A check of a layer, and the layer's name in the machine.
type Promise<'a> = (&'a str, &'a Check);

/// What a node does, what it needs for that, and what enters its key besides
/// its parent.
struct What {
    work: Work,
    needs: Needs,
    description: Description,
}

impl What {
    fn new(work: Work, needs: Needs, description: Description) -> Self {
        Self { work, needs, description }
    }
}

impl<'a> Builder<'a> {
    fn image(&mut self, image: &'a Image) {
        let below_is_out = match &image.origin {
            Origin::Image(index, _) => self.states[*index].is_empty(),
            Origin::Bootstrap(_) | Origin::Disk { .. } => false,
        };
        let layers = image.layers.iter().map(|layer| {
            let booted = layer.booted || self.is_imported(image);
            describe::layer(layer, booted, &image.machine, self.project).map(|made| (booted, made))
        });
        let layers: Vec<_> = layers.collect();
        if !image.needed && (below_is_out || !image.complete || layers.iter().any(Result::is_err)) {
            self.graph.left_out.insert(image.name.clone());
            self.states.push(Vec::new());
            self.checks.push(Vec::new());
            return;
        }
        let mut top = match &image.origin {
            Origin::Image(index, layers) => self.states[*index][*layers],
            Origin::Bootstrap(bootstrap) => {
                let description = match base::find(self.distributions, &bootstrap.distribution) {
                    Some(found) => describe::bootstrap(found, bootstrap, &image.machine),
                    None => {
                        let error = GraphErrorKind::Distribution(bootstrap.distribution.clone());
                        self.errors.push(GraphError { span: image.origin_span, error });
                        Description::default()
                    }
                };
                let what = What::new(Work::Bootstrap(bootstrap.clone()), Needs::Nothing, description);
                self.push(image, format!("{}:base", image.name), what, None, image.origin_span)
            }
            Origin::Disk { file, sha256 } => {
                let work = Work::Import { file: file.clone(), sha256: sha256.clone() };
                let what = What::new(work, Needs::Nothing, describe::import(sha256));
                self.push(image, format!("{}:base", image.name), what, None, image.origin_span)
            }
        };
        let mut states = vec![top];
        for (layer, described) in image.layers.iter().zip(layers) {
            match described {
                Ok((booted, (work, description))) => {
                    let name = format!("{}@{}", image.name, layer.name);
                    let needs = if booted { Needs::Machine } else { Needs::Disk };
                    let what = What::new(Work::Layer(Arc::new(work)), needs, description);
                    top = self.push(image, name, what, Some(top), layer.span);
                }
                Err(errors) => self.errors.extend(errors),
            }
            states.push(top);
        }
        self.states.push(states);
        self.graph.image_index.insert(image.name.clone(), self.graph.images.len());
        self.graph.images.push((image.name.clone(), top));
        self.checks(image, top);
        if !image.outputs.is_empty() {
            self.outputs(image, top);
        }
    }

    /// Seals an image once with its agent and once without, as its outputs want it,
    /// and converts that to their formats and sizes.
    fn outputs(&mut self, image: &'a Image, top: NodeId) {
        // If programs have run in the image, the machine is booted and shut
        // down in order before it is sealed.
        let ran = |id: &NodeId| self.graph.node(*id).needs == Needs::Machine;
        let booted = self.is_imported(image) || self.graph.chain(top).iter().any(ran);
        let needs = if booted { Needs::Machine } else { Needs::Disk };
        let grown = Some(image.machine.disk).filter(|disk| *disk > self.lowest(image).machine.disk);
        let mut sealed: Vec<(bool, NodeId)> = Vec::new();
        let mut made: Vec<(bool, Export, NodeId)> = Vec::new();
        for output in &image.outputs {
            let agent = output.agent;
            let suffix = if agent { "" } else { "-no-agent" };
            let known = sealed.iter().find(|(other, _)| *other == agent).map(|(_, id)| *id);
            let seal = known.unwrap_or_else(|| {
                let name = format!("{}:seal{suffix}", image.name);
                let what = What::new(Work::Seal { agent }, needs, describe::seal(needs, agent));
                let id = self.push(image, name, what, Some(top), output.span);
                sealed.push((agent, id));
                id
            });
            let size = output.size.or(grown);
            let export = Export { format: output.format, size };
            let known = made.iter().find(|(a, e, _)| (*a, *e) == (agent, export)).map(|(_, _, id)| *id);
            let node = known.unwrap_or_else(|| {
                let size = export.size.map(|size| format!("-{}MiB", size >> 20)).unwrap_or_default();
                let name = format!("{}:{}{size}{suffix}", image.name, export.format.name());
                let what = What::new(Work::Export(export), Needs::Nothing, describe::export(export));
                let id = self.push(image, name, what, Some(seal), output.span);
                made.push((agent, export, id));
                id
            });
            self.graph.targets.push(Target { image: image.name.clone(), node, output: output.clone() });
        }
    }

    /// Returns the image at the bottom of an image.
    fn lowest(&self, mut image: &'a Image) -> &'a Image {
        while let Origin::Image(below, _) = image.origin {
            image = &self.model.images[below];
        }
        image
    }

    /// Whether an image stands on an imported disk. Such a disk has no kernel for
    /// an appliance, and the host's kernel must not mount its filesystem.
    fn is_imported(&self, image: &'a Image) -> bool {
        matches!(self.lowest(image).origin, Origin::Disk { .. })
    }

    /// Checks of layers apply to every image that has these layers; the checks
    /// of an image only to that image.
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
            let what = What::new(Work::Check(Arc::new(work)), Needs::Machine, description);
            nodes.push(self.push(image, unique, what, Some(top), check.span));
        }
        self.graph.checks.push(nodes);
        self.checks.push(promised);
    }

    /// Returns the checks of the first layers of an image, and of what is below
    /// them.
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
        What { work, needs, mut description }: What,
        parent: Option<NodeId>,
        span: Span,
    ) -> NodeId {
        if let Some(parent) = parent {
            description.parent(parent_state_id(self.graph.node(parent)));
        }
        // Bases and conversions ask no agent.
        if needs != Needs::Nothing {
            description.value("agent behaviour", protocol::BEHAVIOUR);
        }
        let key = description.key();
        let below = parent.map(|parent| self.graph.node(parent).parameters.clone()).unwrap_or_default();
        self.graph.add(Node {
            name,
            image: image.name.clone(),
            parameters: work.parameters(&below),
            work,
            inputs: parent.map(|node| Edge { role: Role::Parent, node }).into_iter().collect(),
            needs,
            machine: image.machine,
            description,
            key,
            stands_for: key,
            span,
        })
    }
}

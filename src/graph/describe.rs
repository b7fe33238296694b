//! The descriptions of all kinds of nodes. `docs/reference/keys.md` lists the
//! fields, and a test compares the two.
//!
//! One walk over a layer builds both the agent's steps and the description, so
//! nothing reaches the agent that is not described. The fields of primitives and
//! probes are those that `vimg_model` names.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::sync::Arc;

use vimg_agent::protocol::{self, Digest, Manifest, Order};
use vimg_lang::model::{Bootstrap, Check, Content, Layer, Machine, Part, Primitive, Run, Script, SecretUse};
use vimg_lang::{FileRef, Span};
use vimg_model::{Convert, Fields};

use super::node::{
    BlobSource, CheckOrder, CheckWork, Export, GraphError, GraphErrorKind, LayerOrder, LayerWork, Needs,
};
use crate::base::Distribution;
use crate::digest::{Blob, Description};
use crate::files::{FileError, Project};

/// Raise when sealing or exporting gives another disk.
const OUTPUT_BEHAVIOUR: u32 = 2;

/// The architecture of machines. Caches are shared, and a disk of one
/// architecture is of no use to another.
const ARCHITECTURE: &str = "amd64";

/// Raise when a check that passed may now fail.
const CHECK_BEHAVIOUR: u32 = 1;

pub(super) fn bootstrap(
    distribution: &dyn Distribution,
    bootstrap: &Bootstrap,
    machine: &Machine,
) -> Description {
    let mut d = Description::default();
    d.value("kind", "bootstrap");
    d.value("bootstrap behaviour", distribution.behaviour());
    d.architecture(ARCHITECTURE);
    distribution.describe(bootstrap, &mut d);
    d.value("disk size", machine.disk);
    d
}

pub(super) fn import(sha256: &str) -> Description {
    let mut d = Description::default();
    d.value("kind", "import");
    d.architecture(ARCHITECTURE);
    d.content("disk", sha256);
    d
}

pub(super) fn seal(needs: Needs, agent: bool) -> Description {
    let mut d = Description::default();
    d.value("kind", "seal");
    if needs == Needs::Machine {
        d.booted();
    }
    d.value("agent stays", agent);
    d.value("output behaviour", OUTPUT_BEHAVIOUR);
    d
}

pub(super) fn export(export: Export) -> Description {
    let mut d = Description::default();
    d.value("kind", "export");
    d.value("format", export.format.name());
    if let Some(size) = export.size {
        d.value("disk size", size);
    }
    d.value("output behaviour", OUTPUT_BEHAVIOUR);
    d
}

/// Returns a check's work and description.
pub(super) fn check(check: &Check, machine: &Machine) -> (CheckWork, Description) {
    let mut d = Description::default();
    d.value("kind", "check");
    d.value("check behaviour", CHECK_BEHAVIOUR);
    d.value("machine cpus", machine.cpus);
    d.value("machine memory", machine.memory);
    let network = check.probes.iter().any(|(probe, _)| probe.wants_network());
    let order = CheckOrder { probes: Vec::new(), labels: Vec::new(), network };
    let mut work = CheckWork { order, spans: Vec::new() };
    for (probe, span) in &check.probes {
        probe.describe(&mut d);
        work.order.probes.push(probe.clone());
        work.order.labels.push(probe.label());
        work.spans.push(*span);
    }
    (work, d)
}

impl Fields for Description {
    fn value(&mut self, name: &str, value: &dyn Display) {
        Description::value(self, name, value);
    }

    fn text(&mut self, name: &str, text: &str) {
        self.content(name, Digest::of(text.as_bytes()));
    }
}

/// Returns a layer's work and description.
pub(super) fn layer(
    layer: &Layer,
    booted: bool,
    machine: &Machine,
    project: &Project,
) -> Result<(LayerWork, Description), Vec<GraphError>> {
    // A part may have the name of a part that is reverted first, so its page of
    // the ledger begins after the revert.
    let apart = !layer.reverts.is_empty();
    let first = layer.parts.first().filter(|_| !apart);
    let mut walk = Walk {
        project,
        d: Description::default(),
        work: LayerWork {
            order: LayerOrder {
                layer: first.map(|part| part.id.clone()),
                steps: Vec::new(),
                labels: Vec::new(),
                notes: Vec::new(),
            },
            spans: Vec::new(),
            blobs: BTreeMap::new(),
        },
        errors: Vec::new(),
    };
    walk.d.value("kind", "layer");
    // An offline layer does not depend on the machine.
    if booted {
        walk.d.booted();
        walk.d.value("machine cpus", machine.cpus);
        walk.d.value("machine memory", machine.memory);
    }
    for id in &layer.reverts {
        walk.d.value("revert", id);
        let step = Order::Revert { layer: id.clone() };
        walk.add(layer.span, format!("revert {id}"), step);
    }
    for (n, part) in layer.parts.iter().enumerate() {
        if n > 0 || apart {
            walk.add(part.span, format!("layer {}", part.id), Order::Layer { name: part.id.clone() });
        }
        walk.part(part);
    }
    if walk.errors.is_empty() { Ok((walk.work, walk.d)) } else { Err(walk.errors) }
}

struct Walk<'a> {
    project: &'a Project,
    d: Description,
    work: LayerWork,
    errors: Vec<GraphError>,
}

impl Walk<'_> {
    fn part(&mut self, part: &Part) {
        self.d.value("configuration", &part.configuration);
        if part.id != part.configuration {
            self.d.value("name in the machine", &part.id);
        }
        for (name, value) in &part.reads {
            self.d.note(format!("input {name}"), value);
        }
        for step in &part.steps {
            self.step(&step.primitive, step.span);
        }
    }

    fn add(&mut self, span: Span, name: String, step: Order) {
        self.work.order.steps.push(step);
        self.work.order.labels.push(name);
        self.work.spans.push(span);
    }

    fn step(&mut self, primitive: &Primitive, span: Span) {
        let name = match primitive {
            Primitive::Run(Run { script: Script { content: Content::File(file), .. }, .. }) => {
                format!("run {file}")
            }
            other => other.label(),
        };
        match primitive.convert(self) {
            Ok(primitive) => self.add(span, name, Order::Make(primitive)),
            Err(error) => self.errors.push(GraphError { span, error: GraphErrorKind::File(error) }),
        }
    }

    /// Describes a tree. Each file is a field, so that the reason of a rebuild
    /// can name it.
    fn manifest(&mut self, dir: &FileRef, manifest: &Manifest) {
        for entry in &manifest.entries {
            let path = if entry.path.is_empty() { dir.to_string() } else { format!("{dir}/{}", entry.path) };
            match &entry.node {
                protocol::Node::Dir(mode) => {
                    self.d.value(format!("directory {path} mode"), format_args!("{mode:04o}"))
                }
                protocol::Node::Link(target) => self.d.value(format!("symlink {path}"), target),
                protocol::Node::File(mode, blob, attributes) => {
                    self.d.content(format!("file {path}"), blob.digest);
                    self.d.value(format!("file {path} mode"), format_args!("{mode:04o}"));
                    for (name, value) in attributes {
                        self.d.value(format!("file {path} attribute {name}"), value);
                    }
                    let file = FileRef { root: dir.root, path: join(&dir.path, &entry.path) };
                    self.work.blobs.insert(blob.digest, BlobSource::File(file));
                }
            }
        }
    }
}

impl Fields for Walk<'_> {
    fn value(&mut self, name: &str, value: &dyn Display) {
        self.d.value(name, value);
    }

    fn text(&mut self, name: &str, text: &str) {
        self.d.text(name, text);
    }
}

impl Convert<Content, FileRef, SecretUse> for Walk<'_> {
    type Content = Blob;
    type Tree = Blob;
    type Secret = String;
    type Error = FileError;

    /// A file of the project, and the text of a template, have the mode of that
    /// file.
    fn content(&mut self, name: &str, content: &Content) -> Result<(Blob, u32), FileError> {
        match content {
            Content::Text(text) => {
                let blob = Blob::of(text.as_bytes());
                self.d.content(format!("content of {name}"), blob.digest);
                self.work.blobs.insert(blob.digest, BlobSource::Bytes(Arc::from(text.as_bytes())));
                Ok((blob, 0o644))
            }
            Content::Rendered(text, template) => {
                let (blob, _) = self.content(name, &Content::Text(text.clone()))?;
                Ok((blob, self.project.hash(template)?.1))
            }
            Content::File(file) => {
                let (blob, mode) = self.project.hash(file)?;
                self.d.content(format!("file {file}"), blob.digest);
                self.work.blobs.insert(blob.digest, BlobSource::File(file.clone()));
                Ok((blob, mode))
            }
        }
    }

    fn script(&mut self, name: &str, script: &Content) -> Result<Blob, FileError> {
        if let Some(why) = self.project.unfit(script) {
            let file = match script {
                Content::File(file) | Content::Rendered(_, file) => file.to_string(),
                Content::Text(_) => "script".to_owned(),
            };
            return Err(FileError { file, why, is_full: false });
        }
        if self.project.goes_on(script) {
            self.work.order.notes.push(format!(
                "{name}: a script with its own `#!` line continues after a failed command; add `set -e`"
            ));
        }
        Ok(self.content("script", script)?.0)
    }

    fn tree(&mut self, dir: &FileRef) -> Result<Blob, FileError> {
        let manifest = self.project.tree(dir)?;
        self.manifest(dir, &manifest);
        // The list contains only strings and numbers, so encoding can't fail.
        let bytes = serde_json::to_vec(&manifest).unwrap_or_default();
        let blob = Blob::of(&bytes);
        self.work.blobs.insert(blob.digest, BlobSource::Bytes(Arc::from(bytes)));
        Ok(blob)
    }

    fn secret(&mut self, secret: &SecretUse) -> String {
        self.d.secret(&secret.name, &secret.version);
        secret.name.clone()
    }
}

fn join(dir: &str, path: &str) -> String {
    if dir.is_empty() { path.to_owned() } else { format!("{dir}/{path}") }
}

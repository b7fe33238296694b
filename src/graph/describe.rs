//! The descriptions of all kinds of nodes. `docs/reference/keys.md` lists the
//! fields, and a test compares the two.
//!
//! One walk over a layer builds both the agent's steps and the description, so
//! nothing reaches the agent that is not described.

use std::collections::BTreeMap;
use std::sync::Arc;

use vimg_agent::protocol::{self, Digest, Manifest, Primitive as Step, Probe, ServiceState};
use vimg_lang::model::{
    self, Bootstrap, Check, Content, DiskFormat, Layer, Machine, Part, Primitive, Script, When,
};
use vimg_lang::{FileRef, Span};

use super::node::{BlobSource, CheckWork, GraphError, GraphErrorKind, LayerWork, Needs};
use crate::base::Distribution;
use crate::digest::{Blob, Description};
use crate::files::{FileError, Project};

/// Raise when sealing or exporting gives another disk.
const OUTPUT_BEHAVIOUR: u32 = 1;

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

pub(super) fn seal(needs: Needs) -> Description {
    let mut d = Description::default();
    d.value("kind", "seal");
    if needs == Needs::Machine {
        d.booted();
    }
    d.value("output behaviour", OUTPUT_BEHAVIOUR);
    d
}

pub(super) fn export(format: DiskFormat) -> Description {
    let mut d = Description::default();
    d.value("kind", "export");
    d.value("format", format.name());
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
    let asks = |(probe, _): &(model::Probe, Span)| matches!(probe, model::Probe::Run { network: true, .. });
    let network = check.probes.iter().any(asks);
    let mut work = CheckWork { probes: Vec::new(), places: Vec::new(), network };
    for (probe, span) in &check.probes {
        let (name, probe) = question(&mut d, probe);
        work.probes.push(probe);
        work.places.push((*span, name));
    }
    (work, d)
}

fn question(d: &mut Description, probe: &model::Probe) -> (String, Probe) {
    let optional = |d: &mut Description, name: &str, value: &Option<String>| {
        if let Some(value) = value {
            d.value(name, value);
        }
    };
    match probe.clone() {
        model::Probe::Http { url, status, contains, header, within } => {
            let name = format!("http {url}");
            d.value(&name, "");
            optional(d, &format!("{name} status"), &status.map(|s| s.to_string()));
            optional(d, &format!("{name} contains"), &contains);
            optional(d, &format!("{name} header"), &header.as_ref().map(|(n, v)| format!("{n}: {v}")));
            d.value(format!("{name} within"), within);
            (name, Probe::Http { url, status, contains, header, within })
        }
        model::Probe::Port { port, within } => {
            d.value(format!("port {port}"), "");
            d.value(format!("port {port} within"), within);
            (format!("port {port}"), Probe::Port { port, within })
        }
        model::Probe::Run { script, timeout, network } => {
            if network {
                d.value("network", network);
            }
            d.content("content of script", Digest::of(script.as_bytes()));
            d.value("timeout", timeout);
            ("run".into(), Probe::Run { script, timeout })
        }
        model::Probe::File { path, contains } => {
            d.value(format!("file {path}"), "");
            optional(d, &format!("file {path} contains"), &contains);
            (format!("file {path}"), Probe::File { path, contains })
        }
        model::Probe::Service { unit, within } => {
            d.value(format!("service {unit}"), "");
            d.value(format!("service {unit} within"), within);
            (format!("service {unit}"), Probe::Service { unit, within })
        }
        model::Probe::Package(package) => {
            d.value("package", &package);
            (format!("package {package}"), Probe::Package { name: package })
        }
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
            layer: first.map(|part| part.id.clone()),
            steps: Vec::new(),
            places: Vec::new(),
            blobs: BTreeMap::new(),
            notes: Vec::new(),
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
        let step = Step::Revert { layer: id.clone() };
        walk.add(layer.span, format!("revert {id}"), step);
    }
    for (n, part) in layer.parts.iter().enumerate() {
        if n > 0 || apart {
            walk.add(part.span, format!("layer {}", part.id), Step::Layer { name: part.id.clone() });
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

    fn add(&mut self, span: Span, name: String, step: Step) {
        self.work.steps.push(step);
        self.work.places.push((span, name));
    }

    fn step(&mut self, primitive: &Primitive, span: Span) {
        let (name, step) = match primitive {
            Primitive::Package { names } => {
                self.d.value("package", names.join(" "));
                (format!("package {}", names.join(" ")), Some(Step::Package { names: names.clone() }))
            }
            Primitive::File { path, content, mode, owner } => {
                let name = format!("file {path}");
                self.d.value(&name, "");
                let content = self.content(&name, content, span);
                let mode = mode.or(content.map(|(_, mode)| mode)).unwrap_or(0o644);
                self.d.value(format!("{name} mode"), format_args!("{mode:04o}"));
                let owner = self.owner(&name, owner);
                (name, content.map(|(content, _)| Step::File { path: path.clone(), content, mode, owner }))
            }
            Primitive::Directory { path, from, mode, owner } => {
                let name = format!("directory {path}");
                self.d.value(&name, "");
                if let Some(mode) = mode {
                    self.d.value(format!("{name} mode"), format_args!("{mode:04o}"));
                }
                let owner = self.owner(&name, owner);
                let tree = match from {
                    Some(from) => self.tree(from, span).map(Some),
                    None => Some(None),
                };
                let step = tree.map(|tree| Step::Directory { path: path.clone(), mode: *mode, owner, tree });
                (name, step)
            }
            Primitive::Symlink { path, target } => {
                self.d.value(format!("symlink {path}"), target);
                let step = Step::Symlink { path: path.clone(), target: target.clone() };
                (format!("symlink {path}"), Some(step))
            }
            Primitive::Archive { path, from, strip, owner } => {
                let name = format!("archive {path}");
                self.d.value(&name, "");
                self.d.value(format!("{name} strip"), strip);
                let owner = self.owner(&name, owner);
                let content = self.file(from, span).map(|(blob, _)| blob);
                let step = content.map(|content| Step::Archive {
                    path: path.clone(),
                    content,
                    strip: *strip,
                    owner,
                });
                (name, step)
            }
            Primitive::Group { name, gid, system } => {
                let label = format!("group {name}");
                self.d.value(&label, "");
                self.optional(format!("{label} gid"), gid.as_ref());
                self.d.value(format!("{label} system"), system);
                (label, Some(Step::Group { name: name.clone(), gid: *gid, system: *system }))
            }
            Primitive::User { name, uid, group, groups, home, shell, comment, system } => {
                let label = format!("user {name}");
                self.d.value(&label, "");
                self.optional(format!("{label} uid"), uid.as_ref());
                self.optional(format!("{label} group"), group.as_ref());
                self.d.value(format!("{label} groups"), groups.join(","));
                self.optional(format!("{label} home"), home.as_ref());
                self.optional(format!("{label} shell"), shell.as_ref());
                self.optional(format!("{label} comment"), comment.as_ref());
                self.d.value(format!("{label} system"), system);
                let user = protocol::User {
                    name: name.clone(),
                    uid: *uid,
                    group: group.clone(),
                    groups: groups.clone(),
                    home: home.clone(),
                    shell: shell.clone(),
                    comment: comment.clone(),
                    system: *system,
                };
                (label, Some(Step::User(user)))
            }
            Primitive::Service { unit, enabled, state } => {
                let state = state.map(|state| match state {
                    model::ServiceState::Running => ServiceState::Running,
                    model::ServiceState::Stopped => ServiceState::Stopped,
                    model::ServiceState::Restarted => ServiceState::Restarted,
                });
                let label = format!("service {unit}");
                self.d.value(&label, "");
                self.optional(format!("{label} enabled"), enabled.as_ref());
                self.optional(
                    format!("{label} state"),
                    state.map(|s| format!("{s:?}").to_lowercase()).as_ref(),
                );
                (label, Some(Step::Service { unit: unit.clone(), enabled: *enabled, state }))
            }
            Primitive::Sysctl { key, value } => {
                self.d.value(format!("sysctl {key}"), value);
                (format!("sysctl {key}"), Some(Step::Sysctl { key: key.clone(), value: value.clone() }))
            }
            Primitive::KernelModule { name } => {
                let label = format!("kernel-module {name}");
                self.d.value(&label, "");
                (label, Some(Step::KernelModule { name: name.clone() }))
            }
            Primitive::Reboot => {
                self.d.value("reboot", "");
                ("reboot".to_owned(), Some(Step::Reboot))
            }
            Primitive::Run { script, undo, secrets } => {
                let label = match &script.content {
                    Content::File(file) => format!("run {file}"),
                    Content::Text(_) | Content::Rendered(..) => "run".to_owned(),
                };
                for (name, version) in secrets {
                    self.d.secret(name, version);
                }
                if let Some(undo) = undo {
                    self.d.content("run undo", Blob::of(undo.as_bytes()).digest);
                }
                let step = self.script("run", script, span).map(|script| {
                    let secrets = secrets.keys().cloned().collect();
                    Step::Run(protocol::Run { script, undo: undo.clone(), secrets })
                });
                (label, step)
            }
            Primitive::Hook { when, script } => {
                let (label, when) = match when {
                    When::FirstBoot => ("on first-boot".to_owned(), "first-boot".to_owned()),
                    When::EachBoot => ("on each-boot".to_owned(), "each-boot".to_owned()),
                    When::Decommission => ("on decommission".to_owned(), "decommission".to_owned()),
                    When::Operation(name) => (format!("operation {name}"), format!("operation/{name}")),
                };
                let script = self.script(&label, script, span);
                (label, script.map(|script| Step::Hook { when, script }))
            }
        };
        if let Some(step) = step {
            self.add(span, name, step);
        }
    }

    fn script(&mut self, name: &str, script: &Script, span: Span) -> Option<protocol::Script> {
        self.d.value(format!("{name} user"), &script.user);
        self.d.value(format!("{name} workdir"), &script.workdir);
        self.d.value(format!("{name} timeout"), script.timeout);
        if script.network {
            self.d.value(format!("{name} network"), script.network);
        }
        for (variable, value) in &script.env {
            self.d.value(format!("{name} env {variable}"), value);
        }
        if let Some(why) = self.project.unfit(&script.content) {
            let file = match &script.content {
                Content::File(file) | Content::Rendered(_, file) => file.to_string(),
                Content::Text(_) => "script".to_owned(),
            };
            self.errors.push(GraphError { span, error: GraphErrorKind::File(FileError { file, why }) });
            return None;
        }
        if self.project.goes_on(&script.content) {
            self.work.notes.push(format!(
                "{name}: a script with its own `#!` line continues after a failed command; add `set -e`"
            ));
        }
        let (content, _) = self.content("script", &script.content, span)?;
        let Script { env, user, workdir, timeout, network, .. } = script.clone();
        Some(protocol::Script { content, around: protocol::Around { env, user, workdir, timeout, network } })
    }

    /// Describes a file's content, and returns it with the mode of the
    /// project's file, if it is one.
    fn content(&mut self, name: &str, content: &Content, span: Span) -> Option<(Blob, u32)> {
        match content {
            Content::Text(text) => {
                let blob = Blob::of(text.as_bytes());
                self.d.content(format!("content of {name}"), blob.digest);
                self.work.blobs.insert(blob.digest, BlobSource::Bytes(Arc::from(text.as_bytes())));
                Some((blob, 0o644))
            }
            Content::Rendered(text, template) => {
                let (blob, _) = self.content(name, &Content::Text(text.clone()), span)?;
                match self.project.hash(template) {
                    // It has the mode of its template.
                    Ok((_, mode)) => Some((blob, mode)),
                    Err(error) => {
                        self.errors.push(GraphError { span, error: GraphErrorKind::File(error) });
                        None
                    }
                }
            }
            Content::File(file) => self.file(file, span),
        }
    }

    fn file(&mut self, file: &FileRef, span: Span) -> Option<(Blob, u32)> {
        match self.project.hash(file) {
            Ok((blob, mode)) => {
                self.d.content(format!("file {file}"), blob.digest);
                self.work.blobs.insert(blob.digest, BlobSource::File(file.clone()));
                Some((blob, mode))
            }
            Err(error) => {
                self.errors.push(GraphError { span, error: GraphErrorKind::File(error) });
                None
            }
        }
    }

    /// Describes a tree. Each file is a field, so that the reason of a rebuild
    /// can name it.
    fn tree(&mut self, dir: &FileRef, span: Span) -> Option<Blob> {
        let manifest: Manifest = match self.project.tree(dir) {
            Ok(manifest) => manifest,
            Err(error) => {
                self.errors.push(GraphError { span, error: GraphErrorKind::File(error) });
                return None;
            }
        };
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
        // The list contains only strings and numbers, so encoding can't fail.
        let bytes = serde_json::to_vec(&manifest).unwrap_or_default();
        let blob = Blob::of(&bytes);
        self.work.blobs.insert(blob.digest, BlobSource::Bytes(Arc::from(bytes)));
        Some(blob)
    }

    /// Adds a field if the value is set.
    fn optional<T: std::fmt::Display>(&mut self, name: String, value: Option<&T>) {
        if let Some(value) = value {
            self.d.value(name, value);
        }
    }

    fn owner(&mut self, name: &str, owner: &model::Owner) -> protocol::Owner {
        self.d.value(format!("{name} owner"), format_args!("{}:{}", owner.user, owner.group));
        protocol::Owner { user: owner.user.clone(), group: owner.group.clone() }
    }
}

fn join(dir: &str, path: &str) -> String {
    if dir.is_empty() { path.to_owned() } else { format!("{dir}/{path}") }
}

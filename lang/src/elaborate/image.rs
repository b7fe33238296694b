//! Images: their origin, machine, layers and outputs.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::context::{Elaborator, Vars};
use super::effect::{Effect, Use};
use super::growing::{Below, Growing, Inherited, Made};
use super::primitive;
use crate::diagnostic::{Code, Diagnostic, MOST};
use crate::model::{Bootstrap, DiskFormat, Image, Kernel, Machine, Model, Origin, Output};
use crate::resolve::{At, Declarations};
use crate::source::{FileKind, FileRef, Span};
use crate::syntax::{Arg, Scalar};
use crate::template::Scope;
use crate::value;

/// The largest disk, in bytes: the most that vimg reads of a qcow2 file's header.
const MAX_DISK: u64 = 16 << 40;

impl Elaborator<'_> {
    pub(super) fn images<'d>(
        &mut self,
        declarations: &'d Declarations<'d>,
        params: Vars,
        rebuilt: Option<&str>,
        needed: &HashSet<usize>,
    ) -> Model {
        let mut model = Model { secrets: self.all_secrets(declarations, &params), ..Model::default() };
        let mut placed: HashMap<usize, usize> = HashMap::new();
        let mut made: Vec<Made<'d>> = Vec::new();
        for &index in &declarations.order {
            // A mistake is repeated for each layer that applies its configuration.
            if self.out.len() >= 10 * MOST {
                break;
            }
            let declared = &declarations.images[index];
            let parent = declared.from.and_then(|i| placed.get(&i).copied());
            let image = Below { images: &model.images, made: &made, declarations, params: &params };
            let before = self.out.len();
            let (mut image, known) = self.image(declared.at, parent, &image);
            image.needed = needed.contains(&index);
            let is_complete = image.needed || self.forgive(before);
            image.complete = is_complete && parent.is_none_or(|parent| model.images[parent].complete);
            placed.insert(index, model.images.len());
            model.images.push(image);
            made.push(known);
        }
        if let Some(index) = rebuilt.and_then(|name| model.images.iter().position(|i| i.name == name)) {
            let below = Below { images: &model.images, made: &made, declarations, params: &params };
            let image = self.rebuilt(index, &below);
            model.images.push(image);
        }
        for server in &declarations.servers {
            let Some(image) = placed.get(&server.image) else { continue };
            let below = Below { images: &model.images, made: &made, declarations, params: &params };
            let before = self.out.len();
            let made = self.server(server.at, *image, &below);
            // An unneeded server that lacks files is left out.
            if needed.contains(&server.image) || self.forgive(before) {
                model.servers.push(made);
            }
        }
        self.output_paths(&model);
        model
    }

    /// Forgets missing files among the mistakes from `before` on. Returns whether
    /// there were none.
    fn forgive(&mut self, before: usize) -> bool {
        let since = self.out.split_off(before);
        let count = since.len();
        self.out.extend(since.into_iter().filter(|d| d.code != Code::UnreadableFile));
        self.out.len() == before + count
    }

    /// Reports outputs that would overwrite each other or a file that the recipe reads.
    pub(super) fn output_paths(&mut self, model: &Model) {
        let mut paths: BTreeMap<&str, Span> = BTreeMap::new();
        for output in model.images.iter().flat_map(|i| &i.outputs) {
            if let Some(first) = paths.insert(&output.path, output.span) {
                self.out.push(
                    Diagnostic::error(Code::Conflict, output.span, "two outputs have the same path")
                        .related(first, "the other one")
                        .help("give each output its own path"),
                );
            }
            let file = FileRef::project(output.path.clone());
            // An output inside a copied directory is no conflict: vimg leaves it out of
            // the copy.
            let read = self.used.contains(&file);
            if read || self.sources.iter().any(|s| s.name == file.to_string()) {
                self.out.push(
                    Diagnostic::error(Code::Conflict, output.span, format!("the recipe reads `{file}`"))
                        .help("write the output elsewhere"),
                );
            }
        }
    }

    pub(super) fn image<'d>(
        &mut self,
        at: At<'d>,
        parent: Option<usize>,
        below: &Below<'_, 'd>,
    ) -> (Image, Made<'d>) {
        let scope = Scope::new(below.params.clone());
        let mut inherited = parent.map_or_else(Inherited::default, |p| below.made[p].inherited.clone());
        let parent = parent.map(|p| (p, below.images[p].layers.len()));
        let (origin, origin_span) = self.origin(at, parent, &scope);
        if let Some(machine) = at.child("machine") {
            self.machine(machine, parent.is_some(), &mut inherited.machine, &scope);
        }
        let image = Image {
            name: at.name().to_owned(),
            span: at.arg_span(),
            origin,
            origin_span,
            machine: inherited.machine,
            layers: Vec::new(),
            outputs: Vec::new(),
            checks: Vec::new(),
            needed: true,
            complete: true,
        };
        let start = inherited.effect.clone();
        let mut growing = Growing { image, made: Made { inherited, below: start, after: Vec::new() } };
        self.layers(at, &mut growing, below);
        let Growing { mut image, made } = growing;
        image.name_layers();
        for output in at.children_named("output") {
            let output = self.output(output, &image.machine, &scope);
            image.outputs.extend(output);
        }
        self.scripts_have_an_agent(&image, &made.inherited.effect);
        image.checks = at.children_named("check").map(|c| self.check(c, &scope)).collect();
        (image, made)
    }

    pub(super) fn layers<'d>(&mut self, at: At<'d>, growing: &mut Growing<'d>, below: &Below<'_, 'd>) {
        for child in at.children() {
            match child.node.name.as_str() {
                "layer" => self.layer(child, growing, below),
                "replace" => self.replace(child, growing, below),
                "remove" => self.remove(child, growing, below),
                _ => {}
            }
        }
    }

    pub(super) fn layer<'d>(&mut self, at: At<'d>, growing: &mut Growing<'d>, below: &Below<'_, 'd>) {
        let Some(configuration) = below.declarations.configurations.get(at.name()) else { return };
        let wanted = Use { at, configuration, were: Vars::new() };
        let part = self.part(&wanted, &mut growing.made.inherited, below);
        growing.push_plain(part);
    }

    pub(super) fn origin(&mut self, at: At, parent: Option<(usize, usize)>, scope: &Scope) -> (Origin, Span) {
        if let (Some(from), Some((parent, layers))) = (at.child("from"), parent) {
            return (Origin::Image(parent, layers), from.head());
        }
        if let Some(disk) = at.child("disk") {
            let file = disk.node.args.first().and_then(|a| self.host_path(a, disk, scope, FileKind::File));
            let sha256 = disk.node.prop("sha256").and_then(|a| self.text(a, disk, scope)).unwrap_or_default();
            if sha256.len() != 64 || !sha256.bytes().all(|b| b.is_ascii_hexdigit()) {
                let span = disk.node.prop("sha256").map_or_else(|| disk.head(), |a| disk.span(&a.range));
                self.out.push(
                    Diagnostic::error(
                        Code::InvalidValue,
                        span,
                        "invalid digest: expected 64 hexadecimal digits",
                    )
                    .help("`sha256sum FILE` prints the digest"),
                );
            }
            let origin = Origin::Disk {
                file: file.unwrap_or_else(|| FileRef::project("")),
                sha256: sha256.to_ascii_lowercase(),
            };
            return (origin, disk.head());
        }
        let Some(node) = at.child("bootstrap") else {
            return (Origin::Image(0, 0), at.arg_span());
        };
        let mut packages: Vec<String> = Vec::new();
        for package in node.children_named("package") {
            packages.extend(
                package
                    .node
                    .args
                    .iter()
                    .filter_map(|a| self.parsed(a, package, scope, primitive::package_name)),
            );
        }
        packages.sort();
        packages.dedup();
        self.suite_of(node);
        let text = |name: &str| node.node.prop(name);
        let bootstrap = Bootstrap {
            distribution: node.name().to_owned(),
            suite: text("suite").and_then(|a| self.text(a, node, scope)).unwrap_or_default(),
            mirror: text("mirror").and_then(|a| self.parsed(a, node, scope, value::mirror_url)),
            kernel: self.prop_text(node, "kernel", scope).and_then(|t| Kernel::parse(&t)).unwrap_or_default(),
            packages,
        };
        (Origin::Bootstrap(bootstrap), node.head())
    }

    /// Checks that a suite is one of its distribution.
    fn suite_of(&mut self, node: At) {
        let suites = self.distributions.iter().find(|known| known.name == node.name());
        let suites = suites.map_or(&[][..], |known| known.suites);
        if let Some(arg) = node.node.prop("suite")
            && let Scalar::String(suite) = &arg.value
            && !suites.contains(&suite.as_str())
        {
            let message = format!("`{}` has no suite `{suite}`", node.name());
            let diagnostic = Diagnostic::error(Code::InvalidValue, node.span(&arg.range), message);
            self.out.push(diagnostic.suggest(suite, suites.iter().copied()));
        }
    }

    pub(super) fn machine(&mut self, at: At, derived: bool, machine: &mut Machine, scope: &Scope) {
        let refuse = |at: At, arg: &Arg, message: &str, help: &str| {
            Diagnostic::error(Code::InvalidValue, at.span(&arg.range), message).help(help)
        };
        if let Some(arg) = at.node.prop("cpus") {
            match self.int(arg, at, scope) {
                Some(n @ 1..=64) => machine.cpus = n as u32,
                Some(_) => {
                    let message = "invalid number of CPUs: expected 1 to 64";
                    self.out.push(refuse(at, arg, message, "2 are enough for most machines"))
                }
                None => {}
            }
        }
        if let Some(arg) = at.node.prop("memory") {
            match self.size(arg, at, scope) {
                Some(n) if (128 << 20..=1 << 40).contains(&n) => machine.memory = n,
                Some(_) => self.out.push(refuse(
                    at,
                    arg,
                    "invalid memory size: expected 128 MiB to 1 TiB",
                    "1GiB is enough for most machines",
                )),
                None => {}
            }
        }
        if let Some(arg) = at.node.prop("disk") {
            match self.size(arg, at, scope).map(|n| n.checked_next_multiple_of(1 << 20).unwrap_or(n)) {
                Some(n) if derived && n < machine.disk => self.out.push(
                    Diagnostic::error(
                        Code::Conflict,
                        at.span(&arg.range),
                        "the disk is smaller than that of the image below",
                    )
                    .help("disks only grow; set a smaller size in the image with `bootstrap`"),
                ),
                Some(n) if (1 << 30..=MAX_DISK).contains(&n) => machine.disk = n,
                Some(_) => {
                    let message = "invalid disk size: expected 1 GiB to 16 TiB";
                    self.out.push(refuse(at, arg, message, "8GiB is enough for most machines"))
                }
                None => {}
            }
        }
    }

    /// Reports outputs without the agent of an image that has scripts for it.
    fn scripts_have_an_agent(&mut self, image: &Image, effect: &Effect) {
        let Some(output) = image.outputs.iter().find(|output| !output.agent) else { return };
        let applied = effect.list();
        let mut steps = applied.iter().flat_map(|applied| &applied.part.steps);
        if let Some(script) = steps.find(|step| step.primitive.runs_later()) {
            self.out.push(
                Diagnostic::error(Code::Conflict, output.span, "this output needs the agent")
                    .related(script.span, "the agent runs this script in the finished machine")
                    .help("leave out `agent=#false`, or have the image's own init run the script"),
            );
        }
    }

    pub(super) fn output(&mut self, at: At, machine: &Machine, scope: &Scope) -> Option<Output> {
        let arg = at.node.prop("path")?;
        let path = self.text(arg, at, scope)?;
        let span = at.span(&arg.range);
        // In the path of an output, `std/` is a plain directory.
        let normal = FileRef::project("")
            .join(&format!("./{path}"))
            .filter(|f| !path.starts_with('/') && !f.path.is_empty());
        let Some(file) = normal else {
            self.out.push(
                Diagnostic::error(Code::InvalidValue, span, "an output must be below the output directory")
                    .help(
                        "expected a relative path such as \"web.qcow2\"; `--output DIR` sets the directory",
                    ),
            );
            return None;
        };
        let format = DiskFormat::parse(at.name())?;
        let mut size = None;
        if let Some(arg) = at.node.prop("size") {
            let wanted = self.size(arg, at, scope)?;
            if !(machine.disk..=MAX_DISK).contains(&wanted) {
                let least = machine.disk >> 20;
                self.out.push(
                    Diagnostic::error(Code::InvalidValue, at.span(&arg.range), "invalid disk size").help(
                        format!("expected {least} MiB, the size of the image, to 16 TiB; disks only grow"),
                    ),
                );
            }
            size = Some(wanted.next_multiple_of(1 << 20)).filter(|size| *size > machine.disk);
        }
        let agent = self.prop_bool(at, "agent", scope).unwrap_or(true);
        Some(Output { format, path: file.path, size, agent, span: at.head() })
    }
}

/// The indexes of the images that must have all their files: those with these names
/// or of servers with these names, and those below. All, if there are no names.
pub(super) fn needed(declarations: &Declarations, only: &[String]) -> HashSet<usize> {
    let images = &declarations.images;
    if only.is_empty() {
        return (0..images.len()).collect();
    }
    let named = |at: At| only.iter().any(|name| name == at.name());
    let servers = declarations.servers.iter().filter(|s| named(s.at)).map(|s| s.image);
    let mut next: Vec<usize> = (0..images.len()).filter(|n| named(images[*n].at)).chain(servers).collect();
    let mut needed = HashSet::new();
    while let Some(index) = next.pop() {
        // Images can start from each other in a circle only in a broken recipe.
        if needed.insert(index) {
            next.extend(images[index].from);
        }
    }
    needed
}

impl Image {
    /// Numbers layers of the same name.
    pub(super) fn name_layers(&mut self) {
        let mut times: HashMap<String, usize> = HashMap::new();
        for layer in &mut self.layers {
            let count = times.entry(layer.name.clone()).or_default();
            *count += 1;
            if *count > 1 {
                layer.name = format!("{}#{count}", layer.name);
            }
        }
    }
}

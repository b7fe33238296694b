//! From declarations to the [`Model`]: fills in inputs, renders templates and
//! turns nodes into typed values. Names are known to be good by now.

use std::collections::{BTreeMap, HashMap, HashSet};

use crate::diagnostic::{Code, Diagnostic, MOST};
use crate::load;
use crate::model::{Bootstrap, Check, DiskFormat, Image, Layer, Machine, Model, Origin, Output};
use crate::resolve::{self, At, Capability, Configuration, Declarations};
use crate::source::{FileKind, FileRef, Files, SourceId, Sources, Span};
use crate::syntax::Arg;
use crate::template::{Renderer, Scope};
use crate::value::Value;

mod check;
mod inputs;
mod primitive;
mod single;

/// What to compile.
pub struct Request<'a> {
    /// Reads the project.
    pub files: &'a dyn Files,
    /// The main recipe.
    pub entry: FileRef,
    /// Parameters from the command line, as `name` and text.
    pub set: &'a [(String, String)],
    /// A values file: its name and its text.
    pub values: Option<(String, String)>,
}

/// Compiles a recipe. All mistakes of the first phase that finds any are
/// returned; each text that was read is in `sources`, so that they can be
/// shown.
pub fn compile(request: &Request, sources: &mut Sources) -> Result<Model, Vec<Diagnostic>> {
    let mut out = Vec::new();
    let loaded = load::load(request.files, &request.entry, sources, &mut out);
    let declarations =
        if out.is_empty() { resolve::resolve(&loaded, &mut out) } else { Declarations::default() };
    let mut elaborator = Elaborator {
        files: request.files,
        sources,
        out,
        renderer: Renderer::new(),
        templates: HashMap::new(),
        used: HashSet::new(),
    };
    let mut model = Model::default();
    if elaborator.out.is_empty() {
        let params = elaborator.params(&declarations, request);
        if elaborator.out.is_empty() {
            model = elaborator.images(&declarations, params);
        }
    }
    let mut out = elaborator.out;
    if out.is_empty() {
        return Ok(model);
    }
    // A configuration that is applied twice reports its mistakes twice.
    let mut seen = HashSet::new();
    out.retain(|d| seen.insert((d.code, d.primary.as_ref().map(|(span, _)| *span), d.message.clone())));
    out.truncate(MOST);
    Err(out)
}

type Vars = BTreeMap<String, Value>;

/// Who provides a capability in an image, and with which values.
#[derive(Clone)]
struct Provider {
    configuration: String,
    span: Span,
    values: Vars,
    /// Its layer has a mistake: nothing is known of its inputs.
    broken: bool,
}

/// What an image hands on to those made from it.
#[derive(Clone, Default)]
struct Inherited {
    machine: Machine,
    providers: BTreeMap<String, Provider>,
}

struct Elaborator<'a> {
    files: &'a dyn Files,
    sources: &'a mut Sources,
    out: Vec<Diagnostic>,
    renderer: Renderer,
    templates: HashMap<FileRef, Option<SourceId>>,
    /// Files and directories of the project that the recipe names.
    used: HashSet<FileRef>,
}

impl Elaborator<'_> {
    fn images(&mut self, declarations: &Declarations, params: Vars) -> Model {
        let mut model = Model::default();
        let mut placed: HashMap<usize, usize> = HashMap::new();
        let mut handed: Vec<Inherited> = Vec::new();
        for &index in &declarations.order {
            // Each mistake may stand here many times, for as many layers.
            if self.out.len() >= 10 * MOST {
                break;
            }
            let declared = &declarations.images[index];
            let parent = declared.from.and_then(|i| placed.get(&i).copied());
            let mut inherited = parent.map_or_else(Inherited::default, |p| handed[p].clone());
            let image = self.image(declared.at, parent, &mut inherited, declarations, &params);
            placed.insert(index, model.images.len());
            model.images.push(image);
            handed.push(inherited);
        }
        self.output_paths(&model);
        model
    }

    /// Outputs must not be written over each other, nor over what the recipe
    /// reads.
    fn output_paths(&mut self, model: &Model) {
        let mut paths: BTreeMap<&str, Span> = BTreeMap::new();
        for output in model.images.iter().flat_map(|i| &i.outputs) {
            if let Some(first) = paths.insert(&output.path, output.span) {
                self.out.push(
                    Diagnostic::error(Code::Conflict, output.span, "two outputs have the same path")
                        .related(first, "the other one")
                        .help("give each its own path"),
                );
            }
            let file = FileRef::project(output.path.clone());
            let below =
                |dir: &FileRef| dir.root == file.root && file.path.starts_with(&format!("{}/", dir.path));
            let read = self.used.contains(&file) || self.used.iter().any(below);
            if read || self.sources.iter().any(|s| s.name == file.to_string()) {
                self.out.push(
                    Diagnostic::error(Code::Conflict, output.span, format!("`{file}` is read by the recipe"))
                        .help("write the output elsewhere"),
                );
            }
        }
    }

    fn image(
        &mut self,
        at: At,
        parent: Option<usize>,
        inherited: &mut Inherited,
        declarations: &Declarations,
        params: &Vars,
    ) -> Image {
        let scope = Scope::new(params.clone());
        let (origin, origin_span) = self.origin(at, parent, &scope);
        if let Some(machine) = at.child("machine") {
            self.machine(machine, parent.is_some(), &mut inherited.machine, &scope);
        }
        let mut image = Image {
            name: at.name().to_owned(),
            span: at.arg_span(),
            origin,
            origin_span,
            machine: inherited.machine,
            layers: Vec::new(),
            outputs: Vec::new(),
            checks: Vec::new(),
        };
        let mut times: HashMap<&str, usize> = HashMap::new();
        for layer in at.children_named("layer") {
            let Some(configuration) = declarations.configurations.get(layer.name()) else { continue };
            let count = times.entry(configuration.at.name()).or_default();
            *count += 1;
            let mut made = self.layer(layer, configuration, inherited, declarations, params);
            if *count > 1 {
                made.name = format!("{}#{count}", made.name);
            }
            image.layers.push(made);
        }
        for output in at.children_named("output") {
            image.outputs.extend(self.output(output, &scope));
        }
        image.checks = at.children_named("check").map(|c| self.check(c, &scope)).collect();
        image
    }

    fn origin(&mut self, at: At, parent: Option<usize>, scope: &Scope) -> (Origin, Span) {
        if let (Some(from), Some(parent)) = (at.child("from"), parent) {
            return (Origin::Image(parent), from.head());
        }
        if let Some(disk) = at.child("disk") {
            let file = disk.node.args.first().and_then(|a| self.host_path(a, disk, scope, FileKind::File));
            let sha256 = disk.node.prop("sha256").and_then(|a| self.text(a, disk, scope)).unwrap_or_default();
            if sha256.len() != 64 || !sha256.bytes().all(|b| b.is_ascii_hexdigit()) {
                let span = disk.node.prop("sha256").map_or_else(|| disk.head(), |a| disk.span(&a.range));
                self.out.push(
                    Diagnostic::error(Code::InvalidValue, span, "`sha256` takes 64 hexadecimal digits")
                        .help("`sha256sum FILE` prints them"),
                );
            }
            let origin = Origin::Disk {
                file: file.unwrap_or_else(|| FileRef::project("")),
                sha256: sha256.to_ascii_lowercase(),
            };
            return (origin, disk.head());
        }
        let Some(node) = at.child("bootstrap") else {
            return (Origin::Image(0), at.arg_span());
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
        let text = |name: &str| node.node.prop(name);
        let bootstrap = Bootstrap {
            distribution: node.name().to_owned(),
            suite: text("suite").and_then(|a| self.text(a, node, scope)).unwrap_or_default(),
            mirror: text("mirror").and_then(|a| self.text(a, node, scope)),
            packages,
        };
        (Origin::Bootstrap(bootstrap), node.head())
    }

    fn machine(&mut self, at: At, derived: bool, machine: &mut Machine, scope: &Scope) {
        let refuse = |at: At, arg: &Arg, message: &str, help: &str| {
            Diagnostic::error(Code::InvalidValue, at.span(&arg.range), message).help(help)
        };
        if let Some(arg) = at.node.prop("cpus") {
            match self.int(arg, at, scope) {
                Some(n @ 1..=64) => machine.cpus = n as u32,
                Some(_) => {
                    self.out.push(refuse(at, arg, "a machine has 1 to 64 processors", "2 will do for most"))
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
                    "a machine has 128 MiB to 1 TiB of memory",
                    "1GiB will do for most",
                )),
                None => {}
            }
        }
        if let Some(arg) = at.node.prop("disk") {
            match self.size(arg, at, scope).map(|n| n.checked_next_multiple_of(1 << 20).unwrap_or(n)) {
                Some(n) if derived && n != machine.disk => self.out.push(
                    Diagnostic::error(
                        Code::Conflict,
                        at.span(&arg.range),
                        "the disk is as large as that of the image below",
                    )
                    .help("set `disk` where the disk is made: beside `bootstrap`"),
                ),
                Some(n) if (1 << 30..=16 << 40).contains(&n) => machine.disk = n,
                Some(_) => {
                    self.out.push(refuse(at, arg, "a disk has 1 GiB to 16 TiB", "8GiB will do for most"))
                }
                None => {}
            }
        }
    }

    fn output(&mut self, at: At, scope: &Scope) -> Option<Output> {
        let arg = at.node.prop("path")?;
        let path = self.text(arg, at, scope)?;
        let span = at.span(&arg.range);
        // A plain path: `std/` has no meaning here.
        let normal = FileRef::project("")
            .join(&format!("./{path}"))
            .filter(|f| !path.starts_with('/') && !f.path.is_empty());
        let Some(file) = normal else {
            self.out.push(
                Diagnostic::error(Code::InvalidValue, span, "an output stays below the output directory")
                    .help("a relative path such as \"web.qcow2\"; `--output DIR` says below what"),
            );
            return None;
        };
        let format = if at.name() == "raw" { DiskFormat::Raw } else { DiskFormat::Qcow2 };
        Some(Output { format, path: file.path, span: at.head() })
    }

    fn layer(
        &mut self,
        at: At,
        configuration: &Configuration,
        inherited: &mut Inherited,
        declarations: &Declarations,
        params: &Vars,
    ) -> Layer {
        let own = self.inputs(at, configuration, params);
        let mut vars = params.clone();
        for (name, span) in &configuration.requires {
            match inherited.providers.get(*name) {
                Some(provider) if provider.broken => {
                    self.broken(at, configuration, inherited);
                    return empty_layer(at, configuration);
                }
                Some(provider) => vars.extend(provider.values.clone()),
                None => {
                    let providers: Vec<String> = declarations
                        .configurations
                        .values()
                        .filter(|c| c.provides.iter().any(|(p, _)| p == name))
                        .map(|c| format!("`layer \"{}\"`", c.at.name()))
                        .collect();
                    let help = if providers.is_empty() {
                        "no configuration provides it; declare one".to_owned()
                    } else {
                        let mut providers = providers;
                        providers.sort();
                        format!("add {} before this layer", providers.join(" or "))
                    };
                    self.out.push(
                        Diagnostic::error(
                            Code::UnmetRequirement,
                            at.head(),
                            format!("nothing below `{}` provides `{name}`", configuration.at.name()),
                        )
                        .related(*span, "required here")
                        .help(help),
                    );
                    // Its inputs are unknown: rendering would only add noise.
                    self.broken(at, configuration, inherited);
                    return empty_layer(at, configuration);
                }
            }
        }
        let Some(own) = own else {
            self.broken(at, configuration, inherited);
            return empty_layer(at, configuration);
        };
        vars.extend(own.clone());
        let scope = Scope::new(vars.clone());
        let steps = self.steps(configuration.at, &scope);
        let reads = scope.reads();
        let mut checks: Vec<Check> =
            configuration.at.children_named("check").map(|c| self.check(c, &scope)).collect();
        for (name, _) in &configuration.provides {
            let Some(capability) = declarations.capabilities.get(name) else { continue };
            let provider = self.provide(at, configuration, capability, &own, inherited);
            let scope = Scope::new(provider.values.clone());
            checks.extend(capability.at.children_named("check").map(|c| self.check(c, &scope)));
            inherited.providers.insert((*name).to_owned(), provider);
        }
        Layer {
            name: configuration.at.name().to_owned(),
            configuration: configuration.at.name().to_owned(),
            span: at.head(),
            steps,
            reads,
            booted: needs_booted(configuration.at),
            checks,
        }
    }

    /// Notes that a layer with a mistake would have provided something, so
    /// that those who require it are not reported as well.
    fn broken(&self, at: At, configuration: &Configuration, inherited: &mut Inherited) {
        for (name, _) in &configuration.provides {
            let configuration = configuration.at.name().to_owned();
            let provider = Provider { configuration, span: at.head(), values: Vars::new(), broken: true };
            inherited.providers.entry((*name).to_owned()).or_insert(provider);
        }
    }

    fn provide(
        &mut self,
        at: At,
        configuration: &Configuration,
        capability: &Capability,
        own: &Vars,
        inherited: &Inherited,
    ) -> Provider {
        let name = capability.at.name();
        if let Some(other) = inherited.providers.get(name) {
            self.out.push(
                Diagnostic::error(
                    Code::TwoProviders,
                    at.head(),
                    format!("`{name}` is already provided by `{}`", other.configuration),
                )
                .related(other.span, "by this layer")
                .help("an image has one provider of a capability; drop one of the layers"),
            );
        }
        let values = capability
            .inputs
            .iter()
            .filter_map(|i| {
                let name = crate::value::template_name(i.at.name());
                let value = own.get(&name)?.clone();
                Some((name, value))
            })
            .collect();
        Provider { configuration: configuration.at.name().to_owned(), span: at.head(), values, broken: false }
    }
}

/// Whether a configuration, or a script of it, says that it needs the machine
/// to run, or can't be meant otherwise.
fn needs_booted(configuration: At) -> bool {
    configuration.child("needs").is_some()
        || configuration.child("reboot").is_some()
        || configuration.children_named("run").any(|run| run.child("needs").is_some())
}

fn empty_layer(at: At, configuration: &Configuration) -> Layer {
    Layer {
        name: configuration.at.name().to_owned(),
        configuration: configuration.at.name().to_owned(),
        span: at.head(),
        steps: Vec::new(),
        reads: BTreeMap::new(),
        booted: false,
        checks: Vec::new(),
    }
}

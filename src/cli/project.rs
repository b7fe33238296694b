//! Opens the project and compiles its recipe, which most commands do first.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use vimg_lang::{Code, FileRef, Model, Partial, Request, Sources, compile_part};

use super::caching::CacheArgs;
use super::consent::Consent;
use super::global::Global;
use super::output::{Error, HOST, RECIPE, note};
use crate::base;
use crate::digest::{Description, Digest};
use crate::files::Project;
use crate::graph::{Graph, GraphError, GraphErrorKind, NodeId, Work};
use crate::report::Style;
use crate::store::{Area, Last, ProjectFiles, Store};

/// A compiled recipe and everything that commands need with it.
pub(super) struct Loaded {
    pub(super) project: Project,
    pub(super) sources: Sources,
    pub(super) model: Model,
    pub(super) store: Store,
    pub(super) notes: ProjectFiles,
    pub(super) consent: Consent,
    last: JoinHandle<Last>,
}

impl Loaded {
    /// Says which parameters have no value, if any.
    pub(super) fn tell_open(&self, style: Style) {
        let names: Vec<String> = self.model.open.iter().map(|name| format!("`{name}`")).collect();
        if let [first, ..] = self.model.open.as_slice() {
            let (s, have) = if names.len() == 1 { ("", "has") } else { ("s", "have") };
            let text = format!(
                "the parameter{s} {} {have} no value, so what depends on that is not checked. \
                 `--set {first}=...` or `--values FILE` gives one",
                names.join(", ")
            );
            note(text, style);
        }
    }

    /// Returns the keys and states of the last build. Call it once: later calls
    /// return nothing.
    pub(super) fn last(&mut self) -> Last {
        let last = std::mem::replace(&mut self.last, std::thread::spawn(Last::default));
        last.join().unwrap_or_default()
    }
}

/// Returns the directory of the store.
pub(super) fn store_path(global: &Global) -> Result<PathBuf, Error> {
    if let Some(path) = &global.store {
        return Ok(path.clone());
    }
    let dir = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
    dir("XDG_CACHE_HOME")
        .or_else(|| Some(dir("HOME")?.join(".cache")))
        .map(|cache| cache.join("vimg"))
        .ok_or_else(|| {
            Error::Message(
                "neither XDG_CACHE_HOME nor HOME is set".into(),
                Some("name a directory for the store with --store DIR".into()),
                HOST,
            )
        })
}

/// Finds the project's root and the name of the main recipe in it.
pub(super) fn find(global: &Global) -> Result<(PathBuf, String), Error> {
    let named = |path: &Path| {
        let dir = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let name = path.file_name()?.to_str()?;
        Some((dir.to_owned(), name.to_owned()))
    };
    if let Some(file) = &global.file {
        if file.is_dir() {
            return Ok((file.clone(), RECIPE_NAME.into()));
        }
        return named(file).ok_or_else(|| {
            Error::Message(format!("`{}` is not a recipe file", file.display()), None, RECIPE)
        });
    }
    let here =
        std::env::current_dir().map_err(|e| Error::host(format!("can't find the current directory: {e}")))?;
    if let Some(dir) = upwards(&here).find(|dir| dir.join(RECIPE_NAME).exists()) {
        return Ok((dir.to_owned(), RECIPE_NAME.to_owned()));
    }
    // vimg uses a recipe of another user only if `--file` names it.
    let foreign = here.ancestors().map(|dir| dir.join(RECIPE_NAME)).find_map(|path| {
        let owners =
            [std::fs::symlink_metadata(&path).ok()?.uid(), std::fs::metadata(path.parent()?).ok()?.uid()];
        let own = rustix::process::geteuid().as_raw();
        let other = owners.into_iter().find(|uid| ![own, 0].contains(uid))?;
        Some((path, other))
    });
    let (message, help) = match foreign {
        Some((path, uid)) => (
            format!("ignored {}: it belongs to another user (uid {uid})", path.display()),
            format!("to use it: --file {}", path.display()),
        ),
        None => (
            "there is no `main.vimg` here or in a directory above".to_owned(),
            "`vimg init` writes one; `--file FILE` names another".to_owned(),
        ),
    };
    Err(Error::Message(message, Some(help), RECIPE))
}

/// The name of a main recipe.
const RECIPE_NAME: &str = "main.vimg";

/// Walks up from the current directory. Stops at a directory of another owner,
/// another filesystem, or `$HOME`, because others may put recipes further up.
fn upwards(here: &Path) -> impl Iterator<Item = &Path> {
    let home = std::env::var_os("HOME").map(PathBuf::from).filter(|home| home.is_absolute());
    let device = std::fs::metadata(here).map(|meta| meta.dev()).ok();
    let own = rustix::process::geteuid().as_raw();
    let may_hold = move |dir: &Path| {
        let trusted = |meta: &std::fs::Metadata| [own, 0].contains(&meta.uid());
        let meta = std::fs::metadata(dir).ok();
        let recipe = std::fs::symlink_metadata(dir.join(RECIPE_NAME));
        meta.is_some_and(|meta| trusted(&meta) && Some(meta.dev()) == device)
            && recipe.map_or(true, |recipe| trusted(&recipe))
    };
    let mut over = false;
    here.ancestors()
        .enumerate()
        .take_while(move |(n, dir)| {
            let goes_on = !over && (*n == 0 || may_hold(dir));
            over = home.as_deref() == Some(*dir);
            goes_on
        })
        .map(|(_, dir)| dir)
}

/// An open project, before its recipe is read.
pub(super) struct Opened {
    pub(super) project: Project,
    pub(super) store: Store,
    pub(super) notes: ProjectFiles,
    pub(super) consent: Consent,
    entry: FileRef,
    /// The values file's name and text.
    values: Option<(String, String)>,
}

/// Opens the store, without any project.
pub(super) fn store(global: &Global) -> Result<Store, Error> {
    Ok(Store::open(&store_path(global)?)?)
}

/// Opens the project.
pub(super) fn open(global: &Global) -> Result<Opened, Error> {
    let (root, name) = find(global)?;
    let store = store(global)?;
    let project =
        Project::open(&root).map_err(|e| Error::Message(format!("{}: {e}", root.display()), None, RECIPE))?;
    let notes = store.project(project.root());
    let consent = Consent::of(project.root(), global)?;
    let store = CacheArgs::default().store(&consent, store);
    let values = match &global.values {
        None => None,
        Some(path) => Some((path.display().to_string(), super::read::read_recipe(path)?)),
    };
    Ok(Opened { project, store, notes, consent, entry: FileRef::project(name), values })
}

impl Opened {
    /// Returns a digest of everything that a plan depends on besides the project's
    /// files: this program, its options, and `rest`.
    pub(super) fn request(&self, global: &Global, rest: &[&str]) -> Digest {
        let mut d = Description::default();
        // The version is not enough: a developer's build keeps it.
        let program = std::fs::metadata("/proc/self/exe")
            .map(|m| format!("{}:{}:{}:{}:{}", m.dev(), m.ino(), m.len(), m.ctime(), m.ctime_nsec()));
        d.value("program", program.unwrap_or_else(|_| format!("process {}", std::process::id())));
        d.value("recipe", &self.entry);
        for (name, value) in &global.set {
            d.value(format!("set {name}"), value);
        }
        if let Some((name, text)) = &self.values {
            d.value("values", name);
            d.value("values", text);
        }
        for part in rest {
            d.value("asked", part);
        }
        d.key().0
    }

    /// Compiles the recipe. `rebuilt` names an image to add a clean rebuild of.
    pub(super) fn compile(
        self,
        global: &Global,
        partial: &Partial,
        rebuilt: Option<&str>,
    ) -> Result<Loaded, Error> {
        let Self { project, store, notes, consent, entry, values } = self;
        // Runs beside the compiler, because neither needs the other.
        let last = {
            let (store, notes) = (store.clone(), notes.clone());
            std::thread::spawn(move || store.last(&notes))
        };
        let project = project.knowing(notes.stamps(), store.dir(Area::Parsed));
        let mut sources = Sources::default();
        let distributions = base::known(base::BUILT_IN);
        let set = &global.set;
        let request = Request { files: &project, entry, set, values, rebuilt, distributions: &distributions };
        match compile_part(&request, partial, &mut sources) {
            Ok(model) => {
                let mut outputs: Vec<String> =
                    model.images.iter().flat_map(|i| &i.outputs).map(|o| o.path.clone()).collect();
                // Outputs that `--output` wrote elsewhere below the root.
                let below =
                    |path: &PathBuf| Some(path.strip_prefix(project.root()).ok()?.to_str()?.to_owned());
                outputs.extend(notes.outputs().keys().filter_map(below));
                let project = project.without(outputs);
                let known: Vec<&str> = model.secrets.iter().map(|secret| secret.name.as_str()).collect();
                if let Some((name, _)) =
                    consent.given.iter().find(|(name, _)| !known.contains(&name.as_str()))
                {
                    let help = match known.is_empty() {
                        true => "the recipe declares no secret".to_owned(),
                        false => format!("the recipe declares: {}", known.join(", ")),
                    };
                    let message = format!("there is no secret `{name}` in the recipe");
                    return Err(Error::Message(message, Some(help), 2));
                }
                Ok(Loaded { project, sources, model, store, notes, consent, last })
            }
            Err(diagnostics) => Err(Error::Recipe(Box::new(sources), diagnostics)),
        }
    }
}

/// Opens the project and compiles its recipe, as far as a command needs it.
pub(super) fn load(global: &Global, partial: &Partial) -> Result<Loaded, Error> {
    open(global)?.compile(global, partial, None)
}

/// The part of a recipe that a command needs for these images, nodes and servers;
/// without any, the whole recipe.
pub(super) fn only<'a>(names: impl IntoIterator<Item = &'a String>) -> Partial {
    let image = |name: &String| name.split(['@', ':']).next().unwrap_or_default().to_owned();
    Partial { only: names.into_iter().map(image).collect(), open: false }
}

/// The part of a recipe that a command needs to show how these nodes are made. It
/// works without values for parameters.
pub(super) fn structure<'a>(names: impl IntoIterator<Item = &'a String>) -> Partial {
    Partial { open: true, ..only(names) }
}

/// Builds the graph of a compiled recipe.
pub(super) fn graph(loaded: &mut Loaded) -> Result<Graph, Error> {
    let mut graph = Graph::new(&loaded.model, &loaded.project, base::BUILT_IN)
        .map_err(|errors| unreadable(loaded, errors))?;
    graph.resolve(|key| loaded.store.stands_for(key));
    Ok(graph)
}

/// Reports files that can't be hashed as mistakes in the recipe.
pub(super) fn unreadable(loaded: &mut Loaded, errors: Vec<GraphError>) -> Error {
    let diagnostics = errors
        .into_iter()
        .map(|e| {
            let (code, help) = match e.error {
                GraphErrorKind::File(_) => (
                    Code::UnreadableFile,
                    "vimg reads every file that a recipe names, to see whether it changed",
                ),
                GraphErrorKind::Distribution(_) => {
                    (Code::InvalidValue, "`vimg doctor` lists the distributions")
                }
            };
            vimg_lang::Diagnostic::error(code, e.span, e.error.to_string()).help(help)
        })
        .collect();
    Error::Recipe(Box::new(std::mem::take(&mut loaded.sources)), diagnostics)
}

/// Stores the digests of files. Best effort: without them, the next run only
/// hashes files again.
pub(super) fn keep_stamps(notes: &ProjectFiles, project: Project) {
    let _ = notes.set_stamps(&project.into_stamps());
}

/// Returns the node that `image` or `image@layer` names; the layer may belong to
/// an image below.
pub(super) fn node(graph: &Graph, name: &str) -> Result<NodeId, Error> {
    if let Some(id) = graph.find(name) {
        return Ok(id);
    }
    if let Some((image, layer)) = name.split_once('@')
        && let Some(top) = graph.image(image)
    {
        let found = graph
            .chain(top)
            .into_iter()
            .rev()
            .find(|id| graph.node(*id).name.split_once('@').is_some_and(|(_, own)| own == layer));
        if let Some(id) = found {
            return Ok(id);
        }
    }
    let diagnostic = vimg_lang::Diagnostic::global(
        vimg_lang::Code::UnknownImage,
        format!("there is no `{name}` in the recipe"),
    )
    .suggest(name, graph.names());
    Err(Error::Message(diagnostic.message, diagnostic.help, 2))
}

/// Returns the node that a name means, if it has a disk to start a machine from.
pub(super) fn machine(graph: &Graph, name: &str) -> Result<NodeId, Error> {
    let id = node(graph, name)?;
    if matches!(graph.node(id).work, Work::Check(_) | Work::Export(_)) {
        return Err(Error::Message(format!("`{name}` has no machine; name an image or a layer"), None, 2));
    }
    Ok(id)
}

/// Returns the requested images; by default those that the project itself
/// declares.
pub(super) fn wanted(graph: &Graph, loaded: &Loaded, names: &[String]) -> Result<Vec<String>, Error> {
    if names.is_empty() {
        let own = loaded
            .model
            .images
            .iter()
            .filter(|i| !loaded.sources.get(i.span.source).name.starts_with("std/"));
        return Ok(own.map(|i| i.name.clone()).collect());
    }
    for name in names {
        if graph.image(name).is_none() {
            let diagnostic = vimg_lang::Diagnostic::global(
                vimg_lang::Code::UnknownImage,
                format!("there is no image `{name}`"),
            )
            .suggest(name, graph.images().iter().map(|(n, _)| n.as_str()));
            return Err(Error::Message(diagnostic.message, diagnostic.help, 2));
        }
    }
    Ok(names.to_vec())
}

/// How much of an image a command needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Extent {
    /// The states of its layers.
    States,
    /// Its checks, too.
    Checks,
    /// Its checks and its outputs, too.
    Outputs,
}

impl Extent {
    /// Its name in the request of a build.
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::States => "states",
            Self::Checks => "checks",
            Self::Outputs => "outputs",
        }
    }
}

/// Returns the nodes that a command needs of some images. If it needs checks or
/// outputs, it does not need the image's last layer: those may exist without it.
pub(super) fn nodes_of(graph: &Graph, images: &[String], extent: Extent) -> Vec<NodeId> {
    let mut nodes = Vec::new();
    for name in images {
        let mut own: Vec<NodeId> = Vec::new();
        if extent >= Extent::Outputs {
            own.extend(graph.targets().iter().filter(|t| t.image == *name).map(|t| t.node));
        }
        if extent >= Extent::Checks {
            own.extend(graph.checks(name));
        }
        if own.is_empty() {
            own.extend(graph.image(name));
        }
        nodes.extend(own);
    }
    nodes.sort_unstable();
    nodes.dedup();
    nodes
}

//! `vimg build`

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vimg_lang::Sources;

use super::caching::{self as cache, CacheArgs};
use super::consent::Consent;
use super::global::Global;
use super::interrupt::{interrupted, interruptible, stopped};
use super::junit::{self, Times};
use super::output::{Error, HOST, Outcome, STORE, unwritten, warn};
use super::project::{self, Extent};
use super::secrets;
use super::settings::{self, ProviderArgs};
use crate::base;
use crate::disk::QemuDisks;
use crate::event::{Event, Sink};
use crate::execute::caching::Caching;
use crate::execute::{self, Budget, BuildContext, Room, Secrets, StagedOutputs};
use crate::files::{Places, Project};
use crate::graph::{Graph, NodeId, Target};
use crate::host;
use crate::host::Lines;
use crate::host::network::Access;
use crate::plan::{Plan, PlanCache, Wanted};
use crate::provider::host::Host;
use crate::provider::qemu::Qemu;
use crate::report::{self, Style};
use crate::store::{ProjectFiles, Store};

/// Build images, check them and write their outputs
///
/// While it runs, vimg prints a line when a node starts and when it ends, and
/// the last output of a node that fails; a terminal also shows the nodes in
/// progress. `vimg log` prints the whole output of a layer, and `--verbose`
/// prints all output as it comes.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Images to build [default: all that the project declares]
    images: Vec<String>,
    /// Directory for outputs [default: the project's directory]
    #[arg(short, long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// Build only the layers: run no checks, seal nothing, write no outputs
    #[arg(long)]
    no_output: bool,
    #[command(flatten)]
    how: How,
}

/// Options of all commands that build.
#[derive(Debug, clap::Args)]
pub(super) struct How {
    /// Machines to start in parallel; a running one counts as half [default:
    /// one per two CPUs]
    #[arg(short, long, value_name = "N")]
    jobs: Option<usize>,
    /// Total memory for machines [default: three quarters of the host's memory]
    #[arg(long, value_name = "SIZE", value_parser = vimg_lang::value::size)]
    memory: Option<u64>,
    /// After a failure, continue with nodes that do not depend on the failed one
    #[arg(short, long)]
    keep_going: bool,
    /// Boot machines instead of forking memory snapshots, and save no snapshots
    #[arg(long)]
    no_memory: bool,
    #[command(flatten)]
    provider: ProviderArgs,
    #[command(flatten)]
    cache: CacheArgs,
}

pub(super) fn run(args: &Args, global: &Global, style: Style) -> Outcome {
    let extent = if args.no_output { Extent::States } else { Extent::Outputs };
    let dir = args.output.as_ref().map(|dir| std::path::absolute(dir).unwrap_or_else(|_| dir.clone()));
    build(&Asked { images: &args.images, extent, dir, how: &args.how, junit: None }, global, style)
}

/// A request to build: which images, how far, and how.
pub(super) struct Asked<'a> {
    pub(super) images: &'a [String],
    pub(super) extent: Extent,
    /// The directory for outputs; `None` is the project's root.
    pub(super) dir: Option<PathBuf>,
    pub(super) how: &'a How,
    /// The file for a JUnit report on the checks, if one is wanted.
    pub(super) junit: Option<&'a Path>,
}

pub(super) fn build(args: &Asked, global: &Global, style: Style) -> Outcome {
    let mut opened = project::open(global)?;
    let mut asked: Vec<&str> = args.images.iter().map(String::as_str).collect();
    asked.push(args.extent.word());
    let request = opened.request(global, &asked);
    let dir = args.dir.clone().unwrap_or_else(|| opened.project.root().to_owned());
    let caching = args.how.cache.open(&opened.consent, &opened.store)?;
    opened.store = caching.store(&opened.store);
    let cache::Opened { caches, notices, .. } = caching;
    // The common case: the plan cache is valid, so there is nothing to build.
    if args.junit.is_none()
        && caches.to.is_empty()
        && let Some(standing) = opened.notes.standing::<PlanCache>()
        && standing.holds(&request, &opened.project, &opened.store)
    {
        return reuse(standing, &opened, &dir, notices, style);
    }
    let (mut loaded, graph) = compile(opened, args.images, global, style)?;
    let images = project::wanted(&graph, &loaded, args.images)?;
    let nodes = project::nodes_of(&graph, &images, args.extent);
    let last = loaded.last();
    let project::Loaded { project, sources, model, store, notes, consent, .. } = loaded;
    let reporter = report::reporter(style);
    let project = Arc::new(project);
    let secrets = secrets::read_all(&model, &project, &consent);
    let machines = Machines::new(args.how, &store, &consent, &reporter.sink())?;
    let times = Arc::new(Times::default());
    let sink = if args.junit.is_some() { times.measuring(reporter.sink()) } else { reporter.sink() };
    let mut context = context(graph, &store, &project, secrets, sink, machines)?;
    let asked_for = images.iter().collect::<HashSet<_>>();
    let is_asked_for = |image: &String| args.extent == Extent::Outputs && asked_for.contains(image);
    let targets: Vec<_> = context.graph.targets().iter().filter(|t| is_asked_for(&t.image)).collect();
    let below = if targets.is_empty() { None } else { Some(places(&dir)?) };
    let staged = stage(&context.graph, targets, below.as_ref());
    context.staged = staged.clone();
    let may_leave = |name: &str| model.secrets.iter().any(|s| s.name == name && s.cache);
    let sink = reporter.sink();
    cache::tell(&sink, notices);
    let caching = Caching { caches: &caches, store: &store, sink: &sink, may_leave: &may_leave };
    let made = interruptible(execute::make(&mut context, &caching, &last, &nodes))?;
    if made.is_none() {
        reporter.end();
    }
    let text = "stopped; finished layers are stored, and the next build continues from them";
    let (plan, outcome) = made.ok_or_else(|| interrupted(text))?;
    let graph = context.graph.clone();
    drop(context);

    let reported = args.junit.map_or(Ok(()), |path| {
        let text = junit::report(&graph, &sources, &images, &store, &outcome.failures, &times);
        std::fs::write(path, text).map_err(|e| unwritten(path, &e, HOST))
    });
    // vimg writes the outputs of an image only after all its checks passed.
    let passed = |image: &str| graph.checks(image).iter().all(|id| store.has(&graph.node(*id).key));
    let targets = graph.targets().iter().filter(|t| is_asked_for(&t.image) && passed(&t.image));
    let wanted: Vec<Wanted> = targets.map(|target| Wanted::new(&graph, target)).collect();
    let is_whole = outcome.failures.is_empty();
    remember(project, &notes, |project| {
        is_whole.then(|| PlanCache::new(request, project, &graph, &plan, wanted.clone())).flatten()
    });
    let written = below.map_or(Ok(()), |below| write(wanted, &store, &notes, below, &staged, &sink));
    // Uploads come last: they may take long, and the outputs are written by now.
    let sent = match caches.to.is_empty() {
        true => Ok(Some(Ok(()))),
        false => interruptible(caching.send(&graph, &nodes)),
    };
    reporter.end();
    // The process is about to end, so freeing a large graph would waste time.
    std::mem::forget((graph, plan));
    reported?;
    written?;
    if !outcome.failures.is_empty() {
        return Err(Error::Build(Box::new(sources), outcome.failures));
    }
    let text = "stopped; everything is built, but not everything was sent to the caches";
    sent?.ok_or_else(|| interrupted(text))?.map_err(Error::host)
}

/// Compiles the part of the recipe that these images need, and prints its warnings.
fn compile(
    opened: project::Opened,
    images: &[String],
    global: &Global,
    style: Style,
) -> Result<(project::Loaded, Graph), Error> {
    let mut loaded = opened.compile(global, &project::only(images), None)?;
    if !style.json && !style.quiet {
        warn(&loaded.sources, &loaded.model.warnings, style);
    }
    let graph = project::graph(&mut loaded)?;
    Ok((loaded, graph))
}

/// Prepares copies of outputs beside the places of the outputs, if they have a place.
fn stage(graph: &Graph, targets: Vec<&Target>, below: Option<&Places>) -> Arc<StagedOutputs> {
    let name = |id| graph.node(id).name.as_str();
    let outputs = targets.into_iter().map(|t| (name(t.node), t.output.path.as_str()));
    below.map(|below| Arc::new(StagedOutputs::new(outputs, below))).unwrap_or_default()
}

/// Ends a build that has nothing to do: writes the outputs that are missing.
fn reuse(
    standing: PlanCache,
    opened: &project::Opened,
    dir: &Path,
    notices: Vec<String>,
    style: Style,
) -> Outcome {
    let reporter = report::reporter(style);
    let sink = reporter.sink();
    cache::tell(&sink, notices);
    let reused = standing.nodes();
    sink(Event::Planned { nodes: reused, reused });
    sink(Event::Finished { built: 0, reused, failed: 0, seconds: 0.0, boots: 0 });
    reporter.end();
    if standing.wanted.is_empty() {
        return Ok(());
    }
    write(standing.wanted, &opened.store, &opened.notes, places(dir)?, &Arc::default(), &sink)
}

/// Stores what makes the next build faster. Best effort: without a plan cache,
/// it is only slower.
fn remember(
    project: Arc<Project>,
    notes: &ProjectFiles,
    standing: impl FnOnce(&Project) -> Option<PlanCache>,
) {
    let Ok(project) = Arc::try_unwrap(project) else { return };
    if let Some(standing) = standing(&project) {
        let _ = notes.set_standing(&standing);
    }
    project::keep_stamps(notes, project);
}

fn places(dir: &Path) -> Result<Places, Error> {
    let opened = Places::open(dir);
    opened.map_err(|e| Error::Message(format!("{}: {e}", dir.display()), None, STORE))
}

/// States that exist, with the context in which their machines can start.
pub(super) struct Made {
    pub(super) context: BuildContext<Host>,
    pub(super) sources: Sources,
}

/// Builds those of the `wanted` states that are missing. `first` is a notice to
/// show before the build.
pub(super) fn states(
    mut loaded: project::Loaded,
    graph: Graph,
    wanted: &[NodeId],
    how: &How,
    style: Style,
    first: Option<String>,
) -> Result<Made, Error> {
    let last = loaded.last();
    let caching = how.cache.open(&loaded.consent, &loaded.store)?;
    let store = caching.store(&loaded.store);
    let cache::Opened { caches, notices, .. } = caching;
    let project::Loaded { project, sources, model, consent, .. } = loaded;
    let project = Arc::new(project);
    let reporter = report::reporter(style);
    let told = reporter.sink();
    let building = Plan::new(&graph, &store, &last, &BTreeMap::new(), wanted).to_build().next().is_some();
    let built = Arc::new(AtomicBool::new(!building));
    let quiet = built.clone();
    let sink: Sink = Arc::new(move |event| match event {
        // After the build, vimg reports only boots: a fork starts too quickly
        // to be worth a line.
        Event::Phase { phase, .. } if phase == "start" && quiet.load(Ordering::Relaxed) => {}
        event => told(event),
    });
    if let Some(text) = first {
        sink(Event::Notice { text });
    }
    let secrets = secrets::read_all(&model, &project, &consent);
    let machines = Machines::new(how, &store, &consent, &sink)?;
    let mut context = context(graph, &store, &project, secrets, sink.clone(), machines)?;
    if building {
        cache::tell(&sink, notices);
        // The user waits for a machine, so vimg uploads nothing here.
        let caching = Caching { caches: &caches, store: &store, sink: &sink, may_leave: &|_| false };
        let made = interruptible(execute::make(&mut context, &caching, &last, wanted))?;
        if made.is_none() {
            reporter.end();
        }
        let (_, outcome) = made.ok_or_else(stopped)?;
        if !outcome.failures.is_empty() {
            reporter.end();
            return Err(Error::Build(Box::new(sources), outcome.failures));
        }
    }
    built.store(true, Ordering::Relaxed);
    reporter.end();
    Ok(Made { context, sources })
}

/// What runs the machines of a build, as the user asked for.
struct Machines {
    provider: Host,
    disks: QemuDisks,
    access: Access,
    budget: Budget,
}

impl Machines {
    fn new(how: &How, store: &Store, consent: &Consent, sink: &Sink) -> Result<Self, Error> {
        let password = consent.allows_proxy_password();
        if !password && settings::proxies().have_password() {
            let text =
                "guests do not get the password of your proxy; to allow it, run `vimg trust`".to_owned();
            sink(Event::Notice { text });
        }
        let (choice, accel) = how.provider.choose()?;
        let notice = sink.clone();
        let notice: Lines = Arc::new(move |text: &str| notice(Event::Notice { text: text.to_owned() }));
        let (access, dirs) = (how.provider.access(password)?, settings::dirs(store));
        let disks = QemuDisks::new(dirs.probes.clone());
        let qemu = Qemu::new(accel, dirs, access.clone(), notice.clone());
        let provider = Host::new(choice, qemu, store.root(), notice);
        Ok(Self { provider, disks, access, budget: budget(how) })
    }
}

/// Creates the context of a build on this host.
fn context(
    graph: Graph,
    store: &Store,
    project: &Arc<Project>,
    secrets: Secrets,
    sink: Sink,
    machines: Machines,
) -> Result<BuildContext<Host>, Error> {
    let (room, lease) = Room::lease(store, &graph, &sink)?;
    Ok(BuildContext {
        lease,
        graph: Arc::new(graph),
        store: store.clone(),
        project: project.clone(),
        secrets: Arc::new(secrets),
        provider: Arc::new(machines.provider),
        disks: Arc::new(machines.disks),
        distributions: base::BUILT_IN,
        access: machines.access,
        sink,
        budget: machines.budget,
        staged: Arc::default(),
        room: Arc::new(room),
    })
}

/// Writes outputs; Ctrl-C stops it. An old file stays in place until the new one
/// is complete.
fn write(
    wanted: Vec<Wanted>,
    store: &Store,
    notes: &ProjectFiles,
    places: Places,
    staged: &Arc<StagedOutputs>,
    sink: &Sink,
) -> Outcome {
    let (store, notes, staged, sink) = (store.clone(), notes.clone(), staged.clone(), sink.clone());
    let work = move || execute::write_outputs(&wanted, &store, &notes, &places, &staged, &sink);
    let written = interruptible(async { tokio::task::spawn_blocking(work).await })?.ok_or_else(stopped)?;
    written.map_err(|e| Error::host(e.to_string()))?.map_err(|(path, e)| unwritten(&path, &e, STORE))
}

fn budget(args: &How) -> Budget {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    Budget {
        jobs: args.jobs.unwrap_or(processors.div_ceil(2)).max(1),
        memory: args.memory.unwrap_or_else(|| host::memory() / 4 * 3),
        keep_going: args.keep_going,
        use_snapshots: !args.no_memory,
    }
}

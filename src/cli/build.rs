//! `vimg build`

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use tokio::sync::watch;
use vimg_lang::Sources;

use super::caching::{self as cache, CacheArgs};
use super::consent::Consent;
use super::global::Global;
use super::output::{Error, INTERRUPTED, Outcome};
use super::project::{self, Extent};
use super::settings::{self, ProviderArgs};
use crate::event::{Event, Sink};
use crate::execute::caching::Caching;
use crate::execute::{self, Budget, BuildContext, Secrets, StagedOutputs};
use crate::files::{Places, Project};
use crate::graph::{Graph, NodeId};
use crate::host;
use crate::plan::{Plan, PlanCache, Wanted};
use crate::provider::Lines;
use crate::provider::host::Host;
use crate::provider::qemu::Qemu;
use crate::report::{self, Style};
use crate::store::{ProjectFiles, Store};

/// Build images, check them and write their outputs
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Images [default: all that the project declares]
    images: Vec<String>,
    /// Write outputs below this directory instead of the project's
    #[arg(short, long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// Make the states only; check, seal and write nothing
    #[arg(long)]
    no_output: bool,
    #[command(flatten)]
    how: How,
}

/// How a build is done.
#[derive(Debug, clap::Args)]
pub(super) struct How {
    /// How many machines to start at once; one that is up or only asked counts
    /// half [default: one for two processors]
    #[arg(short, long, value_name = "N")]
    jobs: Option<usize>,
    /// Memory for all machines together [default: three quarters of the host's]
    #[arg(long, value_name = "SIZE", value_parser = vimg_lang::value::size)]
    memory: Option<u64>,
    /// Go on with what does not depend on a node that failed
    #[arg(short, long)]
    keep_going: bool,
    /// Boot machines whenever they are needed, and keep no memory of them
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

/// What is asked of a build.
pub(super) struct Asked<'a> {
    pub(super) images: &'a [String],
    pub(super) extent: Extent,
    /// Where outputs go, if not below the project.
    pub(super) dir: Option<PathBuf>,
    pub(super) how: &'a How,
    /// A report on checks to write.
    pub(super) junit: Option<&'a Path>,
}

pub(super) fn build(args: &Asked, global: &Global, style: Style) -> Outcome {
    let mut opened = project::open(global)?;
    let mut asked: Vec<&str> = args.images.iter().map(String::as_str).collect();
    asked.push(match args.extent {
        Extent::States => "states",
        Extent::Checks => "checks",
        Extent::Outputs => "outputs",
    });
    let request = opened.request(global, &asked);
    let dir = args.dir.clone().unwrap_or_else(|| opened.project.root().to_owned());
    let places = || {
        let opened = Places::open(&dir);
        opened.map_err(|e| Error::Message(format!("{}: {e}", dir.display()), None, super::output::STORE))
    };
    let caching = args.how.cache.open(&opened.consent, &opened.store)?;
    opened.store = caching.store(&opened.store);
    let cache::Opened { caches, notices, .. } = caching;
    // The common case: nothing changed since all of it was there.
    if args.junit.is_none()
        && caches.to.is_empty()
        && let Some(standing) = opened.notes.standing::<PlanCache>()
        && standing.holds(&request, &opened.project, &opened.store)
    {
        let reporter = report::reporter(style);
        cache::tell(&reporter.sink(), notices);
        nothing_to_build(&reporter.sink(), standing.nodes());
        reporter.end();
        if standing.wanted.is_empty() {
            return Ok(());
        }
        let staged = Arc::new(StagedOutputs::default());
        return write(standing.wanted, &opened.store, &opened.notes, places()?, &staged, &reporter.sink());
    }
    let mut loaded = opened.compile(global, None)?;
    let graph = project::graph(&mut loaded)?;
    let images = project::wanted(&graph, &loaded, args.images)?;
    let nodes = project::nodes_of(&graph, &images, args.extent);
    let last = loaded.last();
    let project::Loaded { project, sources, model, store, notes, consent, .. } = loaded;
    let reporter = report::reporter(style);
    let project = Arc::new(project);
    let secrets = project::secrets(&model, &project, &consent);
    let mut context = context(graph, &store, &project, secrets, reporter.sink(), args.how, &consent)?;
    let asked_for = images.iter().collect::<HashSet<_>>();
    let is_asked_for = |image: &String| args.extent == Extent::Outputs && asked_for.contains(image);
    let targets: Vec<_> = context.graph.targets().iter().filter(|t| is_asked_for(&t.image)).collect();
    let below = if targets.is_empty() { None } else { Some(places()?) };
    let staged = match &below {
        Some(below) => Arc::new(StagedOutputs::new(targets.into_iter(), below)),
        None => Arc::default(),
    };
    context.staged = staged.clone();
    let may_leave = |name: &str| model.secrets.iter().any(|s| s.name == name && s.cache);
    let sink = reporter.sink();
    cache::tell(&sink, notices);
    let caching = Caching { caches: &caches, store: &store, sink: &sink, may_leave: &may_leave };
    let Some(made) = interruptible(execute::make(&mut context, &caching, &last, &nodes))? else {
        reporter.end();
        return Err(Error::Message(
            "stopped; finished layers are kept and the next build goes on from them".into(),
            None,
            INTERRUPTED,
        ));
    };
    let (plan, outcome) = made;
    let graph = context.graph.clone();
    drop(context);

    let reported = args.junit.map_or(Ok(()), |path| {
        let text = super::junit::report(&graph, &images, &store, &outcome.failures);
        std::fs::write(path, text)
            .map_err(|e| Error::host(format!("{} can't be written: {e}", path.display())))
    });
    // An image whose checks have not passed is no output.
    let passed = |image: &str| graph.checks(image).iter().all(|id| store.has(&graph.node(*id).key));
    let targets = graph.targets().iter().filter(|t| is_asked_for(&t.image) && passed(&t.image));
    let wanted: Vec<Wanted> = targets.map(|target| Wanted::new(&graph, target)).collect();
    if let Ok(project) = Arc::try_unwrap(project) {
        if outcome.failures.is_empty()
            && let Some(standing) = PlanCache::new(request, &project, &graph, &plan, wanted.clone())
        {
            // Losing it costs time.
            let _ = notes.set_standing(&standing);
        }
        project::keep_stamps(&notes, project);
    }
    let written = match below {
        Some(below) => write(wanted, &store, &notes, below, &staged, &sink),
        None => Ok(()),
    };
    // All that was asked for is there by now: sending it may take long.
    let sent = match caches.to.is_empty() {
        true => Ok(Some(Ok(()))),
        false => interruptible(caching.send(&graph, &nodes)),
    };
    reporter.end();
    // The process ends here: taking a large graph apart would be for nothing.
    std::mem::forget((graph, plan));
    reported?;
    written?;
    if !outcome.failures.is_empty() {
        return Err(Error::Build(Box::new(sources), outcome.failures));
    }
    match sent? {
        Some(sent) => sent.map_err(Error::host),
        None => {
            let text = "stopped; all of it is built, and not all of it was sent".into();
            Err(Error::Message(text, None, INTERRUPTED))
        }
    }
}

/// States that are there, and where their machines can be started.
pub(super) struct Made {
    pub(super) context: BuildContext<Host>,
    pub(super) sources: Sources,
}

/// Builds what is missing of some states. `first` is told before.
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
        // A boot takes long enough to be told; of a fork there is nothing to
        // say.
        Event::Phase { phase, .. } if phase == "start" && quiet.load(Ordering::Relaxed) => {}
        event => told(event),
    });
    if let Some(text) = first {
        sink(Event::Notice { text });
    }
    let secrets = project::secrets(&model, &project, &consent);
    let mut context = context(graph, &store, &project, secrets, sink.clone(), how, &consent)?;
    if building {
        cache::tell(&sink, notices);
        // Whoever waits for a machine does not wait for anything to be sent.
        let caching = Caching { caches: &caches, store: &store, sink: &sink, may_leave: &|_| false };
        let made = interruptible(execute::make(&mut context, &caching, &last, wanted))?;
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

pub(super) fn stopped() -> Error {
    Error::Message("stopped".into(), None, INTERRUPTED)
}

/// Where a build is done, by this host.
pub(super) fn context(
    graph: Graph,
    store: &Store,
    project: &Arc<Project>,
    secrets: Secrets,
    sink: Sink,
    how: &How,
    consent: &Consent,
) -> Result<BuildContext<Host>, Error> {
    let notice = sink.clone();
    let password = consent.allows_proxy_password();
    if !password && settings::proxies().have_password() {
        let text = "guests get no password of the proxy: to allow it, `vimg trust`".to_owned();
        sink(Event::Notice { text });
    }
    let (choice, accel) = how.provider.choose()?;
    let notice: Lines = Arc::new(move |text: &str| notice(Event::Notice { text: text.to_owned() }));
    let qemu = Qemu::new(accel, store.root(), how.provider.access(password)?, notice.clone());
    let provider = Host::new(choice, qemu, store.root(), notice);
    Ok(BuildContext {
        graph: Arc::new(graph),
        store: store.clone(),
        project: project.clone(),
        secrets: Arc::new(secrets),
        provider: Arc::new(provider),
        sink,
        budget: budget(how),
        staged: Arc::default(),
    })
}

fn nothing_to_build(sink: &Sink, reused: usize) {
    sink(Event::Planned { nodes: reused, reused });
    sink(Event::Finished { built: 0, reused, failed: 0, seconds: 0.0, boots: 0 });
}

/// Writes outputs until that is done or Ctrl-C is pressed: what was there
/// stays until the new file is whole.
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
    written.map_err(|e| Error::host(e.to_string()))?.map_err(|(path, e)| {
        Error::Message(format!("{} can't be written: {e}", path.display()), None, super::output::STORE)
    })
}

/// Runs a build until it ends or it is told to stop (`None`): by Ctrl-C, a
/// hangup, or a request to end. Dropping the build kills its machines; a second
/// signal of any kind does not wait even for that.
pub(super) fn interruptible<T>(work: impl Future<Output = T>) -> Result<Option<T>, Error> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| Error::host(format!("the runtime does not start: {e}")))?;
    let mut told = told_to_stop()?;
    let result = runtime.block_on(async {
        tokio::select! {
            biased;
            _ = told.wait_for(|stop| *stop) => None,
            result = work => Some(result),
        }
    });
    // Machines and staging directories go with their tasks.
    runtime.shutdown_timeout(std::time::Duration::from_secs(5));
    Ok(result)
}

/// Whether this process was told to stop. It is heard from the first call on,
/// also between two pieces of work.
fn told_to_stop() -> Result<watch::Receiver<bool>, Error> {
    static TOLD: OnceLock<watch::Receiver<bool>> = OnceLock::new();
    if let Some(told) = TOLD.get() {
        return Ok(told.clone());
    }
    let fail = |e: std::io::Error| Error::host(format!("can't listen for signals: {e}"));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(fail)?;
    let (tell, told) = watch::channel(false);
    let mut all = {
        let _guard = runtime.enter();
        use tokio::signal::unix::{SignalKind, signal};
        [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()]
            .into_iter()
            .map(signal)
            .collect::<Result<Vec<_>, _>>()
            .map_err(fail)?
    };
    let listen = move || {
        runtime.block_on(async {
            for again in [false, true] {
                let signals = all.iter_mut().map(|signal| Box::pin(signal.recv()));
                futures_util::future::select_all(signals).await;
                if again {
                    std::process::exit(i32::from(INTERRUPTED));
                }
                let _ = tell.send(true);
            }
        });
    };
    std::thread::Builder::new().spawn(listen).map_err(fail)?;
    Ok(TOLD.get_or_init(|| told).clone())
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

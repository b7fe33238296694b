//! A project, a store, and builds of it.

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::runtime::Runtime;
use vimg::cache::Caches;
use vimg::event::{Event, Sink};
use vimg::execute::caching::Caching;
use vimg::execute::server::{self, Came};
use vimg::execute::{Budget, BuildContext, Door, Ended, Failure, Outcome, Room, interact, make};
use vimg::files::Project;
use vimg::graph::{Graph, NodeId, ServerPlan};
use vimg::store::gc::Keep;
use vimg::store::{Last, ServerHome, Store};
use vimg_agent::protocol::Exec;
use vimg_lang::{FileRef, Model, Request, Sources, compile};

use crate::common::Fake;

/// A project and a store.
pub(crate) struct Bench {
    pub(crate) _dir: tempfile::TempDir,
    pub(crate) project: PathBuf,
    pub(crate) store: Store,
}

impl Bench {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let project = dir.path().join("project");
        std::fs::create_dir(&project).unwrap();
        let store = Store::open(&dir.path().join("store")).unwrap();
        Self { project, store, _dir: dir }
    }

    pub(crate) fn write(&self, recipe: &str) {
        std::fs::write(self.project.join("main.vimg"), recipe).unwrap();
    }

    /// Removes what nothing needs; returns the names.
    pub(crate) fn collect(&self) -> Vec<String> {
        let done = self.store.collect(&Keep::default()).unwrap();
        done.removed.into_iter().map(|item| item.name).collect()
    }

    /// The names of all states, sorted.
    pub(crate) fn states(&self) -> Vec<String> {
        let mut names: Vec<String> = self.store.states().into_iter().map(|record| record.name).collect();
        names.sort();
        names
    }
}

/// A build's outcome, and what happened in it.
pub(crate) struct Built {
    pub(crate) outcome: Outcome,
    pub(crate) notices: Vec<String>,
    pub(crate) launches: usize,
}

/// A project that is open, and all that a command needs.
struct Opened {
    context: BuildContext<Fake>,
    model: Model,
    last: Last,
    notices: Arc<Mutex<Vec<String>>>,
    runtime: Runtime,
}

fn open(project: &Path, store: &Store, fake: Fake) -> Opened {
    let project = Arc::new(Project::open(project).unwrap().later(1000));
    let mut sources = Sources::default();
    let entry = FileRef::project("main.vimg");
    let distributions = fake.distributions();
    let known = vimg::base::known(distributions);
    let request =
        Request { files: &*project, entry, set: &[], values: None, rebuilt: None, distributions: &known };
    let model = compile(&request, &mut sources).unwrap_or_else(|d| panic!("{d:?}"));
    let mut graph = Graph::new(&model, &project, distributions).unwrap();
    graph.resolve(|key| store.stands_for(key));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let notices = Arc::new(Mutex::new(Vec::new()));
    let told = notices.clone();
    let sink: Sink = Arc::new(move |event| {
        if let Event::Notice { text } = event {
            told.lock().unwrap().push(text);
        }
    });
    let (last, fake) = (store.last(&store.project(project.root())), Arc::new(fake));
    let (room, lease) = Room::lease(store, &graph, &sink).unwrap();
    let context = BuildContext {
        lease,
        graph: Arc::new(graph),
        store: store.clone(),
        project,
        secrets: Arc::default(),
        provider: fake.clone(),
        disks: fake,
        distributions,
        access: vimg::host::network::Access::default(),
        sink,
        budget: Budget { jobs: 2, memory: 16 << 30, keep_going: true, use_snapshots: true },
        staged: Arc::default(),
        room: Arc::new(room),
    };
    Opened { context, model, last, notices, runtime }
}

/// Builds the images that `wanted` chooses.
pub(crate) fn build(project: &Path, store: &Store, fake: Fake, wanted: impl Fn(&str) -> bool) -> Built {
    let Opened { mut context, last, notices, runtime, .. } = open(project, store, fake);
    let graph = context.graph.clone();
    let nodes: Vec<NodeId> = graph.ids().filter(|id| wanted(&graph.node(*id).image)).collect();
    let (caches, sink) = (Caches::default(), context.sink.clone());
    let caching = Caching { caches: &caches, store, sink: &sink, may_leave: &|_| false };
    let (_, outcome) = runtime.block_on(make(&mut context, &caching, &last, &nodes));
    let notices = notices.lock().unwrap().clone();
    Built { outcome, notices, launches: context.provider.launches.load(Ordering::Relaxed) }
}

/// Starts the server `web`, or boots it again, as `vimg up` does.
pub(crate) fn up(project: &Path, store: &Store, fake: Fake) -> Result<Came, Box<Failure>> {
    let Opened { context, model, runtime, .. } = open(project, store, fake);
    let plan = ServerPlan::new(&context.graph, &model, &context.project, "web").unwrap().unwrap();
    let home = ServerHome::take(&store.servers(context.project.root()).join("web")).unwrap();
    runtime.block_on(server::up(&context, &plan, &home))
}

/// Forks the machine of the image `a` for some time, again and again, if the
/// image is built: its states must stay.
pub(crate) fn fork(project: &Path, store: &Store, time: Duration) {
    let Opened { context, runtime, .. } = open(project, store, Fake::default());
    let image = context.graph.image("a").unwrap();
    let start = Instant::now();
    while store.has(&context.graph.node(image).key) {
        let exec = Exec { command: vec!["true".into()], terminal: None };
        let listen = || tokio::sync::mpsc::channel(1).1;
        let ended = runtime.block_on(interact(&context, image, Door::Machine, exec, listen, |_, _| {}));
        assert_eq!(ended.unwrap(), Ended::Code(0));
        if start.elapsed() > time {
            return;
        }
        assert!(store.has(&context.graph.node(image).key), "the states of a fork were removed");
    }
}

/// A recipe with one layer for each image.
pub(crate) fn images(names: &[&str]) -> String {
    let image = |name: &&str| {
        let layer = format!("configuration \"c{name}\" {{ file \"/{name}\" content=\"1\" }}\n");
        format!("image \"{name}\" {{ from \"base\"; layer \"c{name}\" }}\n{layer}")
    };
    let base = "image \"base\" { bootstrap \"debian\" suite=\"bookworm\" }\n".to_owned();
    base + &names.iter().map(image).collect::<String>()
}

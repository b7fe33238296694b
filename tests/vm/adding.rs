//! A distribution that is not in the program, through the public seam: it
//! bootstraps, boots and installs a package.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};

use futures_util::future::BoxFuture;
use vimg::base::{self, Base, Distribution, Wanted};
use vimg::cache::Caches;
use vimg::disk::QemuDisks;
use vimg::event::{Event, Sink};
use vimg::execute::caching::Caching;
use vimg::execute::{Budget, BuildContext, make};
use vimg::files::Project;
use vimg::graph::Graph;
use vimg::host::network::Access;
use vimg::host::{HostError, Lines};
use vimg::provider::host::{Choice, Host};
use vimg::provider::qemu::{Accel, Dirs, Qemu};
use vimg::store::{Area, Store};
use vimg_lang::model::Bootstrap;
use vimg_lang::{FileRef, Request, Sources, compile};

/// Debian under another name, with a package of its own in every base.
struct Toy;

impl Distribution for Toy {
    fn name(&self) -> &'static str {
        "toy"
    }

    fn suites(&self) -> &'static [&'static str] {
        &["one"]
    }

    fn behaviour(&self) -> u32 {
        1
    }

    fn missing(&self) -> Option<HostError> {
        debian().missing()
    }

    fn make<'a>(&'a self, wanted: Wanted<'a>) -> BoxFuture<'a, Result<Base, HostError>> {
        Box::pin(async move {
            let mut packages = wanted.bootstrap.packages.clone();
            packages.push("hello".into());
            let bootstrap = Bootstrap { suite: "bookworm".into(), packages, ..wanted.bootstrap.clone() };
            debian().make(Wanted { bootstrap: &bootstrap, ..wanted }).await
        })
    }
}

fn debian() -> &'static dyn Distribution {
    base::find(base::BUILT_IN, "debian").unwrap()
}

static TOY: &[&dyn Distribution] = &[&Toy];

const RECIPE: &str = r#"
image "it" {
    bootstrap "toy" suite="one"
    machine disk="3GiB" memory="512MiB"
    layer "tree"
    check "boots" { run "systemctl is-system-running; hello; tree --version" }
}
configuration "tree" { package "tree" }
"#;

#[test]
fn a_distribution_is_added_from_outside() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let root = dir.path().join("project");
    std::fs::create_dir(&root).unwrap();
    std::fs::write(root.join("main.vimg"), RECIPE).unwrap();
    let said = build(&root, &dir.path().join("store"));
    for words in ["running", "Hello, world!", "tree v2"] {
        assert!(said.contains(words), "{words} is not in {said}");
    }
    // Without its line in the table, the name is unknown.
    let mut sources = Sources::default();
    let project = Project::open(&root).unwrap();
    let known = base::known(base::BUILT_IN);
    let entry = FileRef::project("main.vimg");
    let request =
        Request { files: &project, entry, set: &[], values: None, rebuilt: None, distributions: &known };
    let mistakes = compile(&request, &mut sources).unwrap_err();
    assert!(mistakes[0].message.contains("expected \"debian\""), "{mistakes:?}");
}

/// Builds a recipe with the toy, and returns what it printed.
fn build(root: &Path, store: &Path) -> String {
    let project = Arc::new(Project::open(root).unwrap());
    let mut sources = Sources::default();
    let known = base::known(TOY);
    let entry = FileRef::project("main.vimg");
    let request =
        Request { files: &*project, entry, set: &[], values: None, rebuilt: None, distributions: &known };
    let model = compile(&request, &mut sources).unwrap();
    let store = Store::open(store).unwrap();
    let graph = Graph::new(&model, &project, TOY).unwrap();
    let nodes: Vec<_> = graph.ids().collect();
    let said = Arc::new(Mutex::new(String::new()));
    let heard = said.clone();
    let sink: Sink = Arc::new(move |event| {
        if let Event::Output { line, .. } = event {
            heard.lock().unwrap().push_str(&format!("{line}\n"));
        }
    });
    let notice: Lines = Arc::new(|_: &str| {});
    let dirs = Dirs {
        probes: store.dir(Area::Probes),
        appliances: store.dir(Area::Appliances),
        snapshots: store.dir(Area::Snapshots),
    };
    let access = Access::default();
    let disks = Arc::new(QemuDisks::new(dirs.probes.clone()));
    let qemu = Qemu::new(Some(Accel::Tcg), dirs, access.clone(), notice.clone());
    let provider = Arc::new(Host::new(Choice::Auto, qemu, store.root(), notice));
    let mut context = BuildContext {
        lease: store.lease(graph.keys()).unwrap(),
        graph: Arc::new(graph),
        store: store.clone(),
        project: project.clone(),
        secrets: Arc::new(BTreeMap::new()),
        provider,
        disks,
        distributions: TOY,
        access,
        sink: sink.clone(),
        budget: Budget { jobs: 1, memory: 4 << 30, keep_going: false, use_snapshots: false },
        staged: Arc::default(),
        room: Arc::default(),
    };
    let caches = Caches::default();
    let caching = Caching { caches: &caches, store: &store, sink: &sink, may_leave: &|_| false };
    let last = store.last(&store.project(project.root()));
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let (_, outcome) = runtime.block_on(make(&mut context, &caching, &last, &nodes));
    assert!(outcome.failures.is_empty(), "{:?}", outcome.failures);
    std::mem::take(&mut *said.lock().unwrap())
}

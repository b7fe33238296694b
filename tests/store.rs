//! The store beside builds: what a garbage collection may take. Machines are
//! maps in memory (`common`); everything above them is real.

#![expect(clippy::unwrap_used, reason = "a test that can't go on fails")]

mod common;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use common::{Fake, Full, read_state};
use vimg::cache::Caches;
use vimg::event::{Event, Sink};
use vimg::execute::caching::Caching;
use vimg::execute::{Budget, BuildContext, FailureKind, Outcome, Room, make};
use vimg::files::Project;
use vimg::graph::{Graph, NodeId};
use vimg::store::gc::Keep;
use vimg::store::{Area, Store};
use vimg_lang::{FileRef, Request, Sources, compile};

/// A project and a store.
struct Bench {
    _dir: tempfile::TempDir,
    project: PathBuf,
    store: Store,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let project = dir.path().join("project");
        std::fs::create_dir(&project).unwrap();
        let store = Store::open(&dir.path().join("store")).unwrap();
        Self { project, store, _dir: dir }
    }

    fn write(&self, recipe: &str) {
        std::fs::write(self.project.join("main.vimg"), recipe).unwrap();
    }

    /// Removes what nothing needs; returns the names.
    fn collect(&self) -> Vec<String> {
        let done = self.store.collect(&Keep::default()).unwrap();
        done.removed.into_iter().map(|item| item.name).collect()
    }

    /// The names of all states, sorted.
    fn states(&self) -> Vec<String> {
        let mut names: Vec<String> = self.store.states().into_iter().map(|record| record.name).collect();
        names.sort();
        names
    }
}

/// A build's outcome, and the notices that it sent.
struct Built {
    outcome: Outcome,
    notices: Vec<String>,
    launches: usize,
}

/// Builds the nodes that `wanted` chooses.
fn build(project: &Path, store: &Store, fake: Fake, wanted: impl Fn(&str) -> bool) -> Built {
    let project = Arc::new(Project::open(project).unwrap().later(1000));
    let mut sources = Sources::default();
    let entry = FileRef::project("main.vimg");
    let distributions = vimg::base::known(common::DISTRIBUTIONS);
    let request = Request {
        files: &*project,
        entry,
        set: &[],
        values: None,
        rebuilt: None,
        distributions: &distributions,
    };
    let model = compile(&request, &mut sources).unwrap_or_else(|d| panic!("{d:?}"));
    let mut graph = Graph::new(&model, &project, common::DISTRIBUTIONS).unwrap();
    graph.resolve(|key| store.stands_for(key));
    let nodes: Vec<NodeId> = graph.ids().filter(|id| wanted(&graph.node(*id).image)).collect();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let notices = Arc::new(Mutex::new(Vec::new()));
    let told = notices.clone();
    let sink: Sink = Arc::new(move |event| {
        if let Event::Notice { text } = event {
            told.lock().unwrap().push(text);
        }
    });
    let (caches, fake) = (Caches::default(), Arc::new(fake));
    let caching = Caching { caches: &caches, store, sink: &sink, may_leave: &|_| false };
    let last = store.last(&store.project(project.root()));
    let (room, lease) = Room::lease(store, &graph, &sink).unwrap();
    let mut context = BuildContext {
        lease,
        graph: Arc::new(graph),
        store: store.clone(),
        project: project.clone(),
        secrets: Arc::default(),
        provider: fake.clone(),
        disks: fake.clone(),
        distributions: common::DISTRIBUTIONS,
        access: vimg::host::network::Access::default(),
        sink: sink.clone(),
        budget: Budget { jobs: 2, memory: 16 << 30, keep_going: true, use_snapshots: true },
        staged: Arc::default(),
        room: Arc::new(room),
    };
    let (_, outcome) = runtime.block_on(make(&mut context, &caching, &last, &nodes));
    let notices = notices.lock().unwrap().clone();
    Built { outcome, notices, launches: fake.launches.load(Ordering::Relaxed) }
}

/// A recipe with one layer for each image.
fn images(names: &[&str]) -> String {
    let image = |name: &&str| {
        let layer = format!("configuration \"c{name}\" {{ file \"/{name}\" content=\"1\" }}\n");
        format!("image \"{name}\" {{ from \"base\"; layer \"c{name}\" }}\n{layer}")
    };
    let base = "image \"base\" { bootstrap \"debian\" suite=\"bookworm\" }\n".to_owned();
    base + &names.iter().map(image).collect::<String>()
}

#[test]
fn what_left_the_recipe_is_free_and_what_was_not_asked_for_stays() {
    let bench = Bench::new();
    bench.write(&images(&["a", "b"]));
    let built = build(&bench.project, &bench.store, Fake::default(), |_| true);
    assert_eq!((built.outcome.failures.len(), built.notices.len()), (0, 0));
    assert_eq!(bench.states(), ["a@ca", "b@cb", "base:base"]);
    // A build of one image does not give up the others.
    build(&bench.project, &bench.store, Fake::default(), |image| image == "a");
    assert_eq!(bench.collect(), [""; 0]);
    // The recipe gives up an image with the next build.
    bench.write(&images(&["a"]));
    assert_eq!(bench.collect(), [""; 0]);
    build(&bench.project, &bench.store, Fake::default(), |image| image == "a");
    assert_eq!(bench.collect(), ["b@cb"]);
    assert_eq!(bench.states(), ["a@ca", "base:base"]);
}

/// Says that the disk is full as soon as the store has more than so many
/// states.
fn holds(bench: &Bench, most: usize) -> Full {
    let states = bench.store.dir(Area::States);
    Arc::new(move || std::fs::read_dir(&states).unwrap().count() > most)
}

/// Leaves states in the store that nothing needs: those of `count` earlier
/// contents of a layer.
fn leave(bench: &Bench, count: usize) {
    for n in 0..=count {
        bench.write(&images(&["a"]).replace("content=\"1\"", &format!("content=\"old {n}\"")));
        build(&bench.project, &bench.store, Fake::default(), |_| true);
    }
}

#[test]
fn a_full_disk_is_cleaned_up_and_the_build_goes_on() {
    let bench = Bench::new();
    leave(&bench, 8);
    // Base, one state that the project needs, and eight that nothing needs.
    assert_eq!(bench.store.states().len(), 10);
    let recipe = images(&["a", "b", "c"]).replace("content=\"1\"", "content=\"new\"");
    let checked = "image \"d\" { from \"a\"; output \"qcow2\" path=\"d\"; check \"c\" { run \"true\" } }\n";
    bench.write(&(recipe + checked));
    // Machines stop; bases and conversions can't be written.
    let fake = Fake { full: Some(holds(&bench, 9)), ..Fake::default() };
    let built = build(&bench.project, &bench.store, fake, |_| true);
    assert!(built.outcome.failures.is_empty(), "{:?}", built.outcome.failures);
    // Three layers, a check, a seal and an output, on top of the base.
    assert_eq!((built.outcome.built, built.notices.len()), (6, 1), "{:?}", built.notices);
    assert_eq!(built.notices[0], "the disk is full: vimg removed 1 MiB that nothing needs from the store");
    let states = bench.states();
    assert_eq!(states, ["a@ca", "a@ca", "b@cb", "base:base", "c@cc", "d:check/c", "d:qcow2", "d:seal"]);
    let top = bench.store.states().into_iter().find(|record| record.name == "d:qcow2").unwrap();
    let disk = bench.store.state_dir(&top.key).join("disk.qcow2");
    assert_eq!(read_state(&disk)["format"], "qcow2");
}

#[test]
fn a_full_disk_with_nothing_to_remove_is_the_error() {
    let bench = Bench::new();
    bench.write(&images(&["a"]));
    let fake = Fake { full: Some(holds(&bench, 0)), ..Fake::default() };
    let built = build(&bench.project, &bench.store, fake, |_| true);
    let [failure] = &built.outcome.failures[..] else { panic!("{:?}", built.outcome.failures) };
    assert_eq!((failure.kind, built.launches), (FailureKind::Full, 1));
    assert_eq!(failure.message, "the disk that holds the store is full");
    assert!(failure.help.as_ref().unwrap().contains("Make room on the disk, or set VIMG_STORE"));
    assert_eq!(built.notices, ["the disk is full: the store has nothing to remove"]);
    assert_eq!(bench.states(), ["base:base"]);
    // With room, the next build continues.
    let built = build(&bench.project, &bench.store, Fake::default(), |_| true);
    assert_eq!((built.outcome.failures.len(), built.outcome.built), (0, 1));
}

#[test]
fn a_disk_that_stays_full_is_tried_once_more() {
    let bench = Bench::new();
    leave(&bench, 3);
    bench.write(&images(&["a", "b"]).replace("content=\"1\"", "content=\"new\""));
    let fake = Fake { full: Some(Arc::new(|| true)), ..Fake::default() };
    let built = build(&bench.project, &bench.store, fake, |_| true);
    // Both layers were running when the garbage was collected.
    assert_eq!((built.outcome.failures.len(), built.launches, built.notices.len()), (2, 4, 1));
    assert!(built.outcome.failures.iter().all(|failure| failure.kind == FailureKind::Full));
    assert_eq!(bench.states(), ["a@ca", "base:base"]);
}

/// Mounts a small filesystem in memory for this thread and those that it
/// starts. Returns whether that is permitted.
fn mount(dir: &Path, bytes: usize) -> bool {
    use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
    // SAFETY: the thread shares no descriptors with others that this affects.
    if unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) }.is_err() {
        return false;
    }
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
    let options = std::ffi::CString::new(format!("size={bytes}")).unwrap();
    mount("tmpfs", dir, "tmpfs", MountFlags::empty(), Some(options.as_c_str())).unwrap();
    true
}

/// The build below needs at least so many pages of its disk: one for its lease,
/// and three for each state.
const ROOMS: u64 = 7;

/// The last page of a real disk is taken, wherever the build needs the next
/// one. It goes on. Only root can mount the disk.
#[test]
fn a_real_disk_may_be_full_anywhere() {
    let test = || {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        if !mount(dir.path(), 2 << 20) {
            return;
        }
        let mut collected = 0;
        // So many pages are free when the build begins.
        for room in 0..ROOMS {
            let root = dir.path().join(format!("store-{room}"));
            let bench = Bench { store: Store::open(&root).unwrap(), ..Bench::new() };
            leave(&bench, 10);
            let ballast = std::fs::File::create(dir.path().join("ballast")).unwrap();
            let fill = |bytes: usize| (&ballast).write_all(&vec![1; bytes]);
            while fill(4096).is_ok() {}
            let length = ballast.metadata().unwrap().len();
            ballast.set_len(length.next_multiple_of(4096) - room * 4096).unwrap();
            bench.write(&images(&["a", "b"]));
            let built = build(&bench.project, &bench.store, Fake::default(), |_| true);
            assert!(built.outcome.failures.is_empty(), "{room}: {:?}", built.outcome.failures);
            assert_eq!((bench.states().len(), built.outcome.built), (4, 2), "{room}");
            collected += built.notices.len();
            std::fs::remove_dir_all(&root).unwrap();
            std::fs::remove_file(dir.path().join("ballast")).unwrap();
        }
        assert_eq!(collected, ROOMS as usize, "each of these disks was full");
    };
    std::thread::spawn(test).join().unwrap();
}

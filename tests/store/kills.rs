//! `vimg store gc` beside four builds, a server and a fork, in one store.
//! Builds, collections, starts of the server and forks are processes of their
//! own, and are killed at random. After each round, everything that a root
//! reaches is there, and nothing else is left.

use std::collections::BTreeMap;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use vimg::digest::Key;
use vimg::execute::server::Came;
use vimg::store::gc::{Keep, Kind};
use vimg::store::{Area, Store, settle};

use super::bench::{build, fork, up};
use crate::common::Fake;

/// Builds at the same time, each of its own project.
const BUILDS: usize = 4;
/// Nodes of a project.
const NODES: usize = 9;
/// More than a state takes on disk, in bytes: a directory and three files.
const SIZE: usize = 32 << 10;
/// The longest time until a process is killed, in milliseconds. A build takes
/// about as long.
const LIFE: u64 = 150;

/// Repeatable choices (splitmix64).
struct Rng(u64);

impl Rng {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) % n
    }
}

/// A recipe of four contents. Projects with the same contents have the same
/// keys; a content that comes back meets states that a collection may take.
fn recipe(rng: &mut Rng) -> String {
    let mut content = |name: &str| {
        let n = rng.below(4);
        format!("configuration \"{name}\" {{ file \"/{name}\" content=\"{n}\" }}\n")
    };
    let configurations: String = ["one", "two", "three", "four"].map(&mut content).concat();
    format!(
        "image \"base\" {{ bootstrap \"debian\" suite=\"bookworm\" }}\n\
         image \"low\" {{ from \"base\"; layer \"one\"; layer \"two\" }}\n\
         image \"a\" {{ from \"low\"; layer \"three\"; check \"c\" {{ run \"true\" }}; output \"qcow2\" path=\"a\" }}\n\
         image \"b\" {{ from \"low\"; layer \"four\" }}\n\
         server \"web\" {{ image \"a\" }}\n{configurations}"
    )
}

/// The same for a collection.
const COLLECTION: u64 = 60;

/// What a process does, from its environment.
const WORK: &str = "VIMG_TEST_WORK";

/// A process of the test below, not a test: this program starts itself again.
#[test]
#[ignore = "the other test starts it"]
fn work() {
    let work = std::env::var(WORK).unwrap();
    let [what, project, store] = work.split('\n').collect::<Vec<_>>()[..] else { panic!("{work}") };
    let (project, store) = (Path::new(project), Store::open(Path::new(store)).unwrap());
    match what {
        "build" => {
            let built = build(project, &store, Fake::default(), |_| true);
            assert!(built.outcome.failures.is_empty(), "{:?}", built.outcome.failures);
        }
        "fork" => fork(project, &store, Duration::from_millis(LIFE)),
        _ => drop(up(project, &store, Fake::default()).unwrap()),
    }
}

/// A process that may be killed.
struct Process {
    what: &'static str,
    child: Child,
    killer: Option<JoinHandle<()>>,
}

impl Process {
    /// Starts a process. Every other one is killed within `life` milliseconds.
    fn start(what: &'static str, command: &mut Command, rng: &mut Rng, life: u64) -> Self {
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let life = (rng.below(2) == 0).then(|| Duration::from_millis(rng.below(life)));
        let pid = Pid::from_child(&child);
        let killer = life.map(|life| {
            std::thread::spawn(move || {
                std::thread::sleep(life);
                // It is not awaited before, so the number is still its own.
                kill_process(pid, Signal::KILL).unwrap();
            })
        });
        Self { what, child, killer }
    }

    /// Waits for its end. Returns whether it ended by itself; then it must have
    /// succeeded.
    fn wait(self) -> bool {
        if let Some(killer) = self.killer {
            killer.join().unwrap();
        }
        let output = self.child.wait_with_output().unwrap();
        let killed = output.status.signal() == Some(9);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(killed || output.status.success(), "{} failed: {said}", self.what);
        !killed
    }
}

/// Collects garbage until the builds are done. Returns how many collections
/// were started, and how many were killed.
fn keep_collecting(store: &Path, project: &Path, mut rng: Rng, done: &AtomicBool) -> [usize; 2] {
    let mut counts = [0; 2];
    while !done.load(Ordering::Relaxed) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vimg"));
        command.args(["store", "gc", "--store"]).arg(store).current_dir(project);
        let finished = Process::start("gc", &mut command, &mut rng, COLLECTION).wait();
        counts = [counts[0] + 1, counts[1] + usize::from(!finished)];
    }
    counts
}

/// The store, the projects, and what has happened so far.
struct Field {
    store: Store,
    projects: Vec<PathBuf>,
    rng: Rng,
    counts: BTreeMap<String, usize>,
    /// The disks that the server started from, and what they held.
    server: Vec<(PathBuf, Vec<u8>)>,
    /// The largest store before and after the collection that ends a round, in
    /// bytes.
    largest: [u64; 2],
}

impl Field {
    fn count(&mut self, what: &str, n: usize) {
        *self.counts.entry(what.to_owned()).or_default() += n;
    }

    /// Starts this program again, with other work.
    fn start(&mut self, what: &'static str, project: usize) -> Process {
        let mut command = Command::new(std::env::current_exe().unwrap());
        let work = format!("{what}\n{}\n{}", self.projects[project].display(), self.store.root().display());
        command.args(["--ignored", "--exact", "kills::work", "--nocapture"]).env(WORK, work);
        Process::start(what, &mut command, &mut self.rng, LIFE)
    }

    /// Waits for processes; see [`Process::wait`].
    fn wait(&mut self, all: Vec<Process>) -> Vec<bool> {
        let mut finished = Vec::new();
        for process in all {
            let what = process.what;
            finished.push(process.wait());
            self.count(what, 1);
            self.count(&format!("{what} killed"), usize::from(finished.last() == Some(&false)));
        }
        finished
    }

    /// The directory of the server.
    fn home(&self) -> PathBuf {
        self.store.servers(&self.projects[0].canonicalize().unwrap()).join("web")
    }

    /// One round: everything at once.
    fn round(&mut self) {
        for project in 0..BUILDS {
            // Some builds have nothing to do.
            if self.rng.below(4) > 0 {
                let recipe = recipe(&mut self.rng);
                std::fs::write(self.projects[project].join("main.vimg"), recipe).unwrap();
            }
        }
        let done = Arc::new(AtomicBool::new(false));
        let collector = {
            let (store, project) = (self.store.root().to_owned(), self.projects[0].clone());
            let (rng, done) = (Rng(self.rng.below(u64::MAX)), done.clone());
            std::thread::spawn(move || keep_collecting(&store, &project, rng, &done))
        };
        let mut all: Vec<Process> = (0..BUILDS).map(|project| self.start("build", project)).collect();
        if self.rng.below(8) == 0 {
            // As `vimg down --remove` does it.
            let _ = std::fs::remove_dir_all(self.home());
            self.server.clear();
        }
        // The image of a server and a fork is built before they start.
        let start = build(&self.projects[0], &self.store, Fake::default(), |image| image == "a");
        assert!(start.outcome.failures.is_empty(), "{:?}", start.outcome.failures);
        all.push(self.start("fork", 0));
        all.push(self.start("up", 0));
        let finished = self.wait(all);
        done.store(true, Ordering::Relaxed);
        let [started, killed] = collector.join().unwrap();
        self.count("gc", started);
        self.count("gc killed", killed);
        self.needed("after the round");
        for project in (0..BUILDS).filter(|project| finished[*project]) {
            self.nothing_to_do(project);
        }
        self.server();
        self.collect();
        self.needed("after the collection");
        for project in (0..BUILDS).filter(|project| finished[*project]) {
            self.nothing_to_do(project);
        }
    }

    /// Everything that the projects need is there and whole.
    fn needed(&mut self, when: &str) {
        let mut all: Vec<Key> = Vec::new();
        for project in &self.projects {
            all.extend(self.store.project(&project.canonicalize().unwrap()).nodes().into_values());
        }
        for key in &all {
            assert!(self.store.has(key) && self.store.is_sound(key), "{when}: {key} is needed, and gone");
        }
        self.count("states that were needed and there", all.len());
    }

    /// A project that was built has nothing to build.
    fn nothing_to_do(&mut self, project: usize) {
        let built = build(&self.projects[project], &self.store, Fake::default(), |_| true);
        assert!(built.outcome.failures.is_empty(), "{:?}", built.outcome.failures);
        assert_eq!((built.outcome.built, built.launches), (0, 0), "project {project} was built");
        self.count("builds with nothing to do", 1);
    }

    /// A server that has started boots from the disks that it started from.
    fn server(&mut self) {
        let home = self.home();
        if !home.join("server.json").exists() {
            return;
        }
        assert_eq!(up(&self.projects[0], &self.store, Fake::default()).unwrap(), Came::Back);
        let names = (0..).map(|n| home.join(format!("base-{n}.qcow2")));
        let disks = names.map_while(|path| std::fs::read(&path).ok().map(|bytes| (path, bytes)));
        let disks: Vec<_> = disks.collect();
        assert_eq!(disks.len(), 4, "a base and three layers");
        if self.server.is_empty() {
            self.server = disks;
        } else {
            assert!(self.server == disks, "the server has other disks now");
        }
        self.count("boots of the server from its own disks", 1);
    }

    /// A collection in quiet leaves only what is needed.
    fn collect(&mut self) {
        let size = |store: &Store| store.usage().unwrap().iter().map(|item| item.bytes).sum::<u64>();
        let before = size(&self.store);
        let done = self.store.collect(&Keep::default()).unwrap();
        settle();
        let left = self.store.usage().unwrap();
        let free: Vec<_> = left.iter().filter(|item| item.root.is_none()).collect();
        assert!(free.is_empty(), "{free:?}");
        let states = left.iter().filter(|item| item.kind == Kind::State).count();
        // Twice, because an early cutoff needs the earlier state as well.
        assert!(states <= 2 * BUILDS * NODES, "{states} states");
        let names = |area| std::fs::read_dir(self.store.dir(area)).unwrap().flatten();
        let staged: Vec<_> = names(Area::Staging).map(|entry| entry.file_name()).collect();
        let locks: Vec<_> = names(Area::Locks).map(|entry| entry.file_name()).collect();
        assert!(staged.is_empty() && locks == ["gate"], "{staged:?} {locks:?}");
        self.count("removed in quiet", done.removed.len());
        let after = size(&self.store);
        self.largest = [self.largest[0].max(before), self.largest[1].max(after)];
        assert!(after < 2 * (BUILDS * NODES * SIZE) as u64 && before < 4 * (BUILDS * NODES * SIZE) as u64);
    }
}

/// How many rounds to run: VIMG_ROUNDS, or 6.
fn rounds() -> usize {
    std::env::var("VIMG_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(6)
}

#[test]
fn collections_take_nothing_that_is_needed() {
    let scratch = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let projects = (0..BUILDS).map(|n| scratch.path().join(format!("project-{n}")));
    let projects: Vec<PathBuf> = projects.inspect(|dir| std::fs::create_dir(dir).unwrap()).collect();
    let mut rng = Rng(1);
    for project in &projects {
        std::fs::write(project.join("main.vimg"), recipe(&mut rng)).unwrap();
    }
    let store = Store::open(&scratch.path().join("store")).unwrap();
    let counts = BTreeMap::new();
    let mut field = Field { store, projects, rng, counts, server: Vec::new(), largest: [0; 2] };
    let rounds = rounds();
    for _ in 0..rounds {
        field.round();
    }
    // A sample must have killed something, and have had something to keep.
    for what in
        ["build killed", "gc killed", "states that were needed and there", "builds with nothing to do"]
    {
        assert!(field.counts[what] > 0, "{:?}", field.counts);
    }
    println!("{rounds} rounds: {:#?}, at most {:?} bytes", field.counts, field.largest);
}

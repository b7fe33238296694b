//! Random edits of random projects. After each edit, an incremental build has
//! the same result as a clean build, and a second build starts nothing.
//! Machines are maps in memory (`common`); everything above them is real.

#![expect(clippy::unwrap_used, reason = "a test that can't go on fails")]

mod common;
#[path = "incremental/faults.rs"]
mod faults;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use common::{Fake, State, read_state};
use vimg::cache::Caches;
use vimg::cache::remote::Remote;
use vimg::cache::sign::{Signer, Trust};
use vimg::cache::spec::Spec;
use vimg::digest::Digest;
use vimg::event::{Event, Sink};
use vimg::execute::caching::Caching;
use vimg::execute::{Budget, BuildContext, Outcome, make};
use vimg::files::Project;
use vimg::graph::{Graph, NodeId};
use vimg::plan::{Plan, PlanCache};
use vimg::store::Store;
use vimg_lang::{FileRef, Request, Sources, compile};

/// A small, fast, repeatable source of choices (splitmix64).
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
}

#[derive(Clone, PartialEq)]
enum Item {
    File(String, u32),
    Link(String),
}

/// A project as data. It can be written to files, edited and restored.
#[derive(Clone, PartialEq)]
struct Recipe {
    files: BTreeMap<String, Item>,
    images: Vec<RandomImage>,
    /// Lines of each configuration.
    configurations: Vec<Vec<String>>,
    greeting: String,
    comment: String,
}

/// An image: its parent, its layers (configuration and input), its processors,
/// whether it has an output, and what it does with a capability.
type RandomImage = (Option<usize>, Vec<(usize, u32)>, u32, bool, usize);

/// A capability with two providers, and a configuration that requires it.
const CAPABILITY: &str = "capability \"k\" { input \"port\" type=\"int\" }
configuration \"p0\" provides=\"k\" { input \"port\" type=\"int\" default=5; file \"/p\" content=\"{{ port }}\"; directory \"/tree\" from=\"site\" }
configuration \"p1\" provides=\"k\" { input \"port\" type=\"int\"; file \"/p\" content=\"{{ port }} {{ greeting }}\" mode=\"0600\" }
configuration \"u\" { requires \"k\"; file \"/u\" content=\"{{ port }}\"; file \"/tree/a\" content=\"mine\" }
";

/// Returns lines of an image about the capability, if they make sense there.
/// `known` says whether it is provided and required so far.
fn about(what: usize, known: &mut (bool, bool)) -> &'static str {
    let (line, after) = match (what, *known) {
        (0, (false, _)) => ("layer \"p0\"; layer \"u\"", (true, true)),
        (1, (false, _)) => ("layer \"p1\" port=7", (true, false)),
        (2, (true, _)) => ("layer \"u\"", (true, true)),
        (3, (true, used)) => ("replace \"k\" with=\"p1\"", (true, used)),
        (4, (true, used)) => ("replace \"k\" with=\"p0\" port=9", (true, used)),
        (5, (true, used)) => ("replace \"k\" with=\"p0\" by=\"rebuild\"", (true, used)),
        (6, (true, used)) => ("replace \"k\" with=\"p1\" by=\"rebuild\"", (true, used)),
        (7, (true, false)) => ("remove \"k\"", (false, false)),
        (8, (true, false)) => ("remove \"k\" by=\"rebuild\"", (false, false)),
        _ => ("", *known),
    };
    *known = after;
    line
}

const TREES: [&str; 2] = ["site", "conf"];

fn lines(rng: &mut Rng) -> Vec<String> {
    let mut lines = Vec::new();
    if rng.below(4) == 0 {
        lines.push("needs \"booted\"".to_owned());
    }
    for n in 0..1 + rng.below(4) {
        let tree = TREES[rng.below(2)];
        lines.push(match rng.below(8) {
            0 => format!("file \"/f{n}\" content=\"{{{{ greeting }}}} {}\"", rng.below(3)),
            1 => format!("file \"/t{n}\" template=\"page.j2\""),
            2 => format!("directory \"/d{n}\" from=\"{tree}\""),
            3 => format!("file \"/x{n}\" from=\"{tree}/a\""),
            4 => "run \"run.sh\"".to_owned(),
            5 => format!(
                "run {{ script \"echo {{{{ port }}}} {}\"; env A=\"{{{{ greeting }}}}\" }}",
                rng.below(3)
            ),
            6 => format!("symlink \"/l{n}\" target=\"/t{}\"", rng.below(3)),
            _ => format!("sysctl \"a.b{n}\" value={}", rng.below(3)),
        });
    }
    lines
}

impl Recipe {
    fn random(rng: &mut Rng) -> Self {
        let mut files = BTreeMap::from([
            ("page.j2".to_owned(), Item::File("{{ port }} of {{ greeting }}".into(), 0o644)),
            ("run.sh".to_owned(), Item::File("echo run".into(), 0o755)),
            ("unused".to_owned(), Item::File("no recipe reads this".into(), 0o644)),
        ]);
        for tree in TREES {
            for name in ["a", "b", "sub/c"] {
                files.insert(format!("{tree}/{name}"), Item::File(format!("{name} {}", rng.below(3)), 0o644));
            }
        }
        let configurations: Vec<Vec<String>> = (0..2 + rng.below(3)).map(|_| lines(rng)).collect();
        let images = (0..1 + rng.below(4))
            .map(|n| {
                let parent = if n > 0 && rng.below(4) > 0 { Some(rng.below(n)) } else { None };
                let layers = (0..rng.below(4))
                    .map(|_| (rng.below(configurations.len()), rng.below(3) as u32))
                    .collect();
                (parent, layers, 1 + rng.below(2) as u32, rng.below(3) == 0, rng.below(12))
            })
            .collect();
        Self { files, images, configurations, greeting: "hello".into(), comment: String::new() }
    }

    fn text(&self) -> String {
        let mut out = format!("// {}\nparam \"greeting\" default=\"{}\"\n", self.comment, self.greeting);
        out.push_str(CAPABILITY);
        let mut known: Vec<(bool, bool)> = Vec::new();
        for (n, (parent, layers, cpus, output, what)) in self.images.iter().enumerate() {
            let mut now = parent.map_or((false, false), |parent| known[parent]);
            let _ = writeln!(out, "image \"i{n}\" {{");
            let _ = match parent {
                Some(parent) => writeln!(out, "    from \"i{parent}\""),
                None => writeln!(out, "    bootstrap \"debian\" suite=\"bookworm\""),
            };
            let _ = writeln!(out, "    machine cpus={cpus}");
            for (n, (configuration, port)) in layers.iter().enumerate() {
                if n == 1 {
                    let _ = writeln!(out, "    {}", about(*what, &mut now));
                }
                let _ = writeln!(out, "    layer \"c{configuration}\" port={port}");
            }
            let _ = writeln!(out, "    {}", about(what / 2 + 3, &mut now));
            known.push(now);
            if *output {
                let format = ["qcow2", "raw"][n % 2];
                let _ = writeln!(out, "    output \"{format}\" path=\"i{n}.img\"");
            }
            out.push_str("}\n");
        }
        for (n, lines) in self.configurations.iter().enumerate() {
            let _ = writeln!(
                out,
                "configuration \"c{n}\" {{\n    input \"port\" type=\"int\"\n    {}\n}}",
                lines.join("\n    ")
            );
        }
        out
    }

    fn edit(&mut self, rng: &mut Rng) -> &'static str {
        let names: Vec<String> = self.files.keys().cloned().collect();
        let name = names[rng.below(names.len())].clone();
        let movable: Vec<&String> = names.iter().filter(|n| n.contains('/') && !n.ends_with("/a")).collect();
        match rng.below(13) {
            0 | 1 => {
                // Some edits change nothing, or restore an older content.
                if let Some(Item::File(text, _)) = self.files.get_mut(&name) {
                    let base = text.split(" #").next().unwrap_or("").to_owned();
                    *text = format!("{base} #{}", rng.below(4));
                }
                "content"
            }
            2 => {
                if !movable.is_empty() {
                    let from = movable[rng.below(movable.len())].clone();
                    if let Some(item) = self.files.remove(&from) {
                        self.files.insert(format!("{from}.{}", rng.below(2)), item);
                    }
                }
                "rename"
            }
            3 => {
                if let Some(Item::File(_, mode)) = self.files.get_mut(&name) {
                    *mode = [0o644, 0o600, 0o755][rng.below(3)];
                }
                "chmod"
            }
            4 => {
                self.files.insert(
                    format!("{}/link", TREES[rng.below(2)]),
                    Item::Link(["a", "b", "nowhere"][rng.below(3)].into()),
                );
                "symlink"
            }
            5 => {
                let image = rng.below(self.images.len());
                let layers = &mut self.images[image].1;
                if layers.len() > 1 {
                    let (a, b) = (rng.below(layers.len()), rng.below(layers.len()));
                    layers.swap(a, b);
                }
                "reorder layers"
            }
            6 => {
                let image = rng.below(self.images.len());
                let layers = &mut self.images[image].1;
                if !layers.is_empty() {
                    let n = rng.below(layers.len());
                    layers[n].1 = rng.below(4) as u32;
                }
                "input"
            }
            7 => {
                let n = rng.below(self.configurations.len());
                self.configurations[n] = lines(rng);
                "configuration"
            }
            8 => {
                self.greeting = ["hello", "hi", "hey"][rng.below(3)].into();
                "parameter"
            }
            9 => {
                let n = rng.below(self.configurations.len());
                let len = self.configurations[n].len();
                let (a, b) = (rng.below(len), rng.below(len));
                self.configurations[n].swap(a, b);
                "reorder steps"
            }
            10 => {
                let image = rng.below(self.images.len());
                self.images[image].2 = 1 + rng.below(2) as u32;
                "machine"
            }
            11 => {
                let image = rng.below(self.images.len());
                self.images[image].4 = rng.below(12);
                "capability"
            }
            _ => {
                self.comment = format!("comment {}", rng.below(100));
                "comment"
            }
        }
    }

    /// Changes the files of a project from `was` to this, and leaves the rest
    /// alone.
    fn write(&self, dir: &Path, was: Option<&Self>) {
        std::fs::create_dir_all(dir).unwrap();
        if was.is_none_or(|was| was.text() != self.text()) {
            std::fs::write(dir.join("main.vimg"), self.text()).unwrap();
        }
        let empty = BTreeMap::new();
        let was = was.map_or(&empty, |was| &was.files);
        for (name, _) in was.iter().filter(|(name, item)| self.files.get(*name) != Some(*item)) {
            std::fs::remove_file(dir.join(name)).unwrap();
        }
        for (name, item) in self.files.iter().filter(|(name, item)| was.get(*name) != Some(*item)) {
            let path = dir.join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            match item {
                Item::File(text, mode) => {
                    std::fs::write(&path, text).unwrap();
                    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(*mode)).unwrap();
                }
                Item::Link(target) => std::os::unix::fs::symlink(target, &path).unwrap(),
            }
        }
    }
}

struct Built {
    outcome: Outcome,
    launches: usize,
    states: BTreeMap<String, State>,
    /// How often a rebuilt state was identical to the previous one.
    same: usize,
    /// How often an output was made from the previous one.
    revised: usize,
    standing: PlanCache,
}

/// The digest of the command line, which is always the same here.
const REQUEST: Digest = Digest([7; 32]);

/// Whether the plan cache of an earlier build says that nothing has changed.
fn stands(standing: &PlanCache, project: &Path, store: &Path) -> bool {
    standing.holds(
        &REQUEST,
        &Project::open(project).unwrap(),
        &Store::open(store).unwrap().trusting(Arc::new(|_, _| true)),
    )
}

/// Builds everything with a fake provider.
fn run(project: &Path, store: &Path, leak: Option<PathBuf>) -> Built {
    run_with(project, store, leak, &Caches::default())
}

/// A build that may have failed.
struct Attempt {
    context: BuildContext<Fake>,
    nodes: Vec<NodeId>,
    plan: Plan,
    outcome: Outcome,
    same: usize,
    notices: Vec<String>,
}

/// Builds everything with a fake provider and with caches.
fn run_with(project: &Path, store: &Path, leak: Option<PathBuf>, caches: &Caches) -> Built {
    let fake = Arc::new(Fake { leak, ..Fake::default() });
    let Attempt { context, nodes, plan, outcome, same, .. } = attempt(project, store, &fake, caches);
    assert!(outcome.failures.is_empty(), "{:?}", outcome.failures);
    let (graph, store, project) = (&context.graph, &context.store, &context.project);
    let caching = Caching { caches, store, sink: &context.sink, may_leave: &|_| false };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(caching.send(graph, &nodes)).unwrap();
    let states = graph
        .ids()
        .map(|id| {
            let node = graph.node(id);
            let record = store.record(&node.key).unwrap();
            let disk = store.state_dir(&node.key).join(record.disk.kind.file_name());
            (node.name.clone(), read_state(&disk))
        })
        .collect();
    let standing = PlanCache::new(REQUEST, project, graph, &plan, Vec::new()).unwrap();
    let count = |counter: &AtomicUsize| counter.load(Ordering::Relaxed);
    let (launches, revised) = (count(&fake.launches), count(&fake.revised));
    Built { outcome, launches, states, same, revised, standing }
}

/// Builds everything with this provider and with caches.
fn attempt(project: &Path, store: &Path, fake: &Arc<Fake>, caches: &Caches) -> Attempt {
    let project = Arc::new(Project::open(project).unwrap().later(1000));
    let mut sources = Sources::default();
    let request = Request {
        files: &*project,
        entry: FileRef::project("main.vimg"),
        set: &[],
        values: None,
        rebuilt: None,
        distributions: &vimg::base::known(vimg::base::BUILT_IN),
    };
    let model = compile(&request, &mut sources)
        .unwrap_or_else(|d| panic!("{d:?}\n{}", sources.iter().next().unwrap().text));
    let store = Store::open(store).unwrap().trusting(Arc::new(|_, _| true));
    let mut graph = Graph::new(&model, &project, vimg::base::BUILT_IN).unwrap();
    graph.resolve(|key| store.stands_for(key));
    let nodes: Vec<_> = graph.ids().collect();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let same = Arc::new(AtomicUsize::new(0));
    let notices = Arc::new(Mutex::new(Vec::new()));
    let (counted, noted) = (same.clone(), notices.clone());
    let sink: Sink = Arc::new(move |event| match event {
        Event::Same { .. } => drop(counted.fetch_add(1, Ordering::Relaxed)),
        Event::Notice { text, .. } => noted.lock().unwrap().push(text.to_string()),
        _ => {}
    });
    let caching = Caching { caches, store: &store, sink: &sink, may_leave: &|_| false };
    let last = store.last(&store.project(project.root()));
    let budget = Budget { jobs: 3, memory: 16 << 30, keep_going: false, use_snapshots: true };
    let mut context = BuildContext {
        lease: store.lease([]).unwrap(),
        graph: Arc::new(graph),
        store: store.clone(),
        project: project.clone(),
        secrets: Arc::default(),
        provider: fake.clone(),
        disks: fake.clone(),
        distributions: fake.distributions(),
        access: vimg::host::network::Access::default(),
        sink: sink.clone(),
        budget,
        staged: Arc::default(),
        room: Arc::default(),
    };
    let (plan, outcome) = runtime.block_on(make(&mut context, &caching, &last, &nodes));
    let (same, notices) = (same.load(Ordering::Relaxed), notices.lock().unwrap().clone());
    Attempt { context, nodes, plan, outcome, same, notices }
}

/// A directory in memory for stores. These tests do not test the disk.
fn scratch() -> tempfile::TempDir {
    let shm = Path::new("/dev/shm");
    if shm.is_dir() { tempfile::tempdir_in(shm).unwrap() } else { tempfile::tempdir().unwrap() }
}

/// A directory on a disk for projects. Files in memory may change unseen, so
/// vimg remembers no digests of them.
fn checkout() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// Runs one sequence of edits. The error says where the incremental result
/// differs.
fn sequence(seed: u64, edits: usize, leak: bool) -> Result<[usize; 3], String> {
    let mut rng = Rng(seed);
    let (dir, files) = (scratch(), checkout());
    let (project, store) = (files.path().join("project"), dir.path().join("store"));
    let leaked = leak.then(|| project.join("unused"));
    let mut recipe = Recipe::random(&mut rng);
    let mut seen: Vec<Recipe> = Vec::new();
    let (mut reused, mut same, mut revised) = (0, 0, 0);
    let mut standing: Option<PlanCache> = None;
    for edit in 0..=edits {
        let mut what = "first";
        let mut back = false;
        if edit > 0 {
            if leak && edit == 2 {
                // An undeclared file changes, so nothing must be rebuilt.
                recipe.files.insert("unused".into(), Item::File(format!("edit {seed}"), 0o644));
                what = "undeclared";
            } else if rng.below(6) == 0 {
                recipe = seen[rng.below(seen.len())].clone();
                what = "revert";
            } else {
                what = recipe.edit(&mut rng);
            }
            back = seen.contains(&recipe);
        }
        recipe.write(&project, seen.last());
        seen.push(recipe.clone());
        let stood = standing.as_ref().is_some_and(|s| stands(s, &project, &store));
        let incremental = run(&project, &store, leaked.clone());
        if stood && incremental.outcome.built > 0 {
            return Err(format!("seed {seed}, edit {edit} ({what}): the plan cache did not notice it"));
        }
        reused += incremental.outcome.reused;
        same += incremental.same;
        revised += incremental.revised;
        if back && incremental.outcome.built > 0 {
            return Err(format!("seed {seed}, edit {edit} ({what}): an earlier state is built again"));
        }
        let again = run(&project, &store, leaked.clone());
        if again.outcome.built > 0 || again.launches > 0 {
            return Err(format!("seed {seed}, edit {edit} ({what}): a second build runs something"));
        }
        // Stamps of files show a change only after the next tick of the clock.
        standing = None;
        if seed.is_multiple_of(8) {
            std::thread::sleep(std::time::Duration::from_millis(10));
            if !stands(&again.standing, &project, &store) {
                return Err(format!(
                    "seed {seed}, edit {edit} ({what}): nothing changed, but the plan cache is not valid"
                ));
            }
            standing = Some(again.standing);
        }
        let clean_store = dir.path().join("clean");
        let clean = run(&project, &clean_store, leaked.clone());
        std::fs::remove_dir_all(&clean_store).unwrap();
        if clean.states != incremental.states {
            let names: BTreeSet<&String> =
                clean.states.keys().filter(|k| clean.states.get(*k) != incremental.states.get(*k)).collect();
            return Err(format!("seed {seed}, edit {edit} ({what}): {names:?} differ from a clean build"));
        }
    }
    Ok([reused, same, revised])
}

/// How many sequences to run: VIMG_SEQUENCES, or 1,000.
fn sequences() -> u64 {
    std::env::var("VIMG_SEQUENCES").ok().and_then(|n| n.parse().ok()).unwrap_or(1000)
}

#[test]
fn incremental_builds_equal_clean_ones() {
    let total = sequences();
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get() as u64);
    let add = |a: [usize; 3], b: [usize; 3]| std::array::from_fn(|n| a[n] + b[n]);
    let [reused, same, revised] = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|worker| {
                scope.spawn(move || {
                    (worker..total)
                        .step_by(threads as usize)
                        .map(|seed| {
                            sequence(seed, 3 + (seed % 4) as usize, false).unwrap_or_else(|e| panic!("{e}"))
                        })
                        .fold([0; 3], add)
                })
            })
            .collect();
        workers.into_iter().map(|w| w.join().unwrap()).fold([0; 3], add)
    });
    assert!(revised > total as usize / 20, "too few outputs are made from previous ones: {revised}");
    assert!(same > total as usize / 40, "too few early cutoffs to prove anything: {same}");
    assert!(reused > total as usize, "the sequences reuse too little to prove anything: {reused}");
}

/// Runners that share only a cache, some of them new. Each has the result of a
/// clean build in the end, and no runner builds what another one built.
#[test]
fn runners_that_share_a_cache_have_what_clean_builds_make() {
    let mut taken = 0;
    let total = sequences().div_ceil(80).max(25);
    for seed in 0..total {
        let mut rng = Rng(9_000_000 + seed);
        let (dir, files) = (scratch(), checkout());
        let mut recipe = Recipe::random(&mut rng);
        let mut seen: Vec<Recipe> = Vec::new();
        let signer = Signer::generate().unwrap();
        let caches = || {
            let mut trust = Trust::default();
            trust.add_own(signer.public());
            let spec = format!("type=memory,id=runners {seed},domain=main,mode=max");
            let remote = Arc::new(Remote::open(Spec::parse(&spec, true).unwrap()).unwrap());
            let mut caches = Caches::new(trust, Some(signer.clone()), "project".into());
            caches.from.push(remote.clone());
            caches.to.push(remote);
            caches
        };
        for edit in 0..6 {
            if edit > 0 && rng.below(3) == 0 {
                recipe = seen[rng.below(seen.len())].clone();
            } else if edit > 0 {
                recipe.edit(&mut rng);
            }
            let (project, runner) = (files.path().join("project"), rng.below(3));
            let store = dir.path().join(format!("runner-{runner}"));
            if rng.below(3) == 0 {
                let _ = std::fs::remove_dir_all(&store);
            }
            let _ = std::fs::remove_dir_all(&project);
            recipe.write(&project, None);
            let built = run_with(&project, &store, None, &caches());
            assert!(
                !seen.contains(&recipe) || built.outcome.built == 0,
                "seed {seed}, edit {edit}: runner {runner} builds what another one built"
            );
            taken += usize::from(built.outcome.built == 0);
            let clean = run(&project, &dir.path().join("clean"), None);
            std::fs::remove_dir_all(dir.path().join("clean")).unwrap();
            assert_eq!(clean.states, built.states, "seed {seed}, edit {edit}");
            seen.push(recipe.clone());
        }
    }
    assert!(taken as u64 > total, "only {taken} builds had nothing to build");
}

/// The tests above must be able to fail: they notice a machine that reads an
/// undeclared file.
#[test]
fn an_undeclared_read_is_found_out() {
    let found = (0..60).filter(|seed| sequence(1_000_000 + seed, 6, true).is_err()).count();
    assert!(found > 20, "only {found} of 60 sequences noticed");
}

/// A replace gives the same machine as a rebuild, except for the machine's own
/// record of it.
#[test]
fn a_replace_leaves_what_a_rebuild_makes() {
    let recipe = |tail: &str| {
        format!(
            "image \"base\" {{ bootstrap \"debian\" suite=\"bookworm\" }}\n\
             param \"greeting\" default=\"hello\"\n{CAPABILITY}\
             configuration \"below\" {{ file \"/below\" content=\"1\"; file \"/p\" content=\"below\" }}\n\
             configuration \"above\" {{ file \"/above\" content=\"1\" }}\n\
             image \"web\" {{ from \"base\"; layer \"below\"; layer \"p0\"; layer \"u\"; layer \"above\" }}\n{tail}"
        )
    };
    let (dir, files) = (scratch(), checkout());
    let (project, store) = (files.path().join("project"), dir.path().join("store"));
    std::fs::create_dir_all(project.join("site")).unwrap();
    std::fs::write(project.join("site/a"), "theirs").unwrap();
    let tails = "image \"reverted\" { from \"web\"; replace \"k\" with=\"p1\" }\n\
                 image \"rebuilt\" { from \"web\"; replace \"k\" with=\"p1\" by=\"rebuild\" }\n\
                 image \"back\" { from \"reverted\"; replace \"k\" with=\"p0\" }\n\
                 image \"bare\" { from \"base\"; layer \"below\"; layer \"p0\"; layer \"above\"; remove \"k\" }\n\
                 image \"never\" { from \"base\"; layer \"below\"; layer \"above\" }\n";
    std::fs::write(project.join("main.vimg"), recipe(tails)).unwrap();
    let built = run(&project, &store, None);
    let state = |name: &str| -> State {
        let own = |key: &String| !key.starts_with("was ");
        built.states[name].iter().filter(|(k, _)| own(k)).map(|(k, v)| (k.clone(), v.clone())).collect()
    };
    assert_eq!(state("reverted@p1"), state("rebuilt@above"));
    assert!(
        state("reverted@p1")["/u"] != state("web@u")["/u"]
            || state("web@u")["/p"] != state("reverted@p1")["/p"]
    );
    assert_eq!(state("back@p0"), state("web@above"));
    assert_eq!(state("bare@remove-k"), state("never@above"));
    // The layers below are not rebuilt.
    assert!(built.states.contains_key("rebuilt@p1") && !built.states.contains_key("rebuilt@below"));
}

/// Returns files, links and settings of a configuration, with names from
/// `pools`.
fn resources(rng: &mut Rng, pools: &[&str]) -> String {
    let mut lines = BTreeMap::new();
    for _ in 0..1 + rng.below(5) {
        let pool = pools[rng.below(pools.len())];
        let (n, what) = (rng.below(4), rng.below(3));
        let (name, line) = match rng.below(5) {
            0 => (format!("/{pool}/l{n}"), format!("symlink \"/{pool}/l{n}\" target=\"/{what}\"")),
            1 => (format!("{pool}.s{n}"), format!("sysctl \"{pool}.s{n}\" value={what}")),
            2 => (format!("/{pool}/d{n}"), format!("directory \"/{pool}/d{n}\" mode=\"070{what}\"")),
            _ => (
                format!("/{pool}/f{n}"),
                format!("file \"/{pool}/f{n}\" content=\"{what}\" mode=\"060{what}\""),
            ),
        };
        lines.insert(name, line);
    }
    lines.into_values().collect::<Vec<_>>().join("; ")
}

/// Random stacks of layers, and random replaces and removals on them. Each
/// gives the same machine as a rebuild without the old provider.
#[test]
fn random_replaces_leave_what_rebuilds_make() {
    let (mut replaced, mut removed) = (0, 0);
    // Fewer sequences would not cover all cases.
    for seed in 0..sequences().div_ceil(10).max(50) {
        let mut rng = Rng(7_000_000 + seed);
        let mut text = "image \"base\" { bootstrap \"debian\" suite=\"bookworm\" }\n\
                        capability \"k\" { input \"port\" type=\"int\" }\n"
            .to_owned();
        let mut stack = Vec::new();
        for n in 0..rng.below(3) {
            // A provider may change files of the layers below it.
            writeln!(text, "configuration \"b{n}\" {{ {} }}", resources(&mut rng, &["r", "u"])).unwrap();
            stack.push(format!("layer \"b{n}\""));
        }
        for n in 0..3 {
            let what = resources(&mut rng, &["r", "p"]);
            let input = "input \"port\" type=\"int\" default=5; file \"/port\" content=\"{{ port }}\"";
            writeln!(text, "configuration \"p{n}\" provides=\"k\" {{ {input}; {what} }}").unwrap();
        }
        stack.push(format!("layer \"p{}\"", rng.below(3)));
        let used = rng.below(3);
        for n in 0..used + rng.below(3) {
            let (name, needs, pools): (_, _, &[&str]) = match n < used {
                true => (
                    format!("u{n}"),
                    "requires \"k\"; file \"/uses\" content=\"{{ port }}\"; ",
                    &["u", "r", "p"],
                ),
                false => (format!("a{n}"), "", &["a"]),
            };
            writeln!(text, "configuration \"{name}\" {{ {needs}{} }}", resources(&mut rng, pools)).unwrap();
            // Among layers that it does not depend on, in any order.
            let above = stack.len() - rng.below(n + 1);
            stack.insert(above, format!("layer \"{name}\""));
        }
        writeln!(text, "image \"web\" {{ from \"base\"; {} }}", stack.join("; ")).unwrap();
        let mut ops: Vec<String> = Vec::new();
        for _ in 0..1 + rng.below(3) {
            if used == 0 && rng.below(3) == 0 {
                ops.push("remove \"k\"".into());
                removed += 1;
                break;
            }
            let port = if rng.below(2) == 0 { format!(" port={}", rng.below(9)) } else { String::new() };
            ops.push(format!("replace \"k\" with=\"p{}\"{port}", rng.below(3)));
            replaced += 1;
        }
        for (image, by) in [("reverted", ""), ("rebuilt", " by=\"rebuild\"")] {
            let ops: String = ops.iter().map(|op| format!("{op}{by}; ")).collect();
            writeln!(text, "image \"{image}\" {{ from \"web\"; {ops}output \"raw\" path=\"{image}\" }}")
                .unwrap();
        }
        let (dir, files) = (scratch(), checkout());
        let (project, store) = (files.path().join("project"), dir.path().join("store"));
        std::fs::create_dir_all(&project).unwrap();
        std::fs::write(project.join("main.vimg"), &text).unwrap();
        let built = run(&project, &store, None);
        let state = |image: &str| -> State {
            // If no layer is left to apply, a rebuild starts no machine.
            let own = |key: &String| !key.starts_with("was ") && key != "machine";
            let state = built.states[&format!("{image}:seal")].iter();
            state.filter(|(key, _)| own(key)).map(|(k, v)| (k.clone(), v.clone())).collect()
        };
        assert_eq!(state("reverted"), state("rebuilt"), "seed {seed}:\n{text}");
    }
    assert!(replaced > 0 && removed > 0, "{replaced} replaced, {removed} removed");
}

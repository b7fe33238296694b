//! The cost of a build with nothing to do: `vimg plan` and `vimg build` of
//! chains of 10 to 10,000 layers, compared with `ninja` on the same graph.
//!
//! `cargo bench --bench noop` prints a table. Each layer reads a file of its
//! own. The tests' fake provider builds the states. The benchmark measures the
//! program as users run it, from start to exit.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a benchmark prints, and panics if it can't continue"
)]

#[path = "../tests/common/mod.rs"]
mod common;

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use vimg::execute::{Budget, BuildContext, build};
use vimg::files::Project;
use vimg::graph::Graph;
use vimg::plan::Plan;
use vimg::store::{Last, Store};
use vimg_lang::{FileRef, Request, Sources, compile};

const SIZES: [usize; 4] = [10, 100, 1_000, 10_000];

fn main() {
    // Arguments are sizes: `cargo bench --bench noop -- 1000`.
    let named: Vec<usize> = std::env::args().filter_map(|a| a.parse().ok()).collect();
    let sizes = if named.is_empty() { SIZES.to_vec() } else { named };
    let rows: Vec<String> = sizes.iter().map(|n| measure(*n)).collect();
    println!("layers   vimg plan   vimg build   ninja      build/ninja");
    for row in rows {
        println!("{row}");
    }
}

fn measure(n: usize) -> String {
    let dir = tempfile::tempdir().expect("a directory");
    let (project, store) = (dir.path().join("project"), dir.path().join("store"));
    write_project(&project, n);
    fill(&project, &store);
    // vimg hashes files younger than two seconds each time.
    std::thread::sleep(Duration::from_secs(3));
    let vimg = |command: &str| {
        let mut c = Command::new(env!("CARGO_BIN_EXE_vimg"));
        c.args([command, "--quiet"]).current_dir(&project).env("VIMG_STORE", &store);
        c
    };
    let ninja = || {
        let mut c = Command::new("ninja");
        c.arg("--quiet").current_dir(&project);
        c
    };
    // The first run of each fills its caches, and creates ninja's outputs.
    for mut first in [vimg("build"), ninja()] {
        run(&mut first);
    }
    let times = if n > 1_000 { 7 } else { 21 };
    // The programs take turns, so that they meet the same load.
    let mut samples: [Vec<Duration>; 3] = Default::default();
    for _ in 0..times {
        samples[0].push(run(&mut vimg("plan")));
        samples[1].push(run(&mut vimg("build")));
        samples[2].push(run(&mut ninja()));
    }
    let [plan, build, ninja] = samples.map(|mut s| {
        s.sort();
        s[s.len() / 2].as_secs_f64() * 1000.0
    });
    format!("{n:6}   {plan:7.1} ms   {build:7.1} ms   {ninja:6.1} ms   {:5.2}", build / ninja)
}

fn run(command: &mut Command) -> Duration {
    let start = Instant::now();
    let status = command.stdout(Stdio::null()).status().expect("it can be run");
    assert!(status.success());
    start.elapsed()
}

fn write_project(dir: &Path, n: usize) {
    std::fs::create_dir_all(dir.join("f")).expect("a directory");
    let mut recipe = "image \"it\" {\n    bootstrap \"debian\" suite=\"bookworm\"\n".to_owned();
    let mut ninja = "rule make\n  command = touch $out\n".to_owned();
    for i in 0..n {
        std::fs::write(dir.join(format!("f/{i}")), format!("file {i}\n")).expect("a file");
        let _ = writeln!(recipe, "    layer \"c\" n={i} from=\"f/{i}\"");
        let below = if i == 0 { String::new() } else { format!("out/{} ", i - 1) };
        let _ = writeln!(ninja, "build out/{i}: make {below}f/{i}");
    }
    recipe.push_str("}\nconfiguration \"c\" {\n    input \"n\" type=\"int\"\n    input \"from\" type=\"path\"\n    file \"/f/{{ n }}\" from=\"{{ from }}\"\n}\n");
    std::fs::write(dir.join("main.vimg"), recipe).expect("a file");
    std::fs::write(dir.join("build.ninja"), ninja).expect("a file");
}

fn fill(project: &Path, store: &Path) {
    let project = Project::open(project).expect("the project");
    let mut sources = Sources::default();
    let request = Request {
        files: &project,
        entry: FileRef::project("main.vimg"),
        set: &[],
        values: None,
        rebuilt: None,
        distributions: &vimg::base::known(vimg::base::BUILT_IN),
    };
    let model = compile(&request, &mut sources).expect("a good recipe");
    let graph = Arc::new(Graph::new(&model, &project, vimg::base::BUILT_IN).expect("a graph"));
    let store = Store::open(store).expect("a store");
    let nodes: Vec<_> = graph.ids().collect();
    let plan = Plan::new(&graph, &store, &Last::default(), &BTreeMap::new(), &nodes);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let budget = Budget { jobs: 2, memory: 8 << 30, keep_going: false, use_snapshots: true };
    let fake = Arc::new(common::Fake::default());
    let context = BuildContext {
        lease: store.lease([]).unwrap(),
        graph,
        store,
        project: Arc::new(project),
        secrets: Arc::default(),
        provider: fake.clone(),
        disks: fake.clone(),
        distributions: fake.distributions(),
        access: vimg::host::network::Access::default(),
        sink: Arc::new(|_| {}),
        budget,
        staged: Arc::default(),
        room: Arc::default(),
    };
    let outcome = runtime.block_on(build(&context, &plan));
    assert!(outcome.failures.is_empty(), "{:?}", outcome.failures);
}

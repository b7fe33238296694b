//! The screens that people see, as files in `tests/screens`. A reviewer of a new
//! text reads the difference there. `VIMG_BLESS=1 cargo test --test screens`
//! writes them.
//!
//! Builds run in the library, with the machines of `common`. All other commands
//! run as processes, on the store that these builds leave.

#![expect(clippy::unwrap_used, reason = "a test that can't go on fails")]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};

use common::Fake;
use vimg::cache::Caches;
use vimg::cli::failure_text;
use vimg::event::Sink;
use vimg::execute::caching::Caching;
use vimg::execute::{Budget, BuildContext, make};
use vimg::files::Project;
use vimg::graph::Graph;
use vimg::report::{self, Style};
use vimg::store::Store;
use vimg_lang::{FileRef, Request, Sources, compile};

const RECIPE: &str = r#"use "std/debian.vimg"

image "web" {
    from "debian-12"
    layer "site" port=80
    layer "tuning"
    check "serves" {
        port 80
    }
    output "qcow2" path="web.qcow2"
}

configuration "site" {
    input "port" type="int"
    directory "/srv" from="site"
    file "/etc/port" content="{{ port }}"
}

configuration "tuning" {
    run "tune.sh"
}
"#;

const STYLE: Style = Style { colour: false, colour_out: false, json: false, quiet: false, verbose: false };

/// A project with its store, and the screens that it showed so far.
struct Session {
    /// A directory on a disk: vimg remembers no digests of files in memory.
    dir: tempfile::TempDir,
    screens: String,
}

impl Session {
    fn new(recipe: &str) -> Self {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let session = Self { dir, screens: String::new() };
        session.write("main.vimg", recipe);
        session
    }

    fn example() -> Self {
        let session = Self::new(RECIPE);
        session.write("site/index.html", "hello");
        session.write("site/css/base.css", "body {}");
        session.write("tune.sh", "tune");
        session
    }

    fn root(&self) -> PathBuf {
        self.dir.path().join("project")
    }

    fn store(&self) -> PathBuf {
        self.dir.path().join("store")
    }

    fn write(&self, name: &str, text: &str) {
        let path = self.root().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    /// Adds a screen: a command or an edit, and what the user sees.
    fn show(&mut self, title: &str, text: &str) {
        let text = text.replace(self.dir.path().to_str().unwrap(), "DIR");
        let lines: Vec<String> = text.lines().map(stable).collect();
        self.screens.push_str(&format!("$ {title}\n{}\n\n", lines.join("\n")));
    }

    fn edit(&mut self, name: &str, text: &str) {
        self.write(name, text);
        self.screens.push_str(&format!("# {name} is now `{text}`\n\n"));
    }

    /// Runs vimg as a process with a clean environment.
    fn vimg(&mut self, arguments: &str) {
        let output = Command::new("timeout")
            .args(["20", env!("CARGO_BIN_EXE_vimg")])
            .args(arguments.split(' '))
            .current_dir(self.root())
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("HOME", self.dir.path())
            .env("VIMG_STORE", self.store())
            .output()
            .unwrap();
        let mut text = String::from_utf8(output.stdout).unwrap();
        text.push_str(&String::from_utf8(output.stderr).unwrap());
        match output.status.code().unwrap() {
            0 => {}
            code => text.push_str(&format!("[exit code {code}]\n")),
        }
        self.show(&format!("vimg {arguments}"), &text);
    }

    /// Builds everything with machines in memory, and shows what `vimg build`
    /// would print.
    fn build(&mut self) {
        let project = Arc::new(Project::open(&self.root()).unwrap().later(1000));
        let mut sources = Sources::default();
        // The program that reads the store computes the same keys.
        let own = vimg::base::BUILT_IN;
        let request = Request {
            files: &*project,
            entry: FileRef::project("main.vimg"),
            set: &[],
            values: None,
            rebuilt: None,
            distributions: &vimg::base::known(own),
        };
        let model = compile(&request, &mut sources).unwrap();
        let store = Store::open(&self.store()).unwrap();
        let mut graph = Graph::new(&model, &project, own).unwrap();
        graph.resolve(|key| store.stands_for(key));
        // Of the library's bases, only the one that the image starts from.
        let nodes: Vec<_> = graph.ids().filter(|id| graph.node(*id).name != "debian-13:base").collect();
        let lines = Arc::new(Mutex::new(Vec::new()));
        let seen = lines.clone();
        let sink: Sink = Arc::new(move |event| seen.lock().unwrap().extend(report::line(&event, STYLE)));
        let caches = Caches::default();
        let caching = Caching { caches: &caches, store: &store, sink: &sink, may_leave: &|_| false };
        let last = store.last(&store.project(project.root()));
        let fake = Arc::new(Fake::default());
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
            // One job: the order of the lines is always the same.
            budget: Budget { jobs: 1, memory: 16 << 30, keep_going: false, use_snapshots: false },
            staged: Arc::default(),
            room: Arc::default(),
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (_, outcome) = runtime.block_on(make(&mut context, &caching, &last, &nodes));
        let mut text = lines.lock().unwrap().join("\n") + "\n";
        for failure in &outcome.failures {
            text.push_str(&failure_text(&sources, failure, STYLE));
        }
        self.show("vimg build", &text);
    }

    /// Compares the screens with those in a file.
    fn compare(self, name: &str) {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/screens").join(name);
        let actual = format!("{}\n", self.screens.trim_end());
        if std::env::var_os("VIMG_BLESS").is_some() {
            fs::write(&file, &actual).unwrap();
        }
        let expected = fs::read_to_string(&file).unwrap_or_default();
        let places = actual.lines().zip(expected.lines()).position(|(a, b)| a != b);
        assert!(
            actual == expected,
            "{} differs from line {} on; VIMG_BLESS=1 writes it\n{actual}",
            file.display(),
            places.unwrap_or_else(|| actual.lines().count().min(expected.lines().count())) + 1,
        );
    }
}

/// Replaces what differs between two runs or two hosts: times, sizes, hashes,
/// versions, and how machines would run.
fn stable(line: &str) -> String {
    for start in ["layers are applied in ", "machines are booted ", "  agent behaviour: "] {
        if line.starts_with(start) {
            return format!("{start}...");
        }
    }
    let words: Vec<&str> = line.split(' ').collect();
    let mut out = String::new();
    let mut n = 0;
    while let Some(word) = words.get(n) {
        let bare = word.trim_end_matches([',', ':']);
        let next = words.get(n + 1).copied().unwrap_or_default();
        let unit = next.trim_end_matches([',', ';', ')']);
        let kind = match unit {
            "s" | "min" => "TIME",
            "B" | "KiB" | "MiB" | "GiB" => "SIZE",
            _ => "",
        };
        if word.parse::<f64>().is_ok() && !kind.is_empty() {
            // A number at the right of its column: its width differs, too.
            let before = out.trim_end().len();
            out.truncate(out.len().min(before + 2));
            out.push_str(&next.replace(unit, kind));
            n += 1;
        } else if bare.len() >= 12 && bare.bytes().all(|b| b.is_ascii_hexdigit()) {
            out.push_str(&word.replace(bare, "HASH"));
        } else {
            out.push_str(word);
        }
        out.push(' ');
        n += 1;
    }
    out.trim_end().to_owned()
}

#[test]
fn an_edit_is_planned_and_built() {
    let mut session = Session::example();
    session.vimg("plan");
    session.build();
    session.edit("site/index.html", "good evening");
    session.vimg("plan");
    session.vimg("why web@site");
    session.vimg("log web@site");
    session.build();
    session.compare("edit.txt");
}

#[test]
fn a_build_without_work_writes_its_output_once() {
    let mut session = Session::example();
    session.build();
    session.vimg("plan");
    session.vimg("build");
    session.vimg("build");
    session.vimg("list");
    session.vimg("graph");
    session.compare("nothing-to-do.txt");
}

#[test]
fn a_failed_layer_shows_its_output_and_its_place() {
    let mut session = Session::example();
    session.build();
    session.edit("tune.sh", "fail: no such setting");
    session.build();
    session.vimg("log web@tuning");
    session.vimg("plan");
    session.compare("failure.txt");
}

#[test]
fn mistakes_say_what_to_do() {
    let mut session = Session::new(&RECIPE.replace("layer \"tuning\"", "layer \"tunning\""));
    session.vimg("build");
    session.edit("main.vimg", "image \"x\" { form \"y\" }");
    session.vimg("check");
    session.edit("main.vimg", "image \"x\" { layer 7; output \"qcow2\" path=\"../x.img\" }\nimage \"x\" {}");
    session.vimg("build");
    session.edit("main.vimg", "image \"x\" {");
    session.vimg("build");
    session.write("main.vimg", RECIPE);
    session.screens.push_str("# main.vimg is good again, but site and tune.sh are missing\n\n");
    session.vimg("build");
    session.write("site/index.html", "hello");
    session.edit("tune.sh", "tune");
    session.vimg("check");
    session.vimg("build wep");
    session.vimg("plan --set port=8080");
    session.vimg("log web@tuning");
    session.vimg("why web@site2");
    session.vimg("bild");
    session.compare("mistakes.txt");
}

#[test]
fn a_checkout_asks_for_permission() {
    let mut session = Session::example();
    session.write("main.vimg", &RECIPE.replace("web.qcow2", "../web.qcow2"));
    session.vimg("build");
    session.write("main.vimg", &format!("secret \"token\" env=\"TOKEN\"\n{RECIPE}"));
    session.edit("vimg.kdl", "cache-to \"type=local,dest=/srv/cache\"");
    session.vimg("plan");
    session.vimg("trust --list");
    session.compare("permission.txt");
}

#[test]
fn an_empty_store_is_shown() {
    let mut session = Session::example();
    session.vimg("store du");
    session.vimg("store gc --dry-run");
    session.vimg("ps");
    session.compare("store.txt");
}

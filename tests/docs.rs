//! Checks the documents against the code: references are generated, tables are
//! complete, and recipes compile.

#![expect(clippy::unwrap_used, reason = "a test that can't go on fails")]

use std::collections::BTreeSet;
use std::path::Path;

use vimg::event::Event;
use vimg::files::Project;
use vimg::graph::Graph;
use vimg_lang::{Code, FileRef, Request, Sources, compile, schema};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(name: &str) -> String {
    std::fs::read_to_string(root().join(name)).unwrap()
}

/// Replaces the text between two markers, or checks that it is up to date.
fn generated(document: &str, marker: &str, text: &str) {
    let old = read(document);
    let (open, close) = (format!("<!-- {marker} -->\n"), format!("<!-- /{marker} -->"));
    let start = old.find(&open).unwrap() + open.len();
    let end = old.find(&close).unwrap();
    let new = format!("{}\n{text}\n{}", &old[..start], &old[end..]);
    if std::env::var_os("VIMG_BLESS").is_some() {
        std::fs::write(root().join(document), &new).unwrap();
    } else {
        assert!(old == new, "{document} is out of date: VIMG_BLESS=1 cargo test --test docs");
    }
}

#[test]
fn what_a_layer_may_do_is_listed() {
    let document = read("docs/explanation/isolation.md");
    let start = document.find("- Capabilities: ").unwrap() + "- Capabilities: ".len();
    let list = document[start..].split('.').next().unwrap();
    let listed: Vec<&str> = list.split(',').map(str::trim).collect();
    assert_eq!(listed, vimg_agent::protocol::CAPABILITIES);
}

#[test]
fn the_language_reference_is_generated() {
    generated("docs/reference/language.md", "reference", schema::reference().trim_end());
    let rows: Vec<String> =
        Code::ALL.iter().map(|c| format!("| `{}` | {} |", c.as_str(), c.meaning().trim())).collect();
    generated(
        "docs/reference/language.md",
        "diagnostics",
        &format!("| code | meaning |\n| --- | --- |\n{}", rows.join("\n")),
    );
}

/// Adds the help of a command and of its subcommands to `out`.
fn help(command: &clap::Command, path: &str, out: &mut String) {
    let mut shown = command
        .clone()
        .bin_name(path)
        .term_width(80)
        .mut_args(|argument| argument.hide_env_values(true).global(false));
    let text = shown.render_long_help().to_string();
    let plain: Vec<&str> = text.lines().map(str::trim_end).collect();
    out.push_str(&format!("## {path}\n\n```text\n{}\n```\n\n", plain.join("\n").trim()));
    for child in command.get_subcommands().filter(|child| !child.is_hide_set()) {
        help(child, &format!("{path} {}", child.get_name()), out);
    }
}

#[test]
fn the_reference_of_commands_is_generated() {
    let mut text = String::new();
    help(&vimg::cli::grammar(), "vimg", &mut text);
    generated("docs/reference/cli.md", "commands", text.trim_end());
}

fn compiled(dir: &Path) -> (Result<vimg_lang::Model, Vec<vimg_lang::Diagnostic>>, Project) {
    let project = Project::open(dir).unwrap();
    let mut sources = Sources::default();
    let request = Request {
        files: &project,
        entry: FileRef::project("main.vimg"),
        set: &[],
        values: None,
        rebuilt: None,
        distributions: &vimg::base::known(vimg::base::BUILT_IN),
    };
    (compile(&request, &mut sources), project)
}

#[test]
fn recipes_in_documents_compile() {
    let mut count = 0;
    for document in
        ["README.md", "docs/reference/language.md", "docs/how-to/servers.md", "docs/how-to/replace.md"]
    {
        for block in read(document).split("```kdl\n").skip(1) {
            let recipe = block.split("```").next().unwrap();
            let dir = tempfile::tempdir().unwrap();
            std::fs::create_dir(dir.path().join("site")).unwrap();
            std::fs::write(dir.path().join("index.html.j2"), "{{ greeting }} {{ port }}").unwrap();
            std::fs::write(dir.path().join("main.vimg"), recipe).unwrap();
            let (model, _) = compiled(dir.path());
            assert!(model.is_ok(), "{document}: {model:?}\n{recipe}");
            count += 1;
        }
    }
    assert!(count >= 3);
}

/// The tutorial shows the recipe that `vimg init` writes, without comments.
#[test]
fn the_tutorial_shows_the_starter() {
    let lines = |text: &str| -> Vec<String> {
        let lines = text.lines().filter(|line| !line.is_empty() && !line.trim_start().starts_with("//"));
        // The key is the reader's own.
        let key = "param \"ssh-key\" default=";
        lines.map(|line| if line.starts_with(key) { key.to_owned() } else { line.to_owned() }).collect()
    };
    let page = read("docs/tutorial.md");
    let shown = page.split("```kdl\n").nth(1).unwrap().split("```").next().unwrap();
    assert_eq!(lines(shown), lines(&read("src/cli/init/main.vimg")));
}

#[test]
fn links_lead_somewhere() {
    let mut count = 0;
    for entry in walkdir::WalkDir::new(root()).max_depth(3) {
        let path = entry.unwrap().into_path();
        let inner = path.strip_prefix(root()).unwrap();
        let ours = inner.components().count() == 1 || inner.starts_with("docs");
        if !ours || path.extension().is_none_or(|e| e != "md") {
            continue;
        }
        let text = std::fs::read_to_string(&path).unwrap();
        for link in text.split("](").skip(1).map(|rest| rest.split(')').next().unwrap()) {
            let (file, anchor) = link.split_once('#').unwrap_or((link, ""));
            if file.contains("://") || file.contains(' ') {
                continue;
            }
            let to = if file.is_empty() { path.clone() } else { path.parent().unwrap().join(file) };
            assert!(to.exists(), "{}: {link} leads nowhere", inner.display());
            if !anchor.is_empty() {
                let target = std::fs::read_to_string(&to).unwrap();
                let anchors: Vec<String> =
                    target.lines().filter(|l| l.starts_with('#')).map(anchor_of).collect();
                assert!(anchors.iter().any(|a| a == anchor), "{}: {link} is no heading", inner.display());
            }
            count += 1;
        }
    }
    assert!(count > 20);
}

/// Returns the anchor that forges make of a heading.
fn anchor_of(heading: &str) -> String {
    let kept = |c: char| match c {
        ' ' => Some('-'),
        c if c.is_alphanumeric() || c == '-' || c == '_' => Some(c.to_ascii_lowercase()),
        _ => None,
    };
    heading.trim_start_matches('#').trim().chars().filter_map(kept).collect()
}

/// A recipe with every kind of node and primitive. Its names are the
/// placeholders in `docs/reference/keys.md`.
const EVERYTHING: &str = r#"
param "NAME" default="x"
image "a" {
    bootstrap "debian" suite="bookworm" mirror="http://mirror.test" kernel="generic" { package "p" }
    layer "c"
    output "qcow2" path="a"
}
image "d" { from "a"; replace "k" with="c"; layer "e"; layer "e" }
capability "k"
configuration "e" {
    kernel-module "name"
    kernel-parameter "x=1"
    reboot
}
secret "name" env="NAME"
image "b" { disk "HOST" sha256="0000000000000000000000000000000000000000000000000000000000000000" }
configuration "c" {
    package "p"
    file "/PATH" content="{{ NAME }}" mode="0600"
    file "/HOST" from="HOST"
    directory "/PATH/d" mode="0700"
    directory "/PATH/t" from="tree"
    symlink "/PATH/l" target="x"
    archive "/PATH/a" from="HOST" owner="root"
    group "name" gid=1
    user "name" uid=1
    authorized-key "name" key="ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIA000000000000000000000000000000000000000001"
    service "name" enabled=#true masked=#false state="running"
    sysctl "NAME" value=1
    run network=#true { script "x"; env NAME="1"; undo "y"; secret "name" }
    run "HOST" { undo "y" }
    on "each-boot" { run { script "x"; env NAME="1" } }
    operation "name" { run "HOST" { env NAME="1" } }
    provides "k"
    check "x" {
        http "http://name/" status=200 contains="x" header="x: y"
        port 1
        run "x" network=#true
        file "/PATH" contains="x"
        service "name"
        package "p"
    }
}
"#;

#[test]
fn everything_has_every_primitive() {
    // These give steps no fields of their own.
    let apart = ["input", "requires", "needs"];
    for kind in schema::CONFIGURATION.iter().filter(|kind| !apart.contains(&kind.name)) {
        let is_named = |line: &str| line.split_whitespace().next() == Some(kind.name);
        assert!(EVERYTHING.lines().any(is_named), "the recipe lacks `{}`", kind.name);
    }
}

#[test]
fn every_field_of_a_key_is_documented() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("main.vimg"), EVERYTHING).unwrap();
    std::fs::write(dir.path().join("HOST"), "x").unwrap();
    std::fs::create_dir_all(dir.path().join("tree/sub")).unwrap();
    std::fs::write(dir.path().join("tree/file"), "x").unwrap();
    std::os::unix::fs::symlink("file", dir.path().join("tree/link")).unwrap();
    let (model, project) = compiled(dir.path());
    let graph = Graph::new(&model.unwrap(), &project, vimg::base::BUILT_IN).unwrap();
    let table = read("docs/reference/keys.md");
    let mut fields = BTreeSet::new();
    for id in graph.ids() {
        for field in &graph.node(id).description.fields {
            let mut name = field.name.replace("name.service", "NAME").replace(" name", " NAME");
            for (own, placeholder) in [
                ("/PATH/d", "/PATH"),
                ("/PATH/t", "/PATH"),
                ("/PATH/l", "/PATH"),
                ("/PATH/a", "/PATH"),
                ("/HOST", "/PATH"),
                ("tree/file", "HOST"),
                ("tree/link", "HOST"),
                ("tree/sub", "HOST"),
                ("tree", "HOST"),
                ("http://name/", "NAME"),
                ("port 1", "port NAME"),
            ] {
                name = name.replace(own, placeholder);
            }
            fields.insert(name);
        }
    }
    assert!(fields.len() > 40, "{fields:?}");
    let missing: Vec<&String> = fields.iter().filter(|f| !table.contains(&format!("`{f}`"))).collect();
    assert!(missing.is_empty(), "docs/reference/keys.md does not name {missing:?}");
}

/// Returns one event of each kind. A new kind does not compile without a line
/// here.
fn every_event() -> Vec<Event> {
    let s = String::new;
    let all = vec![
        Event::Planned { nodes: 0, reused: 0 },
        Event::Reused { node: s(), key: s() },
        Event::Started { node: s(), key: s(), reason: s() },
        Event::Phase { node: s(), phase: s() },
        Event::Output { node: s(), line: s() },
        Event::Built { node: s(), key: s(), seconds: 0.0, bytes: 0 },
        Event::Same { node: s(), key: s(), of: s() },
        Event::Moving { node: s(), cache: s(), sent: false, done: 0, all: 0, seconds: 0.0 },
        Event::Fetched { node: s(), key: s(), from: s(), seconds: 0.0, bytes: 0 },
        Event::Sent { node: s(), key: s(), to: s() },
        Event::Cache { cache: s(), hits: 0, misses: 0, sent: 0, down: 0, up: 0, requests: 0 },
        Event::Failed { node: s(), message: s() },
        Event::Skipped { node: s() },
        Event::Written { image: s(), path: s(), bytes: 0, unchanged: false },
        Event::Notice { text: s() },
        Event::Finished { built: 0, reused: 0, failed: 0, seconds: 0.0, boots: 0 },
    ];
    for event in &all {
        match event {
            Event::Planned { .. } | Event::Reused { .. } | Event::Started { .. } | Event::Phase { .. } => {}
            Event::Output { .. } | Event::Built { .. } | Event::Failed { .. } | Event::Skipped { .. } => {}
            Event::Same { .. } | Event::Written { .. } | Event::Notice { .. } | Event::Finished { .. } => {}
            Event::Moving { .. } | Event::Fetched { .. } | Event::Sent { .. } | Event::Cache { .. } => {}
        }
    }
    all
}

#[test]
fn every_event_is_documented() {
    let table = read("docs/reference/events.md");
    for event in every_event() {
        let json = serde_json::to_value(&event).unwrap();
        let object = json.as_object().unwrap();
        let name = object["event"].as_str().unwrap();
        let row = table
            .lines()
            .find(|l| l.starts_with(&format!("| `{name}` |")))
            .unwrap_or_else(|| panic!("{name} has no row"));
        for member in object.keys().filter(|k| *k != "event") {
            assert!(row.contains(&format!("`{member}`")), "the row of {name} does not name {member}");
        }
    }
}

/// The page about upgrades names the versions of this program, and all fields
/// of keys that are raised by hand.
#[test]
fn upgrades_are_documented_as_they_are() {
    let page = read("docs/how-to/upgrade.md");
    let store = format!("reads and writes version {},", vimg::store::SCHEMA);
    assert!(page.contains(&store), "docs/how-to/upgrade.md does not say: {store}");
    let object = vimg::cache::object::Object::Tombstones.path();
    let version = object.split('/').next().unwrap();
    assert!(page.contains(&format!("`{version}/`")), "docs/how-to/upgrade.md does not name {version}");
    let numbers = |name: &str| -> BTreeSet<String> {
        let text = read(name);
        let rows = text.lines().filter_map(|line| line.strip_prefix("| `")?.split_once("` |"));
        rows.map(|(field, _)| field.to_owned()).filter(|field| field.ends_with(" behaviour")).collect()
    };
    assert_eq!(numbers("docs/how-to/upgrade.md"), numbers("docs/reference/keys.md"));
    assert_eq!(numbers("docs/reference/keys.md").len(), 4);
}

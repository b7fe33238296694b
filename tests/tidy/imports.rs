//! Imports between files: they only point down, inside a folder as between
//! modules.

use std::collections::{BTreeMap, BTreeSet};

use super::sources;

/// The modules of a file: `[execute, batch]` for `execute/batch.rs`.
type Module = Vec<String>;

/// Returns all files of a crate, without their tests and comments.
fn modules(crate_dir: &str) -> BTreeMap<Module, String> {
    let mut found = BTreeMap::new();
    for (path, text) in sources(crate_dir) {
        let inner = path.strip_prefix(crate_dir).unwrap().with_extension("");
        let mut name: Module = inner.iter().map(|part| part.to_str().unwrap().to_owned()).collect();
        if name == ["lib"] || name == ["main"] {
            name.clear();
        }
        let code = text.split("#[cfg(test)]\nmod tests").next().unwrap();
        let plain: Vec<&str> = code.lines().map(|line| line.split("//").next().unwrap()).collect();
        found.insert(name, plain.join("\n"));
    }
    found
}

/// Adds the paths of a tree such as `a::{b, c::{self, d}}` to `all`.
fn expand(tree: &str, before: &[String], all: &mut Vec<Module>) {
    let mut path = before.to_vec();
    let mut rest = tree.trim();
    while let Some((name, after)) = rest.split_once("::").filter(|(name, _)| !name.contains('{')) {
        path.push(name.trim().to_owned());
        rest = after.trim();
    }
    match rest.strip_prefix('{').and_then(|rest| rest.rsplit_once('}')) {
        Some((inner, _)) => {
            let (mut depth, mut from) = (0, 0);
            for (at, c) in inner.char_indices().chain([(inner.len(), ',')]) {
                match c {
                    '{' => depth += 1,
                    '}' => depth -= 1,
                    ',' if depth == 0 => {
                        expand(&inner[from..at], &path, all);
                        from = at + 1;
                    }
                    _ => {}
                }
            }
        }
        None => {
            let name = rest.split(" as ").next().unwrap().trim();
            path.extend((!name.is_empty() && name != "self" && name != "*").then(|| name.to_owned()));
            all.push(path);
        }
    }
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Returns all paths that a file names: in `use`, after `crate::` or `super::`,
/// or beginning with the name of a child.
fn paths(code: &str, children: &BTreeSet<&str>) -> Vec<Module> {
    let mut all = Vec::new();
    for piece in code.split("use ").skip(1) {
        expand(piece.split(';').next().unwrap(), &[], &mut all);
    }
    for start in ["crate", "super"].into_iter().chain(children.iter().copied()) {
        let pattern = format!("{start}::");
        for (at, _) in code.match_indices(&pattern) {
            let before = code[..at].chars().next_back();
            // A visibility, `pub(in crate::a)`, imports nothing.
            if before.is_some_and(|c| is_word(c) || c == ':') || code[..at].ends_with("(in ") {
                continue;
            }
            let end = code[at..].find(|c: char| !is_word(c) && c != ':').map_or(code.len(), |n| at + n);
            // `super::{a, b}` was already found as a tree.
            if code[..end].ends_with("::") {
                continue;
            }
            all.push(code[at..end].split("::").map(str::to_owned).collect());
        }
    }
    all
}

/// Returns the file that a path in `own` leads to.
fn target(path: &[String], own: &Module, known: &BTreeMap<Module, String>) -> Option<Module> {
    let mut to = match path.first()?.as_str() {
        "crate" => path[1..].to_vec(),
        "self" => [own, &path[1..]].concat(),
        "super" => {
            let up = path.iter().take_while(|part| *part == "super").count();
            [own.get(..own.len().checked_sub(up)?)?, &path[up..]].concat()
        }
        _ => [own, path].concat(),
    };
    while !known.contains_key(&to) {
        to.pop()?;
    }
    (to != *own && !to.is_empty()).then_some(to)
}

/// Returns the modules of a file in the order in which it declares them.
fn declared(code: &str) -> Vec<&str> {
    let lines = code.lines().filter_map(|line| line.split_once("mod "));
    lines
        .filter(|(before, _)| before.is_empty() || before.starts_with("pub"))
        .filter_map(|(_, name)| name.strip_suffix(';'))
        .collect()
}

#[test]
fn imports_inside_folders_point_down() {
    for crate_dir in ["src", "model/src", "lang/src", "agent/src"] {
        let known = modules(crate_dir);
        let mut edges: BTreeMap<&Module, BTreeSet<Module>> = BTreeMap::new();
        for (own, code) in known.iter().filter(|(own, _)| !own.is_empty()) {
            let children = known.keys().filter(|m| m.len() == own.len() + 1 && m.starts_with(own));
            let children = children.map(|m| m.last().unwrap().as_str()).collect();
            let found = paths(code, &children).into_iter().filter_map(|path| target(&path, own, &known));
            edges.insert(own, found.collect());
        }
        let imports: usize = edges.values().map(BTreeSet::len).sum();
        assert!(imports >= known.len(), "{crate_dir}: no imports were found");
        for (own, to) in &edges {
            for to in to {
                let shared = own.iter().zip(to).take_while(|(a, b)| a == b).count();
                let (Some(here), Some(there)) = (own.get(shared), to.get(shared)) else { continue };
                let folder = &known[&own[..shared]];
                let order = declared(folder);
                let place = |name: &String| order.iter().position(|o| o == name);
                let (Some(here_at), Some(there_at)) = (place(here), place(there)) else { continue };
                assert!(
                    there_at < here_at,
                    "{crate_dir}/{}.rs imports `{}`, which is declared below `{here}`",
                    own.join("/"),
                    to.join("::"),
                );
            }
        }
        // Imports between parents and children count, too: there must be no
        // cycle.
        let mut left = edges.clone();
        loop {
            let free: Vec<&Module> = left
                .iter()
                .filter(|(_, to)| to.iter().all(|to| !left.contains_key(to)))
                .map(|(m, _)| *m)
                .collect();
            if free.is_empty() {
                break;
            }
            free.iter().for_each(|m| drop(left.remove(*m)));
        }
        let circle: Vec<String> = left.keys().map(|m| m.join("/")).collect();
        assert!(circle.is_empty(), "{crate_dir}: these import from each other: {circle:?}");
    }
}

/// What builds a batch knows only its order: it must be able to run elsewhere.
#[test]
fn the_executor_knows_no_graph() {
    let known = modules("src");
    let module = |path: &str| path.split("::").map(str::to_owned).collect::<Module>();
    let (order, staged) = (module("execute::order"), module("execute::staged"));
    let (mut below, mut next) = (BTreeSet::new(), vec![module("execute::local")]);
    while let Some(own) = next.pop() {
        if !below.insert(own.clone()) {
            continue;
        }
        for path in paths(&known[&own], &BTreeSet::new()) {
            let Some(to) = target(&path, &own, &known) else { continue };
            let (file, name) = (own.join("::"), to.join("::"));
            let scheduler = ["plan", "execute::states", "execute::context", "execute::project_inputs"];
            assert!(!scheduler.contains(&name.as_str()), "{file} imports `{name}`");
            // One file makes orders of nodes.
            assert!(to[0] != "graph" || own == order, "{file} imports the graph");
            // Outputs have their places in the project.
            let project = to[0] == "files" && path.last().is_some_and(|last| last != "FileError");
            assert!(!project || own == staged, "{file} knows the project");
            if to[0] == "execute" {
                next.push(to);
            }
        }
    }
    for name in ["batch", "checks", "explain", "export", "layer", "order", "prewarm", "up"] {
        assert!(below.contains(&module(&format!("execute::{name}"))), "`{name}` was not reached");
    }
}

//! A primitive is said in few places, and none of them can be forgotten.

use std::collections::BTreeSet;
use std::path::Path;

use super::{root, sources};

/// The files that name every primitive. `CONTRIBUTING.md` lists them.
const PLACES: [&str; 3] =
    ["model/src/primitive.rs", "lang/src/elaborate/primitive.rs", "agent/src/primitive.rs"];

/// Files that name one primitive because they do something that only it has.
const OTHERS: [(&str, &str); 4] = [
    ("lang/src/elaborate/script.rs", "Hook"),
    ("lang/src/elaborate/steps.rs", "Package"),
    ("src/graph/describe.rs", "Run"),
    ("src/graph/server.rs", "Hook"),
];

/// Returns the code of a file without its tests and comments.
fn product(text: &str) -> String {
    let code = text.split("#[cfg(test)]\nmod tests").next().unwrap();
    code.lines().map(|line| line.split("//").next().unwrap()).collect::<Vec<_>>().join("\n")
}

/// Returns the variants of `enum Primitive`.
fn variants(model: &str) -> BTreeSet<String> {
    let (_, after) = model.split_once("pub enum Primitive<").unwrap();
    let (inner, _) = after.split_once("\n}\n").unwrap();
    let lines = inner.lines().filter_map(|line| line.strip_prefix("    "));
    let names = lines.filter(|line| line.starts_with(|c: char| c.is_ascii_uppercase()));
    names.map(|line| line.chars().take_while(|c| c.is_alphanumeric()).collect()).collect()
}

#[test]
fn a_primitive_is_three_files_and_its_own() {
    let read = |name: &str| product(&std::fs::read_to_string(root().join(name)).unwrap());
    let model = read(PLACES[0]);
    let all = variants(&model);
    assert!(all.len() > 10, "{all:?}");
    for place in PLACES {
        let text = read(place);
        for name in &all {
            // Some nodes have a file of their own beside the table of nodes.
            let beside =
                |(file, other): &(&str, &str)| file.starts_with("lang/src/elaborate/") && other == name;
            let apart = place == PLACES[1] && OTHERS.iter().any(beside);
            assert!(apart || text.contains(&format!("::{name}")), "{place} does not name {name}");
        }
    }
    for (path, text) in ["src", "lang/src", "agent/src"].into_iter().flat_map(sources) {
        let code = product(&text);
        for name in &all {
            let named = format!("Primitive::{name}");
            let found = code.match_indices(&named).any(|(at, _)| {
                !code[at + named.len()..].starts_with(|c: char| c.is_alphanumeric() || c == '_')
            });
            let path: &Path = &path;
            let known = PLACES.iter().any(|place| path == Path::new(place))
                || OTHERS.iter().any(|(file, other)| path == Path::new(file) && other == name);
            assert!(
                !found || known,
                "{} names the primitive {name}: make what it asks a fact in {}",
                path.display(),
                PLACES[0]
            );
        }
    }
}

/// A catch-all would answer for a primitive or order that no person thought of.
#[test]
fn facts_name_every_primitive() {
    for file in ["model/src/primitive.rs", "model/src/probe.rs", "agent/src/protocol/order.rs"] {
        let code = product(&std::fs::read_to_string(root().join(file)).unwrap());
        for sign in ["_ =>", "matches!(self,", "if let Self::"] {
            assert!(!code.contains(sign), "{file} has `{sign}`");
        }
    }
}

//! Checks the structure of the sources: imports point down, files stay
//! readable, the environment is read in one place, and the agent's behaviour
//! has a version.

#![expect(clippy::unwrap_used, reason = "a test that can't go on fails")]

#[path = "tidy/adding.rs"]
mod adding;
#[path = "tidy/imports.rs"]
mod imports;
#[path = "tidy/primitives.rs"]
mod primitives;
#[path = "tidy/words.rs"]
mod words;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn sources(dir: &str) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    for entry in walkdir::WalkDir::new(root().join(dir)).sort_by_file_name() {
        let entry = entry.unwrap();
        if entry.path().extension().is_some_and(|e| e == "rs") {
            let text = std::fs::read_to_string(entry.path()).unwrap();
            found.push((entry.path().strip_prefix(root()).unwrap().to_owned(), text));
        }
    }
    assert!(!found.is_empty(), "{dir} has no sources");
    found
}

/// Returns the modules of a crate in the order of its `lib.rs`.
fn layers(crate_dir: &str) -> Vec<String> {
    let text = std::fs::read_to_string(root().join(crate_dir).join("lib.rs")).unwrap();
    text.lines()
        .filter_map(|l| l.strip_prefix("pub mod ").or_else(|| l.strip_prefix("mod ")))
        .map(|l| l.trim_end_matches(';').to_owned())
        .collect()
}

/// Returns the module of a file: `store` for `src/store/lock.rs`.
fn module(path: &Path, crate_dir: &str) -> String {
    let inner = path.strip_prefix(crate_dir).unwrap();
    inner.components().next().unwrap().as_os_str().to_str().unwrap().trim_end_matches(".rs").to_owned()
}

#[test]
fn imports_point_down() {
    for crate_dir in ["src", "model/src", "lang/src", "agent/src"] {
        let layers = layers(crate_dir);
        assert!(layers.len() > 3, "{crate_dir}: the layers were not found");
        let place: BTreeMap<&str, usize> = layers.iter().enumerate().map(|(n, l)| (l.as_str(), n)).collect();
        for (path, text) in sources(crate_dir) {
            let own = module(&path, crate_dir);
            let Some(&here) = place.get(own.as_str()) else { continue };
            for (line, code) in text.lines().enumerate() {
                let code = code.split("//").next().unwrap();
                for piece in code.split("crate::").skip(1) {
                    let name: String =
                        piece.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
                    let Some(&there) = place.get(name.as_str()) else { continue };
                    assert!(
                        there <= here,
                        "{}:{}: `{own}` imports `{name}`, which stands above it",
                        path.display(),
                        line + 1
                    );
                }
            }
        }
    }
}

#[test]
fn files_are_a_few_screenfuls() {
    for dir in ["src", "model/src", "lang/src", "agent/src", "tests"] {
        for (path, text) in sources(dir) {
            let code = text.split("#[cfg(test)]\nmod tests").next().unwrap().lines().count();
            assert!(code <= 720, "{} has {code} lines, more than 720: split it", path.display());
            let first = text.lines().next().unwrap_or("");
            assert!(first.starts_with("//!"), "{} does not say what it is for", path.display());
        }
    }
}

/// Only the command line reads the environment and ends the process. Only one
/// file reads PATH, to search for programs.
#[test]
fn the_environment_is_read_in_one_place() {
    for (path, text) in sources("src") {
        if path.starts_with("src/cli") || path == Path::new("src/cli.rs") {
            continue;
        }
        // Tests may start their own program again.
        let product = text.split("#[cfg(test)]\nmod tests").next().unwrap();
        for (n, line) in product.lines().enumerate() {
            let code = line.split("//").next().unwrap();
            let place = format!("{}:{}", path.display(), n + 1);
            assert!(!code.contains("process::exit"), "{place} ends the process");
            assert!(!code.contains("temp_dir"), "{place} asks where temporary files are");
            let search = path == Path::new("src/host.rs")
                && (code.contains("var_os(\"PATH\")")
                    || code.contains("env::split_paths")
                    || code.contains("env::join_paths"));
            assert!(search || !code.contains("env::"), "{place} reads the environment");
            assert!(!code.contains("println!"), "{place} prints");
        }
    }
}

/// Whether a file names a trait or a module, in `use` or in a path.
fn names(code: &str, word: &str) -> bool {
    code.match_indices(word).any(|(at, _)| {
        let is_part = |c: char| c.is_alphanumeric() || c == '_';
        let before = code[..at].chars().next_back();
        let after = code[at + word.len()..].chars().next();
        !before.is_some_and(is_part) && !after.is_some_and(is_part)
    })
}

/// Only the executor calls providers, and only it knows both a provider and the
/// states of the store.
#[test]
fn providers_and_the_store_meet_in_the_executor() {
    for (path, text) in sources("src") {
        let own = module(&path, "src");
        let code = text.split("#[cfg(test)]").next().unwrap();
        let lines: Vec<&str> = code.lines().map(|line| line.split("//").next().unwrap()).collect();
        let plain = lines.join("\n");
        if own == "provider" {
            assert!(!code.contains("crate::store"), "{} knows the store", path.display());
        } else if own != "execute" {
            let traits = plain.contains("crate::provider")
                && ["Provider", "Instance", "Launch"].iter().any(|t| names(&plain, t));
            assert!(!traits, "{} asks a provider", path.display());
        }
        if own == "store" || own == "plan" || own == "report" {
            assert!(!code.contains("crate::provider"), "{} knows providers", path.display());
        }
        if own == "report" {
            assert!(!code.contains("crate::store"), "{} knows the store", path.display());
        }
        if own != "graph" {
            assert!(!code.contains("petgraph"), "{} knows petgraph", path.display());
        }
    }
}

/// Code that waits for an agent's answer must also wait for the end of its
/// machine. One place does that for all.
#[test]
fn only_a_guest_waits_for_the_end_of_its_instance() {
    let allowed = ["src/execute/guest.rs", "src/execute/explain.rs", "src/execute/console.rs"];
    for (path, text) in sources("src/execute") {
        let waits = text.contains(".ended()");
        assert!(!waits || allowed.iter().any(|a| path == Path::new(a)), "{} waits by itself", path.display());
    }
}

/// The behaviour version of the agent enters every key. When the agent's
/// sources change, a person must decide whether to raise that number.
#[test]
fn the_agents_behaviour_was_looked_at() {
    let mut hasher = blake3::Hasher::new();
    // The way a base is built has its own version, in the same file.
    let mut bases: Vec<PathBuf> = walkdir::WalkDir::new(root().join("src/base"))
        .into_iter()
        .map(|entry| entry.unwrap().into_path())
        .filter(|path| path.is_file())
        .collect();
    bases.extend(["src/disk/gpt.rs", "src/agent.rs"].map(|path| root().join(path)));
    bases.sort();
    for path in bases {
        let text = std::fs::read_to_string(path).unwrap();
        let code = text.split("#[cfg(test)]\nmod tests").next().unwrap();
        for line in code.lines().map(str::trim).filter(|l| !l.starts_with("//") && !l.is_empty()) {
            hasher.update(line.as_bytes());
        }
    }
    for (path, text) in sources("model/src").into_iter().chain(sources("agent/src")) {
        hasher.update(path.as_os_str().as_encoded_bytes());
        // Comments and tests do not change machines.
        let code = text.split("#[cfg(test)]\nmod tests").next().unwrap();
        for line in code.lines().map(str::trim).filter(|l| !l.starts_with("//") && !l.is_empty()) {
            hasher.update(line.as_bytes());
        }
    }
    let bases: String =
        vimg::base::BUILT_IN.iter().map(|one| format!("{} {}, ", one.name(), one.behaviour())).collect();
    let seen = format!("agent {}, {bases}{}\n", vimg_agent::protocol::BEHAVIOUR, hasher.finalize().to_hex());
    let file = root().join("agent/behaviour.lock");
    if std::env::var_os("VIMG_BLESS").is_some() {
        std::fs::write(&file, &seen).unwrap();
    }
    let kept = std::fs::read_to_string(&file).unwrap_or_default();
    assert_eq!(
        kept, seen,
        "the agent's sources changed, or how a base is made. If the same layer would now give another \
         machine, raise BEHAVIOUR in agent/src/protocol.rs, or the number in src/base; then run \
         this test with VIMG_BLESS=1"
    );
}

/// Each open task in the sources names its issue.
#[test]
fn nothing_is_left_to_do_in_secret() {
    for dir in ["src", "model/src", "lang/src", "agent/src", "tests"] {
        for (path, text) in sources(dir) {
            for (n, line) in text.lines().enumerate() {
                let word = ["TO", "DO"].concat();
                let bare = line.contains(&word) && !line.contains(&format!("{word}(#"));
                assert!(!bare, "{}:{}: name the issue", path.display(), n + 1);
            }
        }
    }
}

/// Licences that are compatible with ours.
const LICENCES: [&str; 9] = [
    "Apache-2.0",
    "MIT",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "ISC",
    "Zlib",
    "CC0-1.0",
    "Unicode-3.0",
    "Unlicense",
];

#[test]
fn dependencies_have_licences_that_fit() {
    let output = std::process::Command::new(env!("CARGO"))
        .args(["metadata", "--format-version=1", "--locked", "--filter-platform=x86_64-unknown-linux-gnu"])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    assert!(packages.len() > 50);
    for package in packages {
        let name = package["name"].as_str().unwrap();
        let licence = package["license"].as_str().unwrap_or("none");
        // `A AND B` needs all, `A OR B` one; `/` is an old way to say OR.
        let fits = licence.replace('/', " OR ").replace(['(', ')'], "").split(" AND ").all(|all| {
            all.split(" OR ").any(|one| LICENCES.contains(&one.split(" WITH ").next().unwrap().trim()))
        });
        assert!(fits, "{name} has the licence {licence}");
    }
}

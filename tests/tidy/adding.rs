//! The lists of files in CONTRIBUTING.md: what to touch to add something. The
//! files exist, no list is long, and a toy of the kind needs no other file.
//! `tests/long/adding` compiles the toys and uses them.

use super::root;

/// Most existing files besides tests and documents that an addition may touch.
/// It may have one new file besides.
const MOST: usize = 3;

/// Returns each section that says how to add something, with the paths that
/// begin the entries of its lists, and whether the file is new.
fn sections(page: &str) -> Vec<(&str, Vec<(&str, bool)>)> {
    let mut found: Vec<(&str, Vec<(&str, bool)>)> = Vec::new();
    let mut inside = false;
    for line in page.lines() {
        if let Some(title) = line.strip_prefix("## ") {
            inside = title.starts_with("Add ");
            if inside {
                found.push((title, Vec::new()));
            }
        }
        let entry = line.strip_prefix("- `").and_then(|rest| rest.split_once("`:"));
        if let (true, Some((path, text)), Some((_, paths))) = (inside, entry, found.last_mut()) {
            paths.push((path, text.starts_with(" new;")));
        }
    }
    found
}

/// Whether a path exists. `NAME` stands for the name of what is added, so that
/// the folder must have other files of the kind.
fn exists(path: &str) -> bool {
    match path.split_once("NAME") {
        None => root().join(path).exists(),
        Some((dir, ending)) => std::fs::read_dir(root().join(dir)).is_ok_and(|entries| {
            entries.flatten().any(|entry| entry.file_name().to_str().is_some_and(|n| n.ends_with(ending)))
        }),
    }
}

fn is_test_or_document(path: &str) -> bool {
    ["tests/", "docs/", "lang/tests/"].iter().any(|dir| path.starts_with(dir)) || path.ends_with(".md")
}

#[test]
fn additions_touch_few_files_and_all_exist() {
    let page = std::fs::read_to_string(root().join("CONTRIBUTING.md")).unwrap();
    let sections = sections(&page);
    for wanted in ["command", "cache", "primitive", "distribution", "provider"]
        .map(|what| format!("Add a {what}"))
        .into_iter()
        .chain(["Add an output format".to_owned()])
    {
        assert!(sections.iter().any(|(title, _)| *title == wanted), "CONTRIBUTING.md has no `{wanted}`");
    }
    for (title, paths) in sections {
        for (path, _) in &paths {
            assert!(exists(path), "CONTRIBUTING.md, {title}: {path} does not exist");
        }
        let code = |new: bool| {
            paths.iter().filter(|(path, is_new)| *is_new == new && !is_test_or_document(path)).count()
        };
        assert!(code(false) <= MOST && code(true) <= 2, "CONTRIBUTING.md, {title}: too many files");
        assert!(code(false) + code(true) > 0, "CONTRIBUTING.md, {title}: no files");
    }
}

/// Returns the paths that a patch touches, and whether each file is new.
fn touched(patch: &str) -> Vec<(&str, bool)> {
    let mut files = Vec::new();
    let mut is_new = false;
    for line in patch.lines() {
        if let Some(path) = line.strip_prefix("--- ") {
            is_new = path == "/dev/null";
        } else if let Some(path) = line.strip_prefix("+++ b/") {
            files.push((path, is_new));
        }
    }
    files
}

/// The toys still fit, and touch only the files that the lists name. (The toy
/// of a distribution is `tests/vm/adding.rs`.)
#[test]
fn toys_are_added_by_the_lists() {
    let page = std::fs::read_to_string(root().join("CONTRIBUTING.md")).unwrap();
    let sections = sections(&page);
    for (toy, title) in [
        ("primitive", "Add a primitive"),
        ("output-format", "Add an output format"),
        ("cache", "Add a cache"),
        ("command", "Add a command"),
    ] {
        let patch = root().join(format!("tests/long/toys/{toy}.patch"));
        let applied = std::process::Command::new("git")
            .args(["apply", "--check"])
            .arg(&patch)
            .current_dir(root())
            .output()
            .unwrap();
        let why = String::from_utf8_lossy(&applied.stderr).into_owned();
        assert!(applied.status.success(), "{toy}: make the patch again, with `git diff -U1`: {why}");
        let text = std::fs::read_to_string(patch).unwrap();
        let touched = touched(&text);
        assert!(!touched.is_empty());
        let (_, listed) = sections.iter().find(|(name, _)| *name == title).unwrap();
        for (path, is_new) in touched {
            let fits = |pattern: &str| match pattern.split_once("NAME") {
                Some((start, end)) => path.starts_with(start) && path.ends_with(end),
                None => path == pattern,
            };
            let there = listed.iter().any(|(pattern, new)| fits(pattern) && *new == is_new);
            assert!(there, "{toy} touches {path}, which CONTRIBUTING.md does not list");
        }
    }
}

/// Files that a new variant touches name the ones that exist. What is spread
/// over more files than the lists say would show here.
#[test]
fn what_the_lists_say_is_all() {
    let naming = |word: &str, dirs: &[&str]| -> Vec<String> {
        let all = dirs.iter().flat_map(|dir| super::sources(dir));
        let code = |text: &str| text.split("#[cfg(test)]\nmod tests").next().unwrap().to_owned();
        all.filter(|(_, text)| code(text).contains(word))
            .map(|(path, _)| path.display().to_string())
            .collect()
    };
    assert_eq!(naming("Azblob", &["src", "lang/src"]), ["src/cache/kind.rs", "src/cache/service.rs"]);
    assert_eq!(naming("DiskFormat::Raw", &["src", "lang/src"]), ["src/disk/image.rs", "src/store/record.rs"]);
}

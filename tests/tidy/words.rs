//! Words and phrases that must not come back: those of a private dialect, and
//! the words that the glossary replaces.

use std::path::{Path, PathBuf};

use super::root;

/// A phrase that this project no longer uses.
struct Phrase {
    /// In lower case. It is found at the borders of words; `_` is one.
    text: &'static str,
    /// What to write instead.
    instead: &'static str,
    /// The reason.
    why: &'static str,
    /// The files and directories in which the phrase has this meaning; empty
    /// for all.
    only: &'static [&'static str],
    /// Parts of lines in which it has another meaning.
    except: &'static [&'static str],
}

/// Makes a phrase that is wrong everywhere.
const fn phrase(text: &'static str, instead: &'static str, why: &'static str) -> Phrase {
    Phrase { text, instead, why, only: &[], except: &[] }
}

const GLOSSARY: &str = "the glossary has the term of the field";
const SUBJECT: &str = "name the subject of a sentence: vimg, the agent, the layer";

const PHRASES: &[Phrase] = &[
    phrase("unless given", "`[default: X]`", "readers know how clap shows defaults"),
    phrase("if not given", "`[default: X]`", "readers know how clap shows defaults"),
    phrase("is to be", "`must be`, `expected ...`", "the passive hides who does it"),
    phrase("are to be", "`must be`, `expected ...`", "the passive hides who does it"),
    Phrase {
        except: &["user=\"nobody\"", "\"nobody: hello", "nobody <nobody@"],
        ..phrase("nobody", "`no process`, `no recipe`, `not`", SUBJECT)
    },
    phrase("somebody", "`another process`, `the user`", SUBJECT),
    phrase("can't stand here", "`invalid value ...: expected ...`", "an error names what it expects"),
    phrase("is no loss", "`best effort`", "it is the term of the field"),
    phrase("whether what", "a noun: `whether a layer ...`", SUBJECT),
    phrase("condemned", "tombstone", GLOSSARY),
    phrase("courier", "transport", GLOSSARY),
    phrase("believers", "trust roots", GLOSSARY),
    phrase("believes", "trusts", GLOSSARY),
    phrase("believed", "trusted", GLOSSARY),
    phrase("believe", "trust", GLOSSARY),
    phrase("surroundings", "the CI system, or the environment", GLOSSARY),
    Phrase { only: &["src/cache", "docs/explanation/caches.md"], ..phrase("piece", "chunk", GLOSSARY) },
    Phrase { only: &["src/cache", "docs/explanation/caches.md"], ..phrase("pieces", "chunks", GLOSSARY) },
    Phrase { only: &["src/cache", "docs"], ..phrase("patience", "retry budget", GLOSSARY) },
    phrase("left alone", "rate limited", GLOSSARY),
    Phrase { except: &["`memories/`"], ..phrase("memories", "memory snapshots", GLOSSARY) },
    phrase("carry over", "retarget", GLOSSARY),
    phrase("carried over", "retargeted", GLOSSARY),
    phrase("standing plan", "plan cache", GLOSSARY),
    phrase("witness", "dependency record", GLOSSARY),
    phrase("urgency", "critical path", GLOSSARY),
    Phrase { only: &["src/execute/staged.rs", "docs"], ..phrase("draft", "staged output", GLOSSARY) },
    phrase("pulse", "heartbeat", GLOSSARY),
    phrase("taken back", "reverted", GLOSSARY),
    phrase("take back", "revert", GLOSSARY),
    phrase("workshop", "build context", GLOSSARY),
];

/// Words that begin a doc comment without a subject: `What is needed to save`.
const OPENINGS: [&str; 8] = ["is", "was", "has", "comes", "goes", "may", "can", "stands"];
/// Longest line of a comment, in columns. rustfmt does not wrap comments.
const WIDTH: usize = 110;

/// Returns the mistakes of a line.
fn mistakes(path: &Path, line: &str) -> Vec<String> {
    let mut found = Vec::new();
    let lower = line.to_lowercase();
    let is_part = |c: Option<char>| c.is_some_and(char::is_alphanumeric);
    for phrase in PHRASES {
        let here = phrase.only.is_empty() || phrase.only.iter().any(|dir| path.starts_with(dir));
        let known = phrase.except.iter().any(|part| line.contains(part));
        let whole = lower.match_indices(phrase.text).any(|(at, text)| {
            !is_part(lower[..at].chars().next_back()) && !is_part(lower[at + text.len()..].chars().next())
        });
        if here && !known && whole {
            found.push(format!("`{}`: write {}, because {}", phrase.text, phrase.instead, phrase.why));
        }
    }
    if path.extension().is_some_and(|e| e == "rs") && line.trim_start().starts_with("//") {
        let text = line.trim_start().trim_start_matches(['/', '!']).trim_start();
        let mut words = text.split(' ');
        let pronoun = words.next().is_some_and(|word| word == "What" || word == "Who");
        // A question is fine.
        if pronoun && words.next().is_some_and(|word| OPENINGS.contains(&word)) && !text.contains('?') {
            found.push(format!("`{}`: begin with a verb or a noun, because {SUBJECT}", &text[..8]));
        }
        if line.chars().count() > WIDTH {
            found.push(format!("a comment of more than {WIDTH} columns: wrap it"));
        }
    }
    found
}

/// Returns the texts that people read: sources, recipes and documents.
fn texts() -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    for top in ["src", "lang", "agent", "tests", "stdlib", "docs", "action", "benches", "fuzz", ""] {
        let depth = if top.is_empty() { 1 } else { usize::MAX };
        for entry in walkdir::WalkDir::new(root().join(top)).max_depth(depth).sort_by_file_name() {
            let Ok(entry) = entry else { continue };
            let path = entry.path().strip_prefix(root()).unwrap().to_owned();
            // These pages quote the phrases.
            let quotes = path == Path::new("tests/tidy/words.rs")
                || path.components().any(|c| c.as_os_str() == "target");
            let kind = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
            if entry.file_type().is_file()
                && !quotes
                && ["rs", "md", "vimg", "j2", "sh", "toml", "yml"].contains(&kind)
            {
                found.push((path, std::fs::read_to_string(entry.path()).unwrap()));
            }
        }
    }
    found
}

#[test]
fn the_dialect_stays_away() {
    let texts = texts();
    assert!(texts.len() > 200, "only {} texts were found", texts.len());
    let mut found = Vec::new();
    for (path, text) in &texts {
        for (n, line) in text.lines().enumerate() {
            let wrong = mistakes(path, line).into_iter();
            found.extend(wrong.map(|why| format!("{}:{}: {why}", path.display(), n + 1)));
        }
    }
    assert!(found.is_empty(), "\n{}", found.join("\n"));
}

#[test]
fn the_check_for_the_dialect_finds_it() {
    let count = |path: &str, line: &str| mistakes(Path::new(path), line).len();
    assert_eq!(count("src/a.rs", "// 80 unless given; this is to be a number"), 2);
    assert_eq!(count("src/a.rs", "fn nobody_is_here() {}"), 1);
    assert_eq!(count("docs/a.md", "run user=\"nobody\""), 0);
    assert_eq!(count("src/cache/a.rs", "let piece = 1;"), 1);
    assert_eq!(count("src/direct.rs", "let piece = 1;"), 0);
    assert_eq!(count("src/a.rs", "    /// What is left, in bytes."), 1);
    assert_eq!(count("src/a.rs", "    // What is left? Nothing."), 0);
    assert_eq!(count("src/a.rs", &format!("// {}", "x".repeat(WIDTH))), 1);
    assert_eq!(count("docs/a.md", "an impulse"), 0);
}

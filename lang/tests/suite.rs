//! Runs the cases of `tests/suite/*.vimg`.
//!
//! A case is a small project in one place:
//!
//! ```text
//! //= case NAME          starts a case; its text is `main.vimg`
//! //= file PATH          starts another file of the project
//! //= dir PATH           a directory
//! //= special PATH       a FIFO        //= outside PATH   a link out of the project
//! //= binary PATH        not UTF-8     //= huge PATH      more than vimg reads
//! //= many N             files many/0.vimg ..., each using the next
//! //= set NAME=VALUE     a parameter   //= values         starts the values file
//! //~ PLACE CODE: MESSAGE | HELP       an expected diagnostic, all of them, in order
//!                        (a recipe without errors has warnings)
//! ```
//!
//! `VIMG_BLESS=1 cargo test -p vimg-lang --test suite` writes the actual diagnostics
//! into the files; read the diff before you commit it.

#![expect(clippy::unwrap_used, reason = "a test that can't go on fails")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use vimg_lang::{
    Code, Diagnostic, FileKind, FileRef, Files, KnownDistribution, MAX_RECIPE, ReadError, Request, Root,
    Sources, compile,
};

#[derive(Default)]
struct Case {
    name: String,
    lines: Vec<String>,
    expected: Vec<String>,
    project: Project,
    set: Vec<(String, String)>,
    values: Option<(String, String)>,
}

#[derive(Default)]
struct Project(BTreeMap<String, Entry>);

enum Entry {
    Text(String),
    Bytes(Vec<u8>),
    Dir,
    Error(ReadError),
}

impl Files for Project {
    fn read(&self, file: &FileRef, limit: usize) -> Result<Vec<u8>, ReadError> {
        if file.root == Root::Std {
            return Err(ReadError::NotFound);
        }
        match self.0.get(&file.path) {
            None => Err(ReadError::NotFound),
            Some(Entry::Dir) => Err(ReadError::NotAFile("a directory")),
            Some(Entry::Error(error)) => Err(error.clone()),
            Some(Entry::Text(text)) if text.len() > limit => Err(ReadError::TooLarge),
            Some(Entry::Text(text)) => Ok(text.clone().into_bytes()),
            Some(Entry::Bytes(bytes)) => Ok(bytes.clone()),
        }
    }

    fn kind(&self, file: &FileRef) -> Result<FileKind, ReadError> {
        match self.0.get(&file.path) {
            Some(Entry::Dir) => Ok(FileKind::Directory),
            Some(Entry::Text(_) | Entry::Bytes(_)) => Ok(FileKind::File),
            Some(Entry::Error(error)) => Err(error.clone()),
            None => Err(ReadError::NotFound),
        }
    }

    fn siblings(&self, _: &FileRef) -> Vec<String> {
        self.0.keys().cloned().collect()
    }
}

fn parse(text: &str) -> Vec<Case> {
    let mut cases: Vec<Case> = Vec::new();
    // Where the lines go: a file of the project, or the values file.
    let mut target: Option<String> = None;
    for line in text.lines() {
        if let Some(name) = line.strip_prefix("//= case ") {
            cases.push(Case { name: name.to_owned(), ..Case::default() });
            target = Some("main.vimg".to_owned());
            cases.last_mut().unwrap().lines.push(line.to_owned());
            continue;
        }
        let Some(case) = cases.last_mut() else { continue };
        if let Some(expected) = line.strip_prefix("//~ ") {
            case.expected.push(expected.to_owned());
            continue;
        }
        case.lines.push(line.to_owned());
        let Some(command) = line.strip_prefix("//= ") else {
            let text = match &target {
                Some(path) => {
                    match case.project.0.entry(path.clone()).or_insert_with(|| Entry::Text(String::new())) {
                        Entry::Text(text) => text,
                        _ => panic!("{}: {path} is no text", case.name),
                    }
                }
                None => &mut case.values.as_mut().unwrap().1,
            };
            text.push_str(line);
            text.push('\n');
            continue;
        };
        let (verb, rest) = command.split_once(' ').unwrap_or((command, ""));
        let entry = match verb {
            "file" => {
                target = Some(rest.to_owned());
                Entry::Text(String::new())
            }
            "values" => {
                target = None;
                case.values = Some(("values".to_owned(), String::new()));
                continue;
            }
            "set" => {
                let (name, value) = rest.split_once('=').unwrap();
                case.set.push((name.to_owned(), value.to_owned()));
                continue;
            }
            "many" => {
                for n in 0..rest.parse::<usize>().unwrap() {
                    let text = format!("use \"{}.vimg\"\n", n + 1);
                    case.project.0.insert(format!("many/{n}.vimg"), Entry::Text(text));
                }
                continue;
            }
            "dir" => Entry::Dir,
            "special" => Entry::Error(ReadError::NotAFile("a FIFO")),
            "outside" => Entry::Error(ReadError::Outside),
            "binary" => Entry::Bytes(vec![b'a', 0xff]),
            "huge" => Entry::Text(" ".repeat(MAX_RECIPE + 1)),
            _ => panic!("{}: what is `{line}`?", case.name),
        };
        case.project.0.insert(rest.to_owned(), entry);
    }
    cases
}

fn show(sources: &Sources, diagnostic: &Diagnostic) -> Vec<String> {
    let place = |span| {
        let (line, column) = sources.position(span);
        format!("{}:{line}:{column}", sources.get(span.source).name)
    };
    let at = diagnostic.primary.as_ref().map_or("-".to_owned(), |(span, _)| place(*span));
    let help = diagnostic.help.as_deref().unwrap_or("NO HELP").replace('\n', "\\n");
    let mut lines = vec![format!("{at} {}: {} | {help}", diagnostic.code.as_str(), diagnostic.message)];
    lines.extend(diagnostic.related.iter().map(|(span, text)| format!("  {} {text}", place(*span))));
    lines
}

#[test]
fn suite() {
    let bless = std::env::var_os("VIMG_BLESS").is_some();
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/suite");
    let mut files: Vec<_> = std::fs::read_dir(&dir).unwrap().map(|e| e.unwrap().path()).collect();
    files.sort();
    let mut failures = Vec::new();
    let mut seen: BTreeSet<Code> = BTreeSet::new();
    let mut count = 0;
    for path in files {
        let mut blessed = String::new();
        for case in parse(&std::fs::read_to_string(&path).unwrap()) {
            count += 1;
            let mut sources = Sources::default();
            let request = Request {
                files: &case.project,
                entry: FileRef::project("main.vimg"),
                set: &case.set,
                values: case.values.clone(),
                rebuilt: None,
                distributions: &[KnownDistribution { name: "debian", suites: &["bookworm", "trixie"] }],
            };
            let compiled = compile(&request, &mut sources);
            let diagnostics = compiled.map_or_else(|mistakes| mistakes, |model| model.warnings);
            seen.extend(diagnostics.iter().map(|d| d.code));
            let actual: Vec<String> = diagnostics.iter().flat_map(|d| show(&sources, d)).collect();
            if actual != case.expected && !bless {
                failures.push(format!(
                    "{} in {}\n  expected:\n    {}\n  seen:\n    {}",
                    case.name,
                    path.display(),
                    case.expected.join("\n    "),
                    actual.join("\n    ")
                ));
            }
            let mut lines = case.lines.clone();
            while lines.last().is_some_and(|l| l.trim().is_empty()) {
                lines.pop();
            }
            lines.extend(actual.iter().map(|l| format!("//~ {l}")));
            blessed.push_str(&lines.join("\n"));
            blessed.push_str("\n\n");
        }
        if bless {
            std::fs::write(&path, blessed.trim_end().to_owned() + "\n").unwrap();
        }
    }
    assert!(failures.is_empty(), "{} of {count} cases differ:\n{}", failures.len(), failures.join("\n"));
    let uncovered: Vec<&str> = Code::ALL.iter().filter(|c| !seen.contains(c)).map(|c| c.as_str()).collect();
    assert!(uncovered.is_empty(), "no case shows these codes: {uncovered:?}");
}

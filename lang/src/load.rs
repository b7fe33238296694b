//! Reads the main recipe and all files that it uses, each file once.

use std::collections::HashMap;

use crate::diagnostic::{Code, Diagnostic};
use crate::kind::Grammar;
use crate::prescan::MAX_RECIPE;
use crate::shape;
use crate::source::{FileRef, Files, ReadError, Root, SourceId, Sources, Span};
use crate::syntax::{self, Document};

/// The most files that one recipe may use.
const MAX_FILES: usize = 1024;

/// A parsed file.
pub(crate) struct Loaded {
    pub(crate) file: FileRef,
    pub(crate) source: SourceId,
    pub(crate) document: Document,
}

/// Loads `entry` and all files that it uses. A file comes after the files that it
/// uses. Adds the mistakes of all files to `out`.
pub(crate) fn load(
    files: &dyn Files,
    entry: &FileRef,
    grammar: Grammar<'_>,
    sources: &mut Sources,
    out: &mut Vec<Diagnostic>,
) -> Vec<Loaded> {
    let mut loader = Loader { files, grammar, sources, out, seen: HashMap::new(), done: Vec::new() };
    loader.run(entry);
    loader.done
}

enum Visit {
    /// The loader is following its `use` nodes.
    Open,
    Done,
}

struct Loader<'a> {
    files: &'a dyn Files,
    grammar: Grammar<'a>,
    sources: &'a mut Sources,
    out: &'a mut Vec<Diagnostic>,
    seen: HashMap<FileRef, Visit>,
    done: Vec<Loaded>,
}

/// A file whose `use` nodes the loader is following, and how many of them are done.
struct Frame {
    loaded: Loaded,
    uses: Vec<(FileRef, Span)>,
    next: usize,
}

impl Loader<'_> {
    fn run(&mut self, entry: &FileRef) {
        let mut stack: Vec<Frame> = Vec::new();
        stack.extend(self.open(entry, None));
        while let Some(frame) = stack.last_mut() {
            let Some((file, span)) = frame.uses.get(frame.next).cloned() else {
                self.seen.insert(frame.loaded.file.clone(), Visit::Done);
                self.done.extend(stack.pop().map(|f| f.loaded));
                continue;
            };
            frame.next += 1;
            match self.seen.get(&file) {
                Some(Visit::Done) => {}
                Some(Visit::Open) => {
                    let way: Vec<String> = stack
                        .iter()
                        .map(|f| f.loaded.file.to_string())
                        .skip_while(|name| *name != file.to_string())
                        .collect();
                    self.out.push(
                        Diagnostic::error(Code::UseCycle, span, format!("`{file}` uses itself"))
                            .label("this closes the cycle")
                            .help(format!(
                                "{} -> {file}; move the shared declarations to another file",
                                way.join(" -> ")
                            )),
                    );
                }
                None => stack.extend(self.open(&file, Some(span))),
            }
        }
    }

    fn open(&mut self, file: &FileRef, used_at: Option<Span>) -> Option<Frame> {
        if self.seen.len() >= MAX_FILES {
            if self.seen.len() == MAX_FILES
                && let Some(span) = used_at
            {
                self.out.push(
                    Diagnostic::error(
                        Code::TooManyFiles,
                        span,
                        format!("the recipe uses more than {MAX_FILES} files"),
                    )
                    .help("does a script generate files endlessly?"),
                );
                self.seen.insert(file.clone(), Visit::Done);
            }
            return None;
        }
        self.seen.insert(file.clone(), Visit::Open);
        let text =
            match self.files.read(file, MAX_RECIPE).map_err(|e| unreadable(self.files, file, &e, used_at)) {
                Ok(bytes) => String::from_utf8(bytes)
                    .map_err(|e| not_utf8(file, e.utf8_error().valid_up_to(), used_at)),
                Err(diagnostic) => Err(diagnostic),
            };
        let text = match text {
            Ok(text) => text,
            Err(diagnostic) => {
                self.out.push(diagnostic);
                return None;
            }
        };
        let source = self.sources.add(file.to_string(), text.as_str());
        let document = match self.files.parsed(&text) {
            Some(document) => document,
            None => match syntax::parse(source, &text) {
                Ok(document) => {
                    self.files.keep_parsed(&text, &document);
                    document
                }
                Err(errors) => {
                    self.out.extend(errors);
                    return None;
                }
            },
        };
        shape::check(source, &document.nodes, self.grammar, self.out);
        let mut uses = Vec::new();
        for node in document.nodes.iter().filter(|n| n.name == "use") {
            let (Some(text), Some(arg)) = (node.text(), node.args.first()) else { continue };
            let span = Span { source, start: arg.range.start, end: arg.range.end };
            match file.join(text) {
                Some(used) => uses.push((used, span)),
                None => self.out.push(outside(text, span)),
            }
        }
        Some(Frame { loaded: Loaded { file: file.clone(), source, document }, uses, next: 0 })
    }
}

/// The diagnostic for a path that leaves the project.
pub(crate) fn outside(text: &str, span: Span) -> Diagnostic {
    Diagnostic::error(Code::OutsideProject, span, format!("`{text}` is outside the project")).help(
        "paths are relative to this file, or `//...` from the project root; copy the file into the project",
    )
}

/// The diagnostic for a file that could not be read.
pub(crate) fn unreadable(
    files: &dyn Files,
    file: &FileRef,
    error: &ReadError,
    at: Option<Span>,
) -> Diagnostic {
    let (code, message, help) = match error {
        ReadError::NotFound => (Code::UnreadableFile, format!("`{file}` does not exist"), None),
        ReadError::NotAFile(what) => (Code::NotAFile, format!("`{file}` is {what}, not a file"), None),
        ReadError::Outside => (
            Code::OutsideProject,
            format!("`{file}` leads out of the project through a symbolic link"),
            Some("copy the target into the project".to_owned()),
        ),
        ReadError::TooLarge => (
            Code::TooLarge,
            format!("`{file}` is too large"),
            Some(format!("the limit for recipes and templates is {} KiB", MAX_RECIPE >> 10)),
        ),
        ReadError::Other(why) => (Code::UnreadableFile, format!("`{file}` can't be read: {why}"), None),
    };
    let mut diagnostic = match at {
        Some(span) => Diagnostic::error(code, span, message),
        None => Diagnostic::global(code, message),
    };
    diagnostic.help = help;
    if *error == ReadError::NotFound {
        let name = file.path.rsplit('/').next().unwrap_or("");
        let names = files.siblings(file);
        let names = names.iter().map(String::as_str);
        diagnostic = match file.root {
            Root::Std => diagnostic.suggest(name, names),
            // Other files of the project are no help.
            Root::Project => diagnostic.suggest_near(name, names).help_if_none(match at {
                Some(_) => "create it, or correct its path: relative to this file, or `//...` from the root",
                None => "create it, or correct its path",
            }),
        };
    }
    diagnostic.help_if_none("check the path and its permissions")
}

/// The diagnostic for a file that is not valid UTF-8; `valid` is the offset of the
/// first invalid byte.
pub(crate) fn not_utf8(file: &FileRef, valid: usize, at: Option<Span>) -> Diagnostic {
    let message = format!("`{file}` is not valid UTF-8 at byte {valid}");
    match at {
        Some(span) => Diagnostic::error(Code::NotUtf8, span, message),
        None => Diagnostic::global(Code::NotUtf8, message),
    }
    .help("save the file as UTF-8")
}

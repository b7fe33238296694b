//! Recipe texts, places in them, and the one door to the world outside.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// Which tree a file belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Root {
    /// The directory of the main recipe.
    Project,
    /// The library that is embedded in the program, imported as `std/...`.
    Std,
}

/// A file or directory that a recipe may name: a normalised, `/`-separated path
/// below one of the [`Root`]s. It never holds `..`, `.` or empty components.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct FileRef {
    /// The tree.
    pub root: Root,
    /// The path below it; empty for the root itself.
    pub path: String,
}

impl FileRef {
    /// A file of the project, by its normalised path.
    pub fn project(path: impl Into<String>) -> Self {
        Self { root: Root::Project, path: path.into() }
    }

    /// Resolves `text` as written in the file `self`.
    ///
    /// `//a/b` starts at the project root, `std/...` in the embedded library,
    /// all else in the directory of `self`. `None` if the path is absolute or
    /// climbs out of its root.
    pub fn join(&self, text: &str) -> Option<Self> {
        let (root, base, rest) = if let Some(rest) = text.strip_prefix("//") {
            (Root::Project, "", rest)
        } else if let Some(rest) = text.strip_prefix("std/") {
            (Root::Std, "", rest)
        } else if text.starts_with('/') {
            return None;
        } else {
            let dir = self.path.rsplit_once('/').map_or("", |(dir, _)| dir);
            (self.root, dir, text)
        };
        let mut parts: Vec<&str> = base.split('/').filter(|p| !p.is_empty()).collect();
        for part in rest.split('/') {
            match part {
                "" | "." => {}
                ".." => {
                    parts.pop()?;
                }
                part if part.contains('\0') => return None,
                part => parts.push(part),
            }
        }
        Some(Self { root, path: parts.join("/") })
    }
}

impl fmt::Display for FileRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.root {
            Root::Project if self.path.is_empty() => f.write_str("."),
            // Not to be taken for the library's.
            Root::Project if self.path.starts_with("std/") => write!(f, "./{}", self.path),
            Root::Project => f.write_str(&self.path),
            Root::Std => write!(f, "std/{}", self.path),
        }
    }
}

/// What a path names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileKind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
}

/// Why a file could not be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReadError {
    /// There is nothing at that path.
    NotFound,
    /// It is a directory, a FIFO, a device or a socket; the text names which.
    NotAFile(&'static str),
    /// A symbolic link on the way leads out of the project.
    Outside,
    /// It holds more bytes than the limit given.
    TooLarge,
    /// Anything else, in the operating system's words.
    Other(String),
}

/// The only way in which this crate reads the world. Implementations must not
/// follow symbolic links out of the root and must not block on special files.
pub trait Files {
    /// Reads a regular file of at most `limit` bytes.
    fn read(&self, file: &FileRef, limit: usize) -> Result<Vec<u8>, ReadError>;

    /// Says what is at a path without reading it.
    fn kind(&self, file: &FileRef) -> Result<FileKind, ReadError>;

    /// The names below a directory, for "did you mean"; an empty list is a
    /// fine answer.
    fn siblings(&self, _file: &FileRef) -> Vec<String> {
        Vec::new()
    }

    /// What an earlier [`Files::keep_parsed`] was given for the same text.
    fn parsed(&self, _text: &str) -> Option<crate::Document> {
        None
    }

    /// Offers the parsed form of a text for keeping.
    fn keep_parsed(&self, _text: &str, _document: &crate::Document) {}
}

/// Identifies one text in a [`Sources`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SourceId(u32);

/// A range of bytes in a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Span {
    /// The text.
    pub source: SourceId,
    /// First byte.
    pub start: u32,
    /// One past the last byte.
    pub end: u32,
}

impl Span {
    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.end.saturating_sub(self.start) as usize
    }

    /// Whether it covers no byte.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// One text and the name it is shown under.
#[derive(Debug, Clone)]
pub struct Source {
    /// Shown in diagnostics, for instance `site/nginx.vimg`.
    pub name: String,
    /// The text itself; empty where the bytes were no UTF-8.
    pub text: Arc<str>,
}

/// Every text that a compilation has read, so that spans can be shown.
#[derive(Debug, Default)]
pub struct Sources {
    list: Vec<Source>,
    by_name: HashMap<String, SourceId>,
}

impl Sources {
    /// Adds a text, or returns the id that its name already has.
    pub fn add(&mut self, name: impl Into<String>, text: impl Into<Arc<str>>) -> SourceId {
        let name = name.into();
        if let Some(id) = self.by_name.get(&name) {
            return *id;
        }
        let id = self.add_new(name.clone(), text);
        self.by_name.insert(name, id);
        id
    }

    /// Adds a text that is no file of the project, whatever its name.
    pub fn add_new(&mut self, name: impl Into<String>, text: impl Into<Arc<str>>) -> SourceId {
        let id = SourceId(self.list.len() as u32);
        self.list.push(Source { name: name.into(), text: text.into() });
        id
    }

    /// The text with this id.
    pub fn get(&self, id: SourceId) -> &Source {
        &self.list[id.0 as usize]
    }

    /// All texts, in the order in which they were read.
    pub fn iter(&self) -> impl Iterator<Item = &Source> {
        self.list.iter()
    }

    /// One-based line and column (in characters) of a span's start.
    pub fn position(&self, span: Span) -> (usize, usize) {
        let text = &self.get(span.source).text;
        let mut start = (span.start as usize).min(text.len());
        while !text.is_char_boundary(start) {
            start -= 1;
        }
        let before = &text[..start];
        let line = before.bytes().filter(|b| *b == b'\n').count() + 1;
        let column = before.rsplit('\n').next().unwrap_or("").chars().count() + 1;
        (line, column)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn join(base: &str, text: &str) -> Option<String> {
        FileRef::project(base).join(text).map(|f| f.to_string())
    }

    #[test]
    fn paths_resolve_relative_to_the_file_and_stay_inside() {
        assert_eq!(join("a/main.vimg", "b.txt").as_deref(), Some("a/b.txt"));
        assert_eq!(join("a/main.vimg", "../b.txt").as_deref(), Some("b.txt"));
        assert_eq!(join("a/main.vimg", "//x/./y/").as_deref(), Some("x/y"));
        assert_eq!(join("main.vimg", "std/nginx.vimg").as_deref(), Some("std/nginx.vimg"));
        assert_eq!(join("main.vimg", "."), Some(".".into()));
        assert_eq!(join("main.vimg", "../x"), None);
        assert_eq!(join("main.vimg", "std/../../x"), None);
        assert_eq!(join("main.vimg", "/etc/passwd"), None);
        assert_eq!(join("main.vimg", "a\0b"), None);
    }

    #[test]
    fn positions_count_characters() {
        let mut sources = Sources::default();
        let source = sources.add("x", "é\nàb");
        let span = Span { source, start: 5, end: 6 };
        assert_eq!(sources.position(span), (2, 2));
    }
}

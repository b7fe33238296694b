//! Source files, places in them, and the trait through which this crate reads files.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// The tree that a file belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Root {
    /// The directory of the main recipe.
    Project,
    /// The standard library inside vimg, used as `std/...`.
    Std,
}

/// A file or directory that a recipe may name: a normalised, `/`-separated path
/// below one of the [`Root`]s, without `..`, `.` and empty components.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct FileRef {
    /// The tree.
    pub root: Root,
    /// The path below the root; empty for the root itself.
    pub path: String,
}

impl FileRef {
    /// Names a file of the project by its normalised path.
    pub fn project(path: impl Into<String>) -> Self {
        Self { root: Root::Project, path: path.into() }
    }

    /// Resolves the path `text` of the file `self`.
    ///
    /// `//a/b` starts at the project root, `std/...` in the standard library, and any
    /// other path in the directory of `self`. Returns `None` if the path is absolute
    /// or leaves its root.
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
            // Tell the project's directory `std` from the standard library.
            Root::Project if self.path.starts_with("std/") => write!(f, "./{}", self.path),
            Root::Project => f.write_str(&self.path),
            Root::Std => write!(f, "std/{}", self.path),
        }
    }
}

/// The kind of an entry in a tree.
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
    /// The path does not exist.
    NotFound,
    /// The path names a directory, FIFO, device or socket; the text says which.
    NotAFile(&'static str),
    /// A symbolic link in the path leads out of the project.
    Outside,
    /// The file is larger than the limit.
    TooLarge,
    /// Any other error, with the message of the operating system.
    Other(String),
}

/// The only way in which this crate reads files. Implementations must not follow
/// symbolic links out of the root, and must not block on special files.
pub trait Files {
    /// Reads a regular file of at most `limit` bytes.
    fn read(&self, file: &FileRef, limit: usize) -> Result<Vec<u8>, ReadError>;

    /// Returns the kind of an entry without reading it.
    fn kind(&self, file: &FileRef) -> Result<FileKind, ReadError>;

    /// Returns the names in the directory of a file, for "did you mean". May return
    /// none.
    fn siblings(&self, _file: &FileRef) -> Vec<String> {
        Vec::new()
    }

    /// Returns the document that [`Files::keep_parsed`] stored for the same text.
    fn parsed(&self, _text: &str) -> Option<crate::Document> {
        None
    }

    /// Stores the parsed form of a text. Implementations may ignore it.
    fn keep_parsed(&self, _text: &str, _document: &crate::Document) {}
}

/// Identifies a source file in a [`Sources`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SourceId(u32);

/// A range of bytes in a source file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Span {
    /// The source file.
    pub source: SourceId,
    /// Offset of the first byte.
    pub start: u32,
    /// Offset after the last byte.
    pub end: u32,
}

impl Span {
    /// Returns the length in bytes.
    pub fn len(&self) -> usize {
        self.end.saturating_sub(self.start) as usize
    }

    /// Whether it covers no byte.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A source file: its text and its name in diagnostics.
#[derive(Debug, Clone)]
pub struct Source {
    /// The name in diagnostics, for instance `site/nginx.vimg`.
    pub name: String,
    /// The text; empty if the file is not valid UTF-8.
    pub text: Arc<str>,
}

/// All source files that a compilation has read. Diagnostics need them to show places.
#[derive(Debug, Default)]
pub struct Sources {
    list: Vec<Source>,
    by_name: HashMap<String, SourceId>,
}

impl Sources {
    /// Adds a source file, or returns the id of the one with the same name.
    pub fn add(&mut self, name: impl Into<String>, text: impl Into<Arc<str>>) -> SourceId {
        let name = name.into();
        if let Some(id) = self.by_name.get(&name) {
            return *id;
        }
        let id = self.add_new(name.clone(), text);
        self.by_name.insert(name, id);
        id
    }

    /// Adds a text that is not a file of the project, even if its name is taken.
    pub fn add_new(&mut self, name: impl Into<String>, text: impl Into<Arc<str>>) -> SourceId {
        let id = SourceId(self.list.len() as u32);
        self.list.push(Source { name: name.into(), text: text.into() });
        id
    }

    /// Returns the source file with this id.
    pub fn get(&self, id: SourceId) -> &Source {
        &self.list[id.0 as usize]
    }

    /// Iterates over all source files, in the order in which they were read.
    pub fn iter(&self) -> impl Iterator<Item = &Source> {
        self.list.iter()
    }

    /// Returns the one-based line and column (in characters) of the start of a span.
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

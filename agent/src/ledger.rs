//! The ledger: what each layer has changed in the machine, and what was there before. It
//! has a page for each layer, in the machine itself. `docs/reference/ledger.md` describes
//! the format.
//!
//! The agent records a change before it makes it. In a server, which may stop at any
//! time, the entry is on disk before the change.

use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::failure::Failure;
use crate::offline;
use crate::protocol::{Around, Blob, Digest};
use crate::system::Account;
use crate::xattrs;

/// The version of the format.
const FORMAT: u32 = 1;

/// The content of a path before a change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Was {
    /// Nothing.
    Absent,
    /// A file. Its content is stored beside the pages.
    File { content: Digest, mode: u32, uid: u32, gid: u32, xattrs: BTreeMap<String, String> },
    /// A symbolic link.
    Link { target: String, uid: u32, gid: u32 },
    /// A directory.
    Dir { mode: u32, uid: u32, gid: u32, xattrs: BTreeMap<String, String> },
}

/// A change of a layer, with everything needed to revert it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Entry {
    Path {
        path: String,
        was: Was,
    },
    /// The lists of all packages before and after, stored like contents of files.
    Packages {
        names: Vec<String>,
        before: Digest,
        /// `None` until all of them are installed.
        after: Option<Digest>,
    },
    Group {
        name: String,
        was: Option<u32>,
    },
    User {
        name: String,
        was: Option<Account>,
        /// Groups besides its own.
        groups: Vec<String>,
        /// The home directory, if the step created it.
        home: Option<String>,
    },
    /// A line of a file that has lines of several layers.
    Key {
        path: String,
        line: String,
        /// The line that it replaced.
        was: Option<String>,
        /// Whether the step created the file.
        created: bool,
    },
    Service {
        unit: String,
        /// The output of `systemctl is-enabled`.
        enabled: String,
        /// `None` if the machine was switched off.
        active: Option<bool>,
    },
    /// A setting of the running kernel.
    Setting {
        path: String,
        value: String,
    },
    /// Words that were added to the kernel's command line.
    KernelParameters {
        words: Vec<String>,
    },
    Run {
        undo: Option<String>,
        #[serde(flatten)]
        around: Around,
    },
}

/// The first line of a page.
#[derive(Debug, Serialize, Deserialize)]
struct Title {
    format: u32,
    layer: String,
}

/// A layer's page.
#[derive(Debug)]
pub(crate) struct Page {
    file: PathBuf,
    /// Pages are numbered in the order of their layers.
    pub(crate) number: u32,
    pub(crate) layer: String,
    pub(crate) entries: Vec<Entry>,
}

/// All pages, and the one that is open for writing.
pub(crate) struct Ledger {
    dir: PathBuf,
    /// Whether entries must survive a crash of the machine.
    durable: bool,
    page: Option<File>,
    /// The file name of the open page.
    name: String,
    /// Paths that have an entry in the open page.
    opened: HashSet<String>,
}

impl Ledger {
    /// Opens the ledger below `home`, the directory of the agent's files.
    pub(crate) fn below(home: &Path, durable: bool) -> Self {
        Self { dir: home.join("ledger"), durable, page: None, name: String::new(), opened: HashSet::new() }
    }

    /// Opens the page of a layer; creates it if there is none.
    pub(crate) fn enter(&mut self, layer: &str) -> Result<(), Failure> {
        let fail = |e| Failure::at(&self.dir, e);
        fs::create_dir_all(self.contents()).map_err(fail)?;
        fs::set_permissions(&self.dir, std::os::unix::fs::PermissionsExt::from_mode(0o700)).map_err(fail)?;
        let pages = self.pages()?;
        let there = pages.iter().find(|p| p.layer == layer);
        self.opened = there
            .iter()
            .flat_map(|page| &page.entries)
            .filter_map(|entry| if let Entry::Path { path, .. } = entry { Some(path.clone()) } else { None })
            .collect();
        let new = || {
            let number = pages.last().map_or(1, |p| p.number + 1);
            self.dir.join(format!("{number:04}-{}", layer.replace('/', "_")))
        };
        let path = there.map_or_else(new, |p| p.file.clone());
        let open = || {
            let file = OpenOptions::new().append(true).create(true).mode(0o600).open(&path)?;
            // Cut off an incomplete last line: it doesn't count, and must not be joined
            // with the next entry.
            let bytes = fs::read(&path)?;
            file.set_len(bytes.iter().rposition(|b| *b == b'\n').map_or(0, |at| at as u64 + 1))?;
            Ok(file)
        };
        self.page = Some(open().map_err(|e| Failure::at(&path, e))?);
        self.name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if there.is_none() {
            self.line(&Title { format: FORMAT, layer: layer.to_owned() })?;
        }
        Ok(())
    }

    /// Returns the name of the page: a number, which grows from layer to layer, and the
    /// layer's name.
    pub(crate) fn page(&self) -> &str {
        &self.name
    }

    /// Records a change that is about to be made.
    pub(crate) fn note(&mut self, entry: &Entry) -> Result<(), Failure> {
        self.line(entry)?;
        self.settle()
    }

    /// Records what is at a path that is about to change, and which of its parent
    /// directories are missing.
    pub(crate) fn path(&mut self, path: &Path) -> Result<(), Failure> {
        self.paths([path])
    }

    /// Does the same as [`Self::path`] for many paths at once.
    pub(crate) fn paths<'a>(&mut self, paths: impl IntoIterator<Item = &'a Path>) -> Result<(), Failure> {
        let mut more = false;
        for path in paths {
            let missing = |dir: &&Path| fs::symlink_metadata(dir).is_err();
            let mut all: Vec<&Path> = path.ancestors().skip(1).take_while(missing).collect();
            all.reverse();
            all.push(path);
            for path in all {
                let name = escape(path);
                if !self.opened.contains(&name) {
                    let was = self.look(path).map_err(|e| Failure::at(path, e))?;
                    self.line(&Entry::Path { path: name.clone(), was })?;
                    self.opened.insert(name);
                    more = true;
                }
            }
        }
        if more { self.settle() } else { Ok(()) }
    }

    /// Stores bytes beside the pages.
    pub(crate) fn keep(&self, bytes: &[u8]) -> Result<Digest, Failure> {
        let digest = Digest::of(bytes);
        let path = self.content(&digest);
        if !path.exists() {
            fs::write(&path, bytes).map_err(|e| Failure::at(&path, e))?;
        }
        Ok(digest)
    }

    /// Reads stored bytes, and checks their digest.
    pub(crate) fn kept(&self, digest: &Digest) -> Result<Vec<u8>, Failure> {
        let path = self.content(digest);
        let bytes = fs::read(&path).map_err(|e| Failure::at(&path, e))?;
        if Digest::of(&bytes) != *digest {
            return Err(Failure::new(format!("{} was changed after it was stored", path.display())));
        }
        Ok(bytes)
    }

    /// Reads all pages, in the order of their layers.
    pub(crate) fn pages(&self) -> Result<Vec<Page>, Failure> {
        let Ok(entries) = fs::read_dir(&self.dir) else { return Ok(Vec::new()) };
        let mut pages = Vec::new();
        for entry in entries.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let Some(number) = name.split('-').next().and_then(|n| n.parse().ok()) else { continue };
            pages.push(read(entry.path(), number)?);
        }
        pages.sort_by_key(|p| p.number);
        Ok(pages)
    }

    /// Removes a page, and stored contents that no other page needs.
    pub(crate) fn tear_out(&mut self, page: &Page) -> Result<(), Failure> {
        fs::remove_file(&page.file).map_err(|e| Failure::at(&page.file, e))?;
        let used: HashSet<String> = self
            .pages()?
            .iter()
            .flat_map(|p| &p.entries)
            .flat_map(contents_of)
            .map(|digest| digest.to_string())
            .collect();
        let Ok(entries) = fs::read_dir(self.contents()) else { return Ok(()) };
        for entry in entries.flatten() {
            if !used.contains(entry.file_name().to_string_lossy().as_ref()) {
                let _ = fs::remove_file(entry.path());
            }
        }
        Ok(())
    }

    /// Removes all entries of a page except the first `entries`.
    pub(crate) fn shorten(&mut self, page: &Page, entries: usize) -> Result<(), Failure> {
        let fail = |e: io::Error| Failure::at(&page.file, e);
        let mut text = json(&Title { format: FORMAT, layer: page.layer.clone() })?;
        for entry in &page.entries[..entries] {
            text.extend(json(entry)?);
        }
        let new = self.dir.join("new");
        fs::write(&new, text).and_then(|()| File::open(&new)?.sync_all()).map_err(fail)?;
        fs::rename(new, &page.file).map_err(fail)
    }

    fn contents(&self) -> PathBuf {
        self.dir.join("contents")
    }

    fn line(&mut self, line: &impl Serialize) -> Result<(), Failure> {
        let fail = |e: io::Error| Failure::new(format!("can't write the ledger: {e}"));
        let page = self.page.as_mut().ok_or_else(|| fail(io::Error::other("no page is open")))?;
        page.write_all(&json(line)?).map_err(fail)
    }

    /// Writes entries to disk, if they must survive a crash of the machine.
    fn settle(&self) -> Result<(), Failure> {
        match &self.page {
            Some(page) if self.durable => {
                page.sync_data().map_err(|e| Failure::new(format!("can't write the ledger: {e}")))
            }
            _ => Ok(()),
        }
    }

    fn look(&self, path: &Path) -> io::Result<Was> {
        let meta = match fs::symlink_metadata(path) {
            Ok(meta) => meta,
            Err(e) if e.kind() == io::ErrorKind::NotFound || e.kind() == io::ErrorKind::NotADirectory => {
                return Ok(Was::Absent);
            }
            Err(e) => return Err(e),
        };
        let (mode, uid, gid) = (meta.mode() & 0o7777, meta.uid(), meta.gid());
        if meta.is_symlink() {
            return Ok(Was::Link { target: escape(&fs::read_link(path)?), uid, gid });
        }
        let xattrs = xattrs::get(path)?;
        if meta.is_dir() {
            return Ok(Was::Dir { mode, uid, gid, xattrs });
        }
        if !meta.is_file() {
            return Err(io::Error::other("not a file, directory or symbolic link"));
        }
        let content = self.keep_file(path)?;
        Ok(Was::File { content, mode, uid, gid, xattrs })
    }

    fn keep_file(&self, path: &Path) -> io::Result<Digest> {
        let new = self.contents().join("new");
        let mut to = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
        let digest = match path == Path::new(offline::HOSTS) {
            true => Blob::copy(&*offline::own_content(path, fs::read(path)?), &mut to)?.digest,
            false => Blob::copy(File::open(path)?, &mut to)?.digest,
        };
        if self.durable {
            to.sync_data()?;
        }
        fs::rename(&new, self.content(&digest))?;
        Ok(digest)
    }

    /// The path of a stored content.
    pub(crate) fn content(&self, digest: &Digest) -> PathBuf {
        self.contents().join(digest.to_string())
    }
}

/// Encodes a line of a page.
fn json(line: &impl Serialize) -> Result<Vec<u8>, Failure> {
    let mut bytes = serde_json::to_vec(line).map_err(|e| Failure::new(e.to_string()))?;
    bytes.push(b'\n');
    Ok(bytes)
}

fn contents_of(entry: &Entry) -> Vec<Digest> {
    match entry {
        Entry::Path { was: Was::File { content, .. }, .. } => vec![*content],
        Entry::Packages { before, after, .. } => after.iter().chain([before]).copied().collect(),
        _ => Vec::new(),
    }
}

fn read(file: PathBuf, number: u32) -> Result<Page, Failure> {
    let text = fs::read_to_string(&file).map_err(|e| Failure::at(&file, e))?;
    let bad = |e: &dyn std::fmt::Display| Failure::new(format!("can't read {}: {e}", file.display()));
    // The machine stopped while the agent wrote an incomplete last line; the change had
    // not been made yet.
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let mut lines = whole.lines();
    let title: Title = match lines.next() {
        Some(line) => serde_json::from_str(line).map_err(|e| bad(&e))?,
        None => return Err(bad(&"it is empty")),
    };
    if title.format != FORMAT {
        return Err(bad(&format_args!(
            "it has format {}, and this agent supports only {FORMAT}",
            title.format
        )));
    }
    let entries =
        lines.map(|line| serde_json::from_str(line).map_err(|e| bad(&e))).collect::<Result<_, _>>()?;
    Ok(Page { number, layer: title.layer, entries, file })
}

/// Writes a path as text: `\` and bytes that are not UTF-8 become `\xNN`.
pub(crate) fn escape(path: &Path) -> String {
    let mut out = String::new();
    for chunk in path.as_os_str().as_bytes().utf8_chunks() {
        out.push_str(&chunk.valid().replace('\\', "\\x5c"));
        for byte in chunk.invalid() {
            out.push_str(&format!("\\x{byte:02x}"));
        }
    }
    out
}

/// Reads a path that [`escape`] has written.
pub(crate) fn unescape(text: &str) -> PathBuf {
    let mut parts = text.split("\\x");
    let mut bytes = parts.next().unwrap_or_default().as_bytes().to_vec();
    for part in parts {
        let (code, rest) = part.split_at_checked(2).unwrap_or((part, ""));
        bytes.extend(u8::from_str_radix(code, 16));
        bytes.extend(rest.as_bytes());
    }
    PathBuf::from(std::ffi::OsString::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_is_noted_once_and_parents_first() {
        let home = tempfile::tempdir().unwrap();
        let mut ledger = Ledger::below(home.path(), true);
        ledger.enter("a").unwrap();
        let file = home.path().join("x/y/file");
        ledger.path(&file).unwrap();
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(&file, "new").unwrap();
        ledger.path(&file).unwrap();
        // Another process continues the same page.
        let mut ledger = Ledger::below(home.path(), true);
        ledger.enter("a").unwrap();
        ledger.path(&file).unwrap();
        ledger.enter("b").unwrap();
        ledger.path(&file).unwrap();
        let pages = ledger.pages().unwrap();
        let absent = |path: &str| Entry::Path { path: escape(&home.path().join(path)), was: Was::Absent };
        assert_eq!(pages[0].entries, [absent("x"), absent("x/y"), absent("x/y/file")]);
        assert_eq!((pages[1].layer.as_str(), pages[1].number), ("b", 2));
        let Entry::Path { was: Was::File { content, mode, .. }, .. } = &pages[1].entries[0] else { panic!() };
        assert_eq!((ledger.kept(content).unwrap().as_slice(), *mode & 0o600), (b"new".as_slice(), 0o600));
        // Contents that only this page needs are removed with it.
        let content = ledger.content(content);
        ledger.tear_out(&pages[1]).unwrap();
        assert!(!content.exists());
        assert_eq!(ledger.pages().unwrap().len(), 1);
    }

    #[test]
    fn half_a_line_is_none_and_a_strange_format_is_refused() {
        let home = tempfile::tempdir().unwrap();
        let mut ledger = Ledger::below(home.path(), true);
        ledger.enter("a").unwrap();
        let page = home.path().join("ledger/0001-a");
        let title = fs::read_to_string(&page).unwrap();
        fs::write(&page, format!("{title}{{\"path\":{{")).unwrap();
        assert_eq!(ledger.pages().unwrap()[0].entries, []);
        fs::write(&page, title.replace("\"format\":1", "\"format\":9")).unwrap();
        let message = ledger.pages().unwrap_err().message;
        assert!(message.ends_with("it has format 9, and this agent supports only 1"), "{message}");
    }

    #[test]
    fn any_path_survives_being_text() {
        for path in ["/a b", "/ä\\x", "/\\", "/\u{fffd}"] {
            assert_eq!(unescape(&escape(Path::new(path))), Path::new(path));
        }
        let raw = std::ffi::OsStr::from_bytes(b"/\xff\xfe\\/x");
        assert_eq!(unescape(&escape(Path::new(raw))), Path::new(raw));
    }
}

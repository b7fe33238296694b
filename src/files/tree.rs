//! Directories of a project, without what a `.vimgignore` leaves out.

use std::collections::BTreeMap;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use ignore::Match;
use ignore::gitignore::{Gitignore, GitignoreBuilder};
use rustix::fs::{FileType, OFlags};
use vimg_agent::protocol::{Entry, Manifest, Node};
use vimg_lang::{FileRef, Files, ReadError, Root};

use super::dependency::Dependency;
use super::error::{FileError, error, kind_name, words};
use super::project::Project;

/// Maximum number of files in a directory of a recipe.
const MAX_TREE: usize = 500_000;
/// The name of the ignore file.
const IGNORE: &str = ".vimgignore";
/// Maximum size of an ignore file, in bytes.
const MAX_IGNORE: usize = 1 << 20;

/// The mode of directories in a tree. It is fixed, because the mode in a
/// checkout depends on the umask.
const DIRECTORY_MODE: u32 = 0o755;

impl Project {
    /// Reads the tree below a directory, sorted by raw names.
    pub fn tree(&self, dir: &FileRef) -> Result<Manifest, FileError> {
        if dir.root == Root::Std {
            return Err(error(dir, "the standard library has no directories to copy"));
        }
        // The directory may be a link to another one of the project.
        let _ = self.stat(&dir.path);
        let top = self
            .open_at(&dir.path, OFlags::PATH | OFlags::DIRECTORY)
            .and_then(|fd| std::fs::canonicalize(format!("/proc/self/fd/{}", fd.as_raw_fd())))
            .map_err(|e| error(dir, &words(&e)))?;
        let inner = top.strip_prefix(&self.root).map_err(|_| error(dir, "it is outside the project"))?;
        let inner = inner.to_str().ok_or_else(|| error(dir, "its name is not UTF-8"))?.to_owned();
        let mut entries: BTreeMap<String, Node> = BTreeMap::new();
        let mut ignored = self.ignored_above(&inner).map_err(|why| error(dir, &why))?;
        // The ignore file of a directory is read before the rest.
        let first = |entry: &walkdir::DirEntry| (entry.file_name() != IGNORE, entry.file_name().to_owned());
        let mut walk = walkdir::WalkDir::new(&top).follow_links(false).sort_by_key(first).into_iter();
        while let Some(found) = walk.next() {
            let found = found.map_err(|e| error(dir, &e.to_string()))?;
            if self.is_left_out(&found, &inner, &top, &mut ignored).map_err(|why| error(dir, &why))? {
                if found.file_type().is_dir() {
                    walk.skip_current_dir();
                }
                continue;
            }
            let relative = found.path().strip_prefix(&top).unwrap_or(found.path());
            let path = relative
                .to_str()
                .ok_or_else(|| error(dir, &format!("the name {relative:?} is not UTF-8; rename the file")))?;
            let whole = format!("{inner}/{path}");
            let whole = whole.trim_matches('/');
            if found.file_type().is_file() {
                // `hash_project` records the access.
                let (blob, mode, attributes) =
                    self.hash_project(whole).map_err(|e| error(dir, &format!("{path}: {}", words(&e))))?;
                entries.insert(path.to_owned(), Node::File(mode, blob, attributes));
            } else {
                let stat = rustix::fs::lstat(found.path()).map_err(|e| error(dir, &e.to_string()))?;
                self.seen().dependencies.push(Dependency::entry(whole, &stat));
                let node = match FileType::from_raw_mode(stat.st_mode) {
                    FileType::Directory => Node::Dir(DIRECTORY_MODE),
                    // Sockets and FIFOs are left over from programs, and are
                    // not copied.
                    FileType::Socket | FileType::Fifo => continue,
                    FileType::Symlink => {
                        let target = std::fs::read_link(found.path()).map_err(|e| error(dir, &words(&e)))?;
                        let target = target.to_str().ok_or_else(|| {
                            error(dir, &format!("the link {path} points to a name that is not UTF-8"))
                        })?;
                        Node::Link(target.to_owned())
                    }
                    _ => {
                        let kind = kind_name(&stat);
                        return Err(error(dir, &format!("{path} is {kind}, which can't be copied")));
                    }
                };
                entries.insert(path.to_owned(), node);
            }
            if entries.len() > MAX_TREE {
                return Err(error(dir, &format!("it contains more than {MAX_TREE} files")));
            }
        }
        Ok(Manifest { entries: entries.into_iter().map(|(path, node)| Entry { path, node }).collect() })
    }

    /// Reads the `.vimgignore` files above a directory.
    fn ignored_above(&self, dir: &str) -> Result<Vec<(PathBuf, Gitignore)>, String> {
        let mut all = Vec::new();
        let ancestors: Vec<&Path> = Path::new(dir).ancestors().skip(1).collect();
        for above in ancestors.into_iter().rev().filter(|_| !dir.is_empty()) {
            let path = above.join(IGNORE);
            let path = path.to_str().ok_or("its name is not UTF-8")?;
            match self.read(&FileRef::project(path), MAX_IGNORE) {
                Ok(bytes) => all.push((above.to_owned(), gitignore(above, &bytes)?)),
                Err(ReadError::NotFound) => {}
                Err(_) => return Err(format!("can't read `{path}`")),
            }
        }
        Ok(all)
    }

    /// Whether an entry of the tree at `inner` is ignored. Reading a
    /// `.vimgignore` adds its rules.
    fn is_left_out(
        &self,
        found: &walkdir::DirEntry,
        inner: &str,
        top: &Path,
        ignored: &mut Vec<(PathBuf, Gitignore)>,
    ) -> Result<bool, String> {
        let relative = found.path().strip_prefix(top).unwrap_or(found.path());
        let whole = Path::new(inner).join(relative);
        ignored.retain(|(dir, _)| whole.starts_with(dir));
        let name = found.file_name();
        if name == IGNORE && found.file_type().is_file() {
            let dir = whole.parent().unwrap_or(Path::new("")).to_owned();
            let path = whole.to_str().ok_or("its name is not UTF-8")?;
            let bytes = self.read(&FileRef::project(path), MAX_IGNORE);
            let bytes = bytes.map_err(|_| format!("can't read `{path}`"))?;
            let rules = gitignore(&dir, &bytes)?;
            ignored.push((dir, rules));
            return Ok(true);
        }
        let bytes = name.as_encoded_bytes();
        let is_draft = bytes.starts_with(b".") && bytes.ends_with(b".vimg-new");
        if is_draft || whole.to_str().is_some_and(|path| self.left_out.contains(path)) {
            return Ok(true);
        }
        let is_dir = found.file_type().is_dir();
        // The nearest `.vimgignore` takes precedence.
        for (_, rules) in ignored.iter().rev().filter(|_| found.depth() > 0) {
            match rules.matched(&whole, is_dir) {
                Match::Ignore(_) => return Ok(true),
                Match::Whitelist(_) => return Ok(false),
                Match::None => {}
            }
        }
        Ok(false)
    }
}

fn gitignore(dir: &Path, bytes: &[u8]) -> Result<Gitignore, String> {
    let file = dir.join(IGNORE);
    let text = std::str::from_utf8(bytes).map_err(|_| format!("`{}` is not UTF-8", file.display()))?;
    let mut builder = GitignoreBuilder::new(dir);
    for (n, line) in text.lines().enumerate() {
        let added = builder.add_line(None, line);
        added.map_err(|e| format!("`{}`, line {}: {e}", file.display(), n + 1))?;
    }
    builder.build().map_err(|e| format!("`{}`: {e}", file.display()))
}

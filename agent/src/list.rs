//! Lists the packages and files on the machine's disk, for comparisons.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use crate::fetch::Sender;
use crate::ledger;
use crate::packages;
use crate::protocol::{self, Blob, Digest, Kind, Listed};
use crate::xattrs;

/// The EFI system partition, which also belongs to the machine.
const ESP: &str = "/boot/efi";

/// Sends the list of packages and then the list of all files, each as frames of data
/// followed by an empty frame of data.
pub(crate) fn list(sender: &Sender) -> io::Result<()> {
    let mut out = Chunks { sender, buffer: Vec::new() };
    out.add(packages::list().as_bytes())?;
    out.end()?;
    let root = fs::symlink_metadata("/")?;
    walk(Path::new("/"), root.dev(), &mut out)?;
    out.end()
}

fn walk(dir: &Path, device: u64, out: &mut Chunks) -> io::Result<()> {
    let Ok(entries) = fs::read_dir(dir) else { return Ok(()) };
    for entry in entries {
        let path = entry?.path();
        // Skip a file that was deleted meanwhile.
        let Ok(meta) = fs::symlink_metadata(&path) else { continue };
        if meta.dev() != device && path != Path::new(ESP) {
            continue;
        }
        let kind = meta.file_type();
        let kind = if kind.is_dir() {
            Kind::Dir
        } else if kind.is_file() {
            Kind::File
        } else if kind.is_symlink() {
            Kind::Link(fs::read_link(&path).map(|target| ledger::escape(&target)).unwrap_or_default())
        } else if kind.is_fifo() {
            Kind::Other("fifo".into())
        } else if kind.is_socket() {
            Kind::Other("socket".into())
        } else {
            Kind::Other("device".into())
        };
        let is_dir = kind == Kind::Dir;
        let listed = Listed {
            path: ledger::escape(&path),
            size: if kind == Kind::File { meta.len() } else { 0 },
            kind,
            mode: meta.mode() & 0o7777,
            owner: (meta.uid(), meta.gid()),
            attributes: xattrs::get(&path).unwrap_or_default(),
            stamp: (meta.ino(), meta.ctime(), meta.ctime_nsec()),
        };
        let mut line = serde_json::to_vec(&listed)?;
        line.push(b'\n');
        out.add(&line)?;
        if is_dir {
            walk(&path, meta.dev(), out)?;
        }
    }
    Ok(())
}

/// Computes the digests of files; `None` for a file that can't be read.
pub(crate) fn digests(paths: &[String]) -> Vec<Option<Digest>> {
    let digest = |path: &String| -> io::Result<Digest> {
        let path = ledger::unescape(path);
        if !fs::symlink_metadata(&path)?.is_file() {
            return Err(io::Error::other("not a regular file"));
        }
        Ok(Blob::copy(File::open(path)?, &mut io::sink())?.digest)
    };
    paths.iter().map(|path| digest(path).ok()).collect()
}

struct Chunks<'a> {
    sender: &'a Sender,
    buffer: Vec<u8>,
}

impl Chunks<'_> {
    fn add(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.buffer.extend(bytes);
        while self.buffer.len() >= protocol::CHUNK {
            let rest = self.buffer.split_off(protocol::CHUNK);
            let chunk = std::mem::replace(&mut self.buffer, rest);
            self.sender.raw(&protocol::encode_data(&chunk)?)?;
        }
        Ok(())
    }

    fn end(&mut self) -> io::Result<()> {
        let rest = std::mem::take(&mut self.buffer);
        if !rest.is_empty() {
            self.sender.raw(&protocol::encode_data(&rest)?)?;
        }
        self.sender.raw(&protocol::encode_data(&[])?)
    }
}

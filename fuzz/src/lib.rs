//! What vimg parses from strangers, one function for each kind of text or file.
//! None may panic, hang, or allocate without bound, whatever the bytes are. Each
//! returns whether the bytes are valid, so that a test can see that its seeds are.
//!
//! The targets in `fuzz_targets` call these functions, and so does
//! `tests/fuzz.rs` of vimg, with a few thousand damaged files.

use std::path::Path;

use vimg::cache::entry::{self, Asked, Build};
use vimg::cache::sign::{Signer, Trust};
use vimg::cache::spec::{Spec, fields};
use vimg::digest::{Digest, Key};
use vimg::disk::ext4::{Source, Special, Tree, differ};
use vimg::disk::{fat, gpt, grub, qcow2};
use vimg_agent::protocol::{Frame, FromAgent, ToAgent, read_frame};
use vimg_lang::{FileKind, FileRef, Files, ReadError, Request, Sources, Takes};

/// A project with one recipe; each other file has the same text.
struct One<'a>(&'a [u8]);

impl Files for One<'_> {
    fn read(&self, _: &FileRef, limit: usize) -> Result<Vec<u8>, ReadError> {
        match self.0.len() <= limit {
            true => Ok(self.0.to_owned()),
            false => Err(ReadError::TooLarge),
        }
    }

    fn kind(&self, file: &FileRef) -> Result<FileKind, ReadError> {
        match file.path.contains('.') {
            true => Ok(FileKind::File),
            false => Ok(FileKind::Directory),
        }
    }
}

/// A recipe, its templates and its values file, and what the formatter makes of
/// it.
pub fn recipe(data: &[u8]) -> bool {
    let files = One(data);
    let mut sources = Sources::default();
    let request = Request {
        files: &files,
        entry: FileRef::project("main.vimg"),
        set: &[],
        values: None,
        rebuilt: None,
        distributions: &vimg::base::known(vimg::base::BUILT_IN),
    };
    let compiled = vimg_lang::compile(&request, &mut sources);
    let valid = compiled.is_ok();
    // Each diagnostic can be shown.
    for diagnostic in compiled.err().into_iter().flatten() {
        let shown = vimg::report::Shown::new(&sources, &diagnostic);
        let style = vimg::report::Style {
            colour: false,
            colour_out: false,
            json: false,
            quiet: false,
            verbose: false,
        };
        let _ = vimg::report::render(&shown, style);
    }
    if let Ok(text) = std::str::from_utf8(data) {
        let source = sources.add_new("main.vimg".to_owned(), text);
        let _ = vimg_lang::format(source, text);
    }
    valid
}

/// A settings file of a checkout, and the spec of a cache in it.
pub fn settings(data: &[u8]) -> bool {
    let text = String::from_utf8_lossy(data);
    let known =
        [("cache-from", Takes::Texts(1)), ("trust", Takes::Texts(2)), ("accel", Takes::Word(&["kvm"]))];
    let mut sources = Sources::default();
    let found = vimg_lang::settings("vimg.kdl", &text, &known, &mut sources);
    for spec in found.iter().flat_map(|all| all.get("cache-from")).flatten().flatten() {
        let _ = (Spec::parse(spec, false), Spec::parse(spec, true));
    }
    let _ = fields(&text);
    found.is_ok() || Spec::parse(&text, false).is_ok() || Spec::parse(&text, true).is_ok()
}

/// A disk that a recipe imports, or one that a guest wrote.
pub fn qcow2(data: &[u8]) -> bool {
    let Ok(file) = tempfile::NamedTempFile::with_suffix(".qcow2") else { return false };
    if std::fs::write(file.path(), data).is_err() {
        return false;
    }
    header_and_clusters(file.path())
}

fn header_and_clusters(path: &Path) -> bool {
    let _ = (qcow2::is_qcow2(path), qcow2::compressed_clusters(path));
    let header = qcow2::read(path);
    let Ok(mut chain) = qcow2::Chain::open(&[path]) else { return false };
    let mut buffer = [0; 4096];
    for at in [0, 65_536, chain.size().saturating_sub(4096)] {
        let _ = chain.read_at(at, &mut buffer);
    }
    let changed = chain.written(0).unwrap_or_default();
    let _ = qcow2::Revision::of(path, &mut chain, &changed);
    header.is_ok()
}

struct Disk<'a>(&'a [u8]);

impl Source for Disk<'_> {
    fn read_at(&mut self, at: u64, buffer: &mut [u8]) -> std::io::Result<()> {
        let there = usize::try_from(at).ok().and_then(|at| self.0.get(at..at.checked_add(buffer.len())?));
        buffer.copy_from_slice(there.ok_or(std::io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

/// The partition table of a disk that a guest wrote.
pub fn gpt(data: &[u8]) -> bool {
    let mut disk = Disk(data);
    gpt::read(data.len() as u64, |at, buffer| disk.read_at(at, buffer)).is_ok()
}

/// The configuration of the boot loader on a disk that a guest wrote. Each other
/// file has the same text.
pub fn grub(data: &[u8]) -> bool {
    let text = String::from_utf8_lossy(data);
    let found = grub::default_entry("/boot/grub/grub.cfg", &mut |_| Ok(Some(text.to_string())));
    matches!(found, Ok(Ok(_)))
}

/// An EFI system partition that a guest wrote.
pub fn fat(data: &[u8]) -> bool {
    matches!(fat::size_of(&mut Disk(data), 0, "EFI/BOOT/BOOTX64.EFI"), Ok(Some(_)))
}

/// Two filesystems of guests: the first and the second half of the bytes. Files
/// of the first are found and read, then both are compared.
pub fn ext4(data: &[u8]) -> bool {
    let (a, b) = data.split_at(data.len() / 2);
    let mut disk = Disk(a);
    if let Ok(mut tree) = Tree::open(&mut disk, 0)
        && let Ok(Some(root)) = tree.find(b"/")
    {
        let _ = (tree.head("/etc/page", 4096), tree.head("/etc/../etc/link", 4096));
        for number in tree.entries(&root).unwrap_or_default().into_values() {
            let Ok(entry) = tree.named(number) else { continue };
            let (_, _) = (tree.target(&entry), tree.entries(&entry));
            let mut left = data.len();
            let _ = tree.content(&entry, &mut |_, bytes| {
                left = left.checked_sub(bytes.len()).ok_or(std::io::ErrorKind::InvalidData)?;
                Ok(())
            });
        }
    }
    let special = Special { apart: &["/var/log"], fixed: &["/boot"], most: 1 << 20, named: true };
    let whole = 0..b.len() as u64;
    differ(&mut Disk(a), &mut Disk(b), 0, &[whole], special).is_ok()
}

/// A record or the last build of a project in a cache: as bytes, and as the
/// payload of a record with a valid signature.
pub fn entry(data: &[u8]) -> bool {
    let known = entry::peek(data).is_ok();
    let Ok(signer) = Signer::generate() else { return false };
    let mut trust = Trust::default();
    trust.add("main", signer.public());
    let signed = signer.sign("application/vnd.vimg.entry.v1+json", data);
    let Ok(json) = serde_json::to_vec(&serde_json::json!({ "entries": [signed] })) else { return false };
    let Ok(record) = zstd::bulk::compress(&json, 1) else { return false };
    let asked = Asked {
        key: Key(Digest([7; 32])),
        domain: "main",
        domains: &["main".to_owned()],
        trust: &trust,
        now: 1_700_000_000,
        max_age: None,
    };
    let _ = (entry::read(&record, &asked), Build::read(data, "main", "web", &trust));
    known || entry::peek(&record).is_ok()
}

/// What an agent says to the host, and what a host says to an agent.
pub fn frames(mut data: &[u8]) -> bool {
    loop {
        match read_frame(&mut data) {
            Ok(None) => return true,
            Err(_) => return false,
            Ok(Some(frame)) => {
                let _ = (frame.message::<FromAgent>(), frame.message::<ToAgent>());
                if let Frame::Message(bytes) = frame {
                    let _ = Frame::from_body(bytes);
                }
            }
        }
    }
}

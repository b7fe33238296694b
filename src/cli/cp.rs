//! `vimg cp`

use std::io::{self, IsTerminal, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::json;

use super::global::Global;
use super::interrupt::{interrupted, interruptible};
use super::output::{Error, Outcome, print_json};
use super::project;
use crate::disk::ext4::{EntryKind, Tree};
use crate::disk::extract::{self, ExtractOptions, Extracted};
use crate::disk::layout::Layout;
use crate::disk::qcow2::Chain;
use crate::event::{Event, plain, stripped};
use crate::report::{self, Style};

/// How many skipped files are named.
const NAMED: usize = 3;

/// Copy files out of an image, without starting a machine
///
/// vimg reads the disk of the image or layer, which must be built. Copies keep
/// permissions, times, links and holes. Set-ID bits, extended attributes and
/// devices are not copied. A symbolic link as the source means the file that it
/// leads to in the image.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The file or directory to copy; `/PATH/.` means what is in a directory
    #[arg(value_name = "IMAGE[@LAYER]:/PATH", value_parser = parse_source)]
    source: Source,
    /// A file or directory of the host, or `-` to print a file
    #[arg(value_name = "DEST")]
    to: PathBuf,
    /// Copy owners, set-ID bits and sticky bits, too; only root can
    #[arg(long)]
    preserve_owner: bool,
}

/// A path in an image.
#[derive(Debug, Clone)]
struct Source {
    node: String,
    path: std::ffi::OsString,
}

fn parse_source(text: &str) -> Result<Source, String> {
    match text.split_once(":/") {
        Some((node, path)) if !node.is_empty() => {
            let path = [b"/".as_slice(), path.as_bytes()].concat();
            Ok(Source { node: node.to_owned(), path: std::ffi::OsString::from_vec(path) })
        }
        _ => Err("expected a value like web:/etc/hosts".into()),
    }
}

pub(super) fn run(args: &Args, global: &Global, style: Style) -> Outcome {
    let name = &args.source.node;
    if args.preserve_owner && !rustix::process::geteuid().is_root() {
        return Err(Error::Message("only root can copy owners".into(), None, 2));
    }
    let mut loaded = project::load(global, &project::only([name]))?;
    let graph = project::graph(&mut loaded)?;
    project::keep_stamps(&loaded.notes, loaded.project);
    let node = graph.node(project::machine(&graph, name)?);
    let image = name.split(['@', ':']).next().unwrap_or(name);
    let _lease = loaded.store.lease([node.key])?;
    let chain = loaded.store.chain(&node.key).ok_or_else(|| {
        let help = format!("build it first: vimg build {image}");
        Error::Message(format!("`{name}` is not in the store"), Some(help), 1)
    })?;
    let stop = Arc::new(AtomicBool::new(false));
    let copy = Copy {
        chain,
        path: args.source.path.clone().into_vec(),
        to: args.to.clone(),
        owners: args.preserve_owner,
        stop: stop.clone(),
    };
    let work = async {
        let _stop = StopOnDrop(stop);
        // Reading disks blocks the thread.
        tokio::task::spawn_blocking(move || copy.run()).await
    };
    let done = interruptible(work)?.ok_or_else(|| interrupted("stopped; the copy is not complete"))?;
    let done = done.map_err(|e| Error::host(format!("the copy ended: {e}")))?;
    let done = done.map_err(|trouble| trouble.into_error(args))?;
    tell(&done, args, style)
}

/// Stops the copy when the command is interrupted.
struct StopOnDrop(Arc<AtomicBool>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

struct Copy {
    chain: Vec<PathBuf>,
    path: Vec<u8>,
    to: PathBuf,
    owners: bool,
    stop: Arc<AtomicBool>,
}

/// Why nothing, or not all, was copied.
enum Trouble {
    Disk(io::Error),
    Missing,
    Special,
    Copy(io::Error),
}

impl Copy {
    fn run(&self) -> Result<Extracted, Trouble> {
        let mut disk = Chain::open(&self.chain).map_err(Trouble::Disk)?;
        let (layout, most) = (Layout::of(&mut disk).map_err(Trouble::Disk)?, disk.size());
        let mut tree = Tree::open(&mut disk, layout.root.start).map_err(Trouble::Disk)?;
        let entry = tree.find(&self.path).map_err(Trouble::Disk)?.ok_or(Trouble::Missing)?;
        if entry.kind() == EntryKind::Special {
            return Err(Trouble::Special);
        }
        let options = ExtractOptions { owners: self.owners, most, stop: &self.stop };
        if self.to.as_os_str() == "-" {
            let mut out = Output { on_terminal: io::stdout().is_terminal(), line: Vec::new() };
            match extract::print(&mut tree, &entry, options, &mut out) {
                Err(error) if error.kind() != io::ErrorKind::BrokenPipe => return Err(Trouble::Copy(error)),
                _ => {}
            }
            return Ok(Extracted { count: 1, bytes: entry.size(), skipped: Vec::new() });
        }
        // `/` and `/PATH/.` have no name of their own.
        let name = self.path.rsplit(|byte| *byte == b'/').find(|part| !part.is_empty());
        let name = name.filter(|name| *name != b"." && *name != b"..");
        extract::extract(&mut tree, &entry, name, &self.to, options).map_err(Trouble::Copy)
    }
}

/// Standard output. A terminal gets no control sequences of the guest, and a
/// closed pipe is no error.
struct Output {
    on_terminal: bool,
    /// The part of a line that is not printed yet.
    line: Vec<u8>,
}

/// Longest part of a line that is printed at once, in bytes.
const LINE: usize = 64 << 10;

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if !self.on_terminal {
            return io::stdout().write(bytes);
        }
        for line in bytes.split_inclusive(|byte| *byte == b'\n') {
            self.line.extend(line);
            if self.line.ends_with(b"\n") || self.line.len() > LINE {
                self.flush()?;
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        let line = std::mem::take(&mut self.line);
        io::stdout().write_all(stripped(&String::from_utf8_lossy(&line)).as_bytes())?;
        io::stdout().flush()
    }
}

impl Trouble {
    fn into_error(self, args: &Args) -> Error {
        let node = &args.source.node;
        let path = plain(&String::from_utf8_lossy(args.source.path.as_bytes()));
        match self {
            Self::Disk(error) => {
                let help = format!("`vimg run {node} -- COMMAND` reads it in the machine");
                Error::Message(format!("can't read the disk of `{node}`: {error}"), Some(help), 1)
            }
            Self::Missing => {
                let help = "vimg reads the root filesystem only, as it is without a boot";
                Error::Message(format!("there is no {path} in `{node}`"), Some(help.into()), 1)
            }
            Self::Special => {
                Error::Message(format!("{path} in `{node}` is a device, socket or FIFO"), None, 1)
            }
            Self::Copy(error) => {
                let to = args.to.display();
                Error::Message(format!("can't copy {node}:{path} to {to}: {error}"), None, 1)
            }
        }
    }
}

fn tell(done: &Extracted, args: &Args, style: Style) -> Outcome {
    if args.to.as_os_str() == "-" {
        return Ok(());
    }
    if style.json {
        let Extracted { count, bytes, skipped } = done;
        return print_json(&json!({ "copied": count, "bytes": bytes, "skipped": skipped }));
    }
    if done.skipped.is_empty() || style.quiet {
        return Ok(());
    }
    let named = done.skipped.iter().take(NAMED).map(String::as_str).collect::<Vec<_>>().join(", ");
    let more = done.skipped.len().saturating_sub(NAMED);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    let text = format!("not copied, because they are devices, sockets or FIFOs: {named}{more}");
    report::reporter(style).sink()(Event::Notice { text });
    Ok(())
}

//! `vimg shell`, `vimg run` and `vimg console`: a person and a machine that is
//! thrown away.

use std::io::{IsTerminal, Read, Write};
use std::path::PathBuf;

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use tokio::sync::mpsc;
use vimg_agent::protocol::{Exec, Size, Stream, Terminal};
use vimg_lang::Sources;

use super::build::{self, How, Made, stopped};
use super::{Error, Global, Outcome, project};
use crate::event::plain;
use crate::execute::{self, Ended, Input, Workshop};
use crate::graph::{Graph, NodeId};
use crate::provider::host::Host;
use crate::report::Style;
use crate::store::{ProjectFiles, Store};

/// Open a shell in an image's machine
///
/// The machine is a fork that is thrown away; the image stays as it is. What
/// is missing of it is built first. A server's shell is in the server itself.
#[derive(Debug, clap::Args)]
pub(super) struct ShellArgs {
    /// An image, a layer of one, or a server that runs
    #[arg(value_name = "IMAGE[@LAYER]")]
    image: String,
    /// Enter the machine of the layer that failed, as it was then
    #[arg(long)]
    failed: bool,
    #[command(flatten)]
    how: How,
}

/// Run a command in an image's machine
///
/// The machine is a fork that is thrown away; the image stays as it is. What
/// is missing of it is built first. Input, output and exit code are those of
/// the command; one that a signal kills gives 128 and the signal's number.
#[derive(Debug, clap::Args)]
pub(super) struct RunArgs {
    /// An image, or a layer of one
    #[arg(value_name = "IMAGE[@LAYER]")]
    image: String,
    /// Give the command a terminal
    #[arg(short, long)]
    terminal: bool,
    #[command(flatten)]
    how: How,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// Boot an image's machine and show its serial console
///
/// The machine is thrown away when it is switched off, or by Ctrl-C; the image
/// stays as it is. What is missing of it is built first.
#[derive(Debug, clap::Args)]
pub(super) struct ConsoleArgs {
    /// An image, or a layer of one
    #[arg(value_name = "IMAGE[@LAYER]")]
    image: String,
    #[command(flatten)]
    how: How,
}

pub(super) fn shell(args: &ShellArgs, global: &Global, style: Style) -> Outcome {
    let on_terminal = std::io::stdin().is_terminal();
    if !args.failed && super::server::is_one(&args.image, global) {
        return super::server::enter(&args.image, Vec::new(), on_terminal, global);
    }
    let door = Door { name: &args.image, failed: args.failed, command: Vec::new(), on_terminal };
    enter(door, &args.how, global, style)
}

pub(super) fn run(args: &RunArgs, global: &Global, style: Style) -> Outcome {
    let command = args.command.clone();
    let door = Door { name: &args.image, failed: false, command, on_terminal: args.terminal };
    enter(door, &args.how, global, style)
}

pub(super) fn console(args: &ConsoleArgs, global: &Global, style: Style) -> Outcome {
    let Ready { workshop, id, sources, .. } = prepare(&args.image, false, &args.how, global, style)?;
    let watched = build::interruptible(execute::watch(&workshop, id, |bytes| write(Stream::Output, bytes)))?;
    match watched.ok_or_else(stopped)? {
        Ok(()) => Ok(()),
        Err(failure) => Err(Error::Build(Box::new(sources), vec![*failure])),
    }
}

/// Where a person goes in, and what for.
struct Door<'a> {
    name: &'a str,
    failed: bool,
    command: Vec<String>,
    on_terminal: bool,
}

fn enter(door: Door, how: &How, global: &Global, style: Style) -> Outcome {
    let Door { name, failed, command, on_terminal } = door;
    let Ready { workshop, id, disks, sources } = prepare(name, failed, how, global, style)?;
    let exec = Exec { command, terminal: terminal(on_terminal) };
    let mut raw = None;
    let enter = || {
        raw = on_terminal.then(Raw::enter);
        listen(on_terminal)
    };
    let ended = build::interruptible(execute::interact(&workshop, id, disks, exec, enter, write));
    drop(raw);
    match ended?.ok_or_else(stopped)? {
        Ok(ended) => outcome(ended),
        Err(failure) => Err(Error::Build(Box::new(sources), vec![*failure])),
    }
}

/// The exit code of a program is ours.
pub(super) fn outcome(ended: Ended) -> Outcome {
    match ended {
        Ended::Code(0) => Ok(()),
        Ended::Code(code) => Err(Error::Code(u8::try_from(code).unwrap_or(1))),
        Ended::Signal(signal) => Err(Error::Code(u8::try_from(128 + signal).unwrap_or(255))),
    }
}

/// A state that is there, and where its machine can be started.
struct Ready {
    workshop: Workshop<Host>,
    id: NodeId,
    /// The disks that a layer left when it failed.
    disks: Option<Vec<PathBuf>>,
    sources: Sources,
}

/// Builds what is missing of a state.
fn prepare(name: &str, failed: bool, how: &How, global: &Global, style: Style) -> Result<Ready, Error> {
    let mut loaded = project::load(global)?;
    let graph = project::graph(&mut loaded)?;
    let mut id = project::machine(&graph, name)?;
    let (mut disks, mut why) = (None, None);
    if failed {
        let (below, found, what) = find_failed(&graph, id, &loaded.store, &loaded.notes)?;
        (id, disks, why) = (below, Some(found), Some(what));
    }
    let Made { workshop, sources } = build::states(loaded, graph, &[id], how, style, why)?;
    Ok(Ready { workshop, id, disks, sources })
}

/// The state that a layer that failed is made from, the disks that it left,
/// and why it failed.
fn find_failed(
    graph: &Graph,
    id: NodeId,
    store: &Store,
    notes: &ProjectFiles,
) -> Result<(NodeId, Vec<PathBuf>, String), Error> {
    let name = &graph.node(id).name;
    for id in graph.chain(id) {
        let node = graph.node(id);
        let (Some(parent), Some((disk, failed))) = (node.parent, notes.failed(&node.name)) else { continue };
        let Some(mut chain) = store.chain_of(&failed.on) else { continue };
        let below = &graph.node(parent).key;
        let there = store.has(below) && store.record(below).is_some_and(|r| (*below, r.id) == failed.below);
        if there && !store.has(&node.key) {
            let why = format!("{}: {}", node.name, plain(&failed.why));
            chain.push(disk);
            return Ok((parent, chain, why));
        }
    }
    let help = "the disk of a layer that fails is kept until it is built, or what lies below it changes";
    Err(Error::Message(format!("nothing of {name} has failed"), Some(help.into()), 1))
}

pub(super) fn write(stream: Stream, bytes: &[u8]) {
    // A reader that went away is no reason to stop the command.
    let _ = match stream {
        Stream::Output => std::io::stdout().write_all(bytes).and_then(|()| std::io::stdout().flush()),
        Stream::Error => std::io::stderr().write_all(bytes),
    };
}

/// The person's terminal, if it is to be the command's.
pub(super) fn terminal(on_terminal: bool) -> Option<Terminal> {
    let kind = || std::env::var("TERM").unwrap_or_else(|_| "dumb".into());
    on_terminal.then(|| Terminal { kind: kind(), size: size() })
}

/// The size of the terminal.
fn size() -> Size {
    match tcgetwinsize(std::io::stdout()) {
        Ok(size) if size.ws_row > 0 => Size { rows: size.ws_row, columns: size.ws_col },
        _ => Size { rows: 24, columns: 80 },
    }
}

/// What the person does, as it comes.
pub(super) fn listen(on_terminal: bool) -> mpsc::Receiver<Input> {
    let (sender, receiver) = mpsc::channel(16);
    if on_terminal {
        let sender = sender.clone();
        tokio::spawn(async move {
            let kind = tokio::signal::unix::SignalKind::window_change();
            let Ok(mut changes) = tokio::signal::unix::signal(kind) else { return };
            while changes.recv().await.is_some() {
                if sender.send(Input::Resize(size())).await.is_err() {
                    return;
                }
            }
        });
    }
    // Reading a terminal can't be stopped; the thread ends with the program.
    std::thread::spawn(move || {
        let mut buffer = vec![0; 32 << 10];
        loop {
            let said = match std::io::stdin().read(&mut buffer) {
                Ok(0) | Err(_) => Input::End,
                Ok(n) => Input::Bytes(buffer[..n].to_vec()),
            };
            let end = matches!(said, Input::End);
            if sender.blocking_send(said).is_err() || end {
                return;
            }
        }
    });
    receiver
}

/// A terminal that passes every key on. Dropped, it is as it was.
pub(super) struct Raw(Option<Termios>);

impl Raw {
    pub(super) fn enter() -> Self {
        let was = tcgetattr(std::io::stdin()).ok();
        if let Some(was) = &was {
            let mut raw = was.clone();
            raw.make_raw();
            let _ = tcsetattr(std::io::stdin(), OptionalActions::Now, &raw);
        }
        Self(was)
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        if let Some(was) = &self.0 {
            let _ = tcsetattr(std::io::stdin(), OptionalActions::Now, was);
        }
    }
}

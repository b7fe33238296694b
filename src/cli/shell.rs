//! `vimg shell`, `vimg run` and `vimg console`: a person and a machine that is
//! thrown away.

use std::io::IsTerminal;
use std::path::PathBuf;

use vimg_agent::protocol::{Exec, Stream};
use vimg_lang::Sources;

use super::build::{self, How, Made, stopped};
use super::global::Global;
use super::output::{Error, Outcome};
use super::terminal::{Raw, listen, outcome, terminal, write};
use super::{project, server};
use crate::event::plain;
use crate::execute::{self, BuildContext};
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
    if !args.failed && server::is_one(&args.image, global) {
        return server::enter(&args.image, Vec::new(), on_terminal, global);
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
    let Ready { context, id, sources, .. } = prepare(&args.image, false, &args.how, global, style)?;
    let watched = build::interruptible(execute::watch(&context, id, |bytes| write(Stream::Output, bytes)))?;
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
    let Ready { context, id, disks, sources } = prepare(name, failed, how, global, style)?;
    let exec = Exec { command, terminal: terminal(on_terminal) };
    let mut raw = None;
    let enter = || {
        raw = on_terminal.then(Raw::enter);
        listen(on_terminal)
    };
    let ended = build::interruptible(execute::interact(&context, id, disks, exec, enter, write));
    drop(raw);
    match ended?.ok_or_else(stopped)? {
        Ok(ended) => outcome(ended),
        Err(failure) => Err(Error::Build(Box::new(sources), vec![*failure])),
    }
}

/// A state that is there, and where its machine can be started.
struct Ready {
    context: BuildContext<Host>,
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
    let Made { context, sources } = build::states(loaded, graph, &[id], how, style, why)?;
    Ok(Ready { context, id, disks, sources })
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

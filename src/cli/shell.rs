//! `vimg shell`, `vimg run` and `vimg console`: use a machine that vimg throws
//! away afterwards.

use std::io::IsTerminal;

use vimg_agent::protocol::{Exec, Stream};
use vimg_lang::Sources;

use super::build::{self, How, Made};
use super::global::Global;
use super::interrupt::{interruptible, stopped};
use super::output::{Error, Outcome};
use super::terminal::{Raw, listen, outcome, terminal, write};
use super::{project, server};
use crate::event::{Event, plain};
use crate::execute::{self, BuildContext, Door, FailedLayer};
use crate::graph::{Graph, NodeId, Work};
use crate::provider::host::Host;
use crate::report::Style;
use crate::store::{ProjectFiles, Store};

/// Open a shell in an image's machine
///
/// vimg first builds what is missing of the image. The machine is a fork that is
/// thrown away, and the image stays as it is. The shell of a server runs in the
/// server itself.
#[derive(Debug, clap::Args)]
pub(super) struct ShellArgs {
    /// An image, one of its layers, or a running server
    #[arg(value_name = "IMAGE[@LAYER]")]
    image: String,
    /// Open the shell in the machine of a failed layer, as the failed step left it
    #[arg(long)]
    failed: bool,
    #[command(flatten)]
    how: How,
}

/// Run a command in an image's machine
///
/// vimg first builds what is missing of the image. The machine is a fork that is
/// thrown away, and the image stays as it is. Input, output and exit code are
/// those of the command. If a signal kills it, the exit code is 128 plus the
/// number of the signal.
#[derive(Debug, clap::Args)]
pub(super) struct RunArgs {
    /// An image, or one of its layers
    #[arg(value_name = "IMAGE[@LAYER]")]
    image: String,
    /// Give the command a terminal
    #[arg(short, long)]
    terminal: bool,
    /// Run the command on the disk only, without booting the machine
    ///
    /// No service runs then, and there is no network. What the command writes is
    /// thrown away, too.
    #[arg(long, visible_alias = "read-only")]
    no_boot: bool,
    #[command(flatten)]
    how: How,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// Boot an image's machine and show its serial console
///
/// vimg first builds what is missing of the image. The console shows the boot, and
/// then root's shell. All keys go to the machine, Ctrl-C too; Ctrl-] leaves. The
/// machine is then thrown away, and the image stays as it is. If standard input is
/// no terminal, vimg only shows the console, until the machine switches off.
#[derive(Debug, clap::Args)]
pub(super) struct ConsoleArgs {
    /// An image, or one of its layers
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
    let into = if args.failed { Target::Failed } else { Target::Machine };
    let visit = Visit { name: &args.image, into, command: Vec::new(), on_terminal };
    enter(visit, &args.how, global, style)
}

pub(super) fn run(args: &RunArgs, global: &Global, style: Style) -> Outcome {
    let command = args.command.clone();
    let into = if args.no_boot { Target::Disk } else { Target::Machine };
    let visit = Visit { name: &args.image, into, command, on_terminal: args.terminal };
    enter(visit, &args.how, global, style)
}

pub(super) fn console(args: &ConsoleArgs, global: &Global, style: Style) -> Outcome {
    let Ready { context, id, sources, .. } = prepare(&args.image, Target::Machine, &args.how, global, style)?;
    let on_terminal = std::io::stdin().is_terminal();
    let text = match on_terminal {
        true => "leave with Ctrl-]; all other keys go to the machine, where root is logged in".to_owned(),
        false => "leave with Ctrl-C; standard input is no terminal, so the machine gets no keys".to_owned(),
    };
    (context.sink)(Event::Notice { text });
    let mut raw = None;
    let keys = || {
        raw = on_terminal.then(Raw::enter);
        // A serial console knows nothing of the size of a terminal.
        on_terminal.then(|| listen(false))
    };
    let watched = interruptible(execute::watch(&context, id, keys, |bytes| write(Stream::Output, bytes)));
    if raw.is_some() {
        write(Stream::Output, b"\r\n");
    }
    drop(raw);
    match watched?.ok_or_else(stopped)? {
        Ok(()) => Ok(()),
        Err(failure) => Err(Error::Build(Box::new(sources), vec![*failure])),
    }
}

/// Where a command runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Target {
    /// The booted machine.
    Machine,
    /// The booted machine, as a failed layer left it.
    Failed,
    /// The disk only.
    Disk,
}

/// A request to run a command, or a shell, in a machine.
struct Visit<'a> {
    name: &'a str,
    into: Target,
    command: Vec<String>,
    on_terminal: bool,
}

fn enter(visit: Visit, how: &How, global: &Global, style: Style) -> Outcome {
    let Visit { name, into, command, on_terminal } = visit;
    let Ready { context, id, door, sources } = prepare(name, into, how, global, style)?;
    let exec = Exec { command, terminal: terminal(on_terminal) };
    let mut raw = None;
    let enter = || {
        raw = on_terminal.then(Raw::enter);
        listen(on_terminal)
    };
    let ended = interruptible(execute::interact(&context, id, door, exec, enter, write));
    drop(raw);
    match ended?.ok_or_else(stopped)? {
        Ok(ended) => outcome(ended),
        Err(failure) => Err(Error::Build(Box::new(sources), vec![*failure])),
    }
}

/// A state that exists, with the context in which its machine can start.
struct Ready {
    context: BuildContext<Host>,
    id: NodeId,
    door: Door,
    sources: Sources,
}

/// Builds a state, or finds what a failed layer left of it.
fn prepare(name: &str, into: Target, how: &How, global: &Global, style: Style) -> Result<Ready, Error> {
    let mut loaded = project::load(global, &project::only([&name.to_owned()]))?;
    let graph = project::graph(&mut loaded)?;
    let mut id = project::machine(&graph, name)?;
    let (mut door, mut why) = (Door::Machine, None);
    match into {
        Target::Machine => {}
        Target::Failed => {
            let (below, layer, what) = find_failed(&graph, id, &loaded.store, &loaded.notes)?;
            (id, door, why) = (below, Door::Failed(layer), Some(what));
        }
        Target::Disk => {
            // An imported disk has no kernel for an appliance.
            if matches!(graph.node(graph.chain(id)[0]).work, Work::Import { .. }) {
                let help = "leave out --no-boot: the machine can run the command when it is booted";
                let message = format!("`{name}` stands on an imported disk, which has no appliance");
                return Err(Error::Message(message, Some(help.into()), 2));
            }
            door = Door::Disk;
        }
    }
    let Made { context, sources } = build::states(loaded, graph, &[id], how, style, why)?;
    Ok(Ready { context, id, door, sources })
}

/// Finds a failed layer of a chain. Returns the state below it, what it left, and
/// why it failed.
fn find_failed(
    graph: &Graph,
    id: NodeId,
    store: &Store,
    notes: &ProjectFiles,
) -> Result<(NodeId, FailedLayer, String), Error> {
    let name = &graph.node(id).name;
    for id in graph.chain(id) {
        let node = graph.node(id);
        let (Some(parent), Some((disk, failed))) = (node.parent(), notes.failed(&node.name)) else {
            continue;
        };
        let Some(mut chain) = store.chain_of(&failed.on) else { continue };
        let below = &graph.node(parent).key;
        let there = store.has(below) && store.record(below).is_some_and(|r| (*below, r.id) == failed.below);
        if there && !store.has(&node.key) {
            let why = format!("{}: {}", node.name, plain(&failed.why));
            chain.push(disk);
            return Ok((parent, FailedLayer { name: node.name.clone(), chain }, why));
        }
    }
    let help = "vimg keeps the disk of a failed layer until the layer is built, something below it changes, or \
                `vimg store gc` removes it";
    Err(Error::Message(format!("there is no disk of a failed layer of {name}"), Some(help.into()), 1))
}

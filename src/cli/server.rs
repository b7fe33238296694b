//! `vimg up` and what follows it: machines that go on running.

use std::path::PathBuf;
use std::sync::Arc;

use serde_json::json;
use vimg_agent::protocol::{AGENT, Exec};

use super::build::{self, How, Made, stopped};
use super::global::Global;
use super::output::{Error, Outcome, print, print_foreign, print_json};
use super::{project, terminal};
use crate::event::Event;
use crate::execute::server::{self, Came, ServerHome, ServerRecord};
use crate::graph::{Difference, ServerPlan};
use crate::host::keeper;
use crate::host::network::Access;
use crate::provider::Lines;
use crate::provider::qemu::{Qemu, sha256_of};
use crate::report::Style;

/// Start a server of the recipe, and leave it running
///
/// It forks its image's machine; what is missing of the image is built first.
/// One that was switched off boots from its own disk.
#[derive(Debug, clap::Args)]
pub(super) struct UpArgs {
    /// A server of the recipe
    server: String,
    #[command(flatten)]
    how: How,
}

/// Bring a running server to what the recipe says
///
/// Only what differs is done: what is gone from the recipe is taken back, what
/// is new or changed is applied. If that fails, the server boots from its disk
/// as it was before.
#[derive(Debug, clap::Args)]
pub(super) struct ApplyArgs {
    /// A server of the recipe
    server: String,
    /// Only say what would be done
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    how: How,
}

/// List the servers that were started
#[derive(Debug, clap::Args)]
pub(super) struct PsArgs {}

/// Show what a server's serial console said
#[derive(Debug, clap::Args)]
pub(super) struct LogsArgs {
    /// A server that was started
    server: String,
}

/// Run a command in a server
///
/// Input, output and exit code are those of the command; one that a signal
/// kills gives 128 and the signal's number.
#[derive(Debug, clap::Args)]
pub(super) struct ExecArgs {
    /// A server that runs
    server: String,
    /// Give the command a terminal
    #[arg(short, long)]
    terminal: bool,
    /// Run an operation of the machine's configurations
    ///
    /// What follows `--` are its arguments.
    #[arg(long, value_name = "NAME")]
    operation: Option<String>,
    /// The command and its arguments
    #[arg(last = true, required_unless_present = "operation", value_name = "COMMAND")]
    command: Vec<String>,
}

/// Switch a server off in order
///
/// Its disk stays, and `vimg up` boots it again. One that is removed runs its
/// `decommission` hooks first; if they fail it stays.
#[derive(Debug, clap::Args)]
pub(super) struct DownArgs {
    /// A server that was started
    server: String,
    /// Do not ask the machine, and run none of its hooks
    #[arg(long)]
    force: bool,
    /// Forget it, and its disk
    #[arg(long)]
    remove: bool,
}

/// Switch a server off in order and boot it again
#[derive(Debug, clap::Args)]
pub(super) struct RestartArgs {
    /// A server that was started
    server: String,
    #[command(flatten)]
    how: How,
}

/// Write a server's disk, as it is now, to a file
///
/// The file is a qcow2 disk that stands alone. What a recipe needs to start an
/// image from it is printed. The server goes on.
#[derive(Debug, clap::Args)]
pub(super) struct SaveArgs {
    /// A server that was started
    server: String,
    /// Where to
    #[arg(value_name = "FILE")]
    to: PathBuf,
}

fn message(server: &str, why: impl std::fmt::Display, help: Option<String>) -> Error {
    Error::Message(format!("server `{server}`: {why}"), help, 1)
}

/// The project's servers, and what finds them again.
struct Yard {
    dir: PathBuf,
    qemu: Qemu,
}

impl Yard {
    fn open(global: &Global) -> Result<Self, Error> {
        let opened = project::open(global)?;
        let quiet: Lines = Arc::new(|_: &str| {});
        let qemu = Qemu::new(None, opened.store.root(), Access::default(), quiet);
        Ok(Self { dir: opened.store.servers(opened.project.root()), qemu })
    }

    /// Where a server is that was started.
    fn find(&self, server: &str) -> Result<PathBuf, Error> {
        let dir = self.dir.join(server);
        // A name that no recipe can have leads elsewhere.
        if vimg_lang::value::is_name(server) && server::known(&dir).is_some() {
            return Ok(dir);
        }
        let help = "`vimg ps` lists those that were".to_owned();
        Err(message(server, "it was never started here", Some(help)))
    }

    /// The same, and nobody else is at work with it.
    fn take(&self, server: &str) -> Result<ServerHome, Error> {
        ServerHome::take(&self.find(server)?).map_err(|why| message(server, why, None))
    }
}

/// A server of the recipe, and its image's states.
struct Planned {
    made: Made,
    plan: ServerPlan,
    home: ServerHome,
}

fn planned(name: &str, how: &How, global: &Global, style: Style, build: bool) -> Result<Planned, Error> {
    let mut loaded = project::load(global)?;
    let graph = project::graph(&mut loaded)?;
    let Some(plan) = ServerPlan::new(&graph, &loaded.model, &loaded.project, name) else {
        let names = loaded.model.servers.iter().map(|s| s.name.as_str());
        let diagnostic = vimg_lang::Diagnostic::global(
            vimg_lang::Code::UnknownImage,
            format!("the recipe has no server `{name}`"),
        )
        .suggest(name, names);
        let help = diagnostic.help.or_else(|| Some("declare it with `server`".into()));
        return Err(Error::Message(diagnostic.message, help, 2));
    };
    let plan = plan.map_err(|errors| project::unreadable(&mut loaded, errors))?;
    let dir = loaded.store.servers(loaded.project.root()).join(name);
    let home = ServerHome::take(&dir).map_err(|why| message(name, why, None))?;
    let states = if build && server::known(&dir).is_none() { vec![plan.image] } else { Vec::new() };
    let made = build::states(loaded, graph, &states, how, style, None)?;
    Ok(Planned { made, plan, home })
}

pub(super) fn up(args: &UpArgs, global: &Global, style: Style) -> Outcome {
    let Planned { made, plan, home } = planned(&args.server, &args.how, global, style, true)?;
    let Made { context, sources } = made;
    let start = std::time::Instant::now();
    let came = build::interruptible(server::up(&context, &plan, &home))?.ok_or_else(stopped)?;
    let came = came.map_err(|failure| Error::Build(Box::new(sources), vec![*failure]))?;
    let how = match came {
        Came::Running => "runs already".to_owned(),
        Came::Back => format!("is back after {:.1} s", start.elapsed().as_secs_f64()),
        Came::New => format!("is up after {:.1} s", start.elapsed().as_secs_f64()),
    };
    (context.sink)(Event::Notice { text: format!("{} {how}{}", plan.name, leads(&plan)) });
    Ok(())
}

fn leads(plan: &ServerPlan) -> String {
    let lead = |f: &vimg_lang::model::Forward| format!("{}:{} -> {}", f.address, f.host, f.guest);
    let all: Vec<String> = plan.forwards.iter().map(lead).collect();
    if all.is_empty() { String::new() } else { format!(", {}", all.join(", ")) }
}

pub(super) fn apply(args: &ApplyArgs, global: &Global, style: Style) -> Outcome {
    let Planned { made, plan, home } = planned(&args.server, &args.how, global, style, false)?;
    let Made { context, sources } = made;
    if args.dry_run {
        let difference = server::difference(&plan, &home).map_err(|why| message(&plan.name, why, None))?;
        return print(&told(&plan, &difference));
    }
    let applied = build::interruptible(server::apply(&context, &plan, &home))?.ok_or_else(stopped)?;
    let difference = applied.map_err(|failure| Error::Build(Box::new(sources), vec![*failure]))?;
    print(&told(&plan, &difference))
}

/// A line for each part that is taken back or applied.
fn told(plan: &ServerPlan, difference: &Difference) -> String {
    let mut out = String::new();
    for id in &difference.reverts {
        out.push_str(&format!("revert {id}\n"));
    }
    for place in &difference.apply {
        out.push_str(&format!("apply  {}\n", plan.wanted[*place].id));
    }
    if out.is_empty() { "nothing to apply\n".into() } else { out }
}

pub(super) fn ps(global: &Global, style: Style) -> Outcome {
    let Yard { dir, qemu } = Yard::open(global)?;
    let entries = std::fs::read_dir(&dir).into_iter().flatten().flatten();
    let mut found: Vec<(String, ServerRecord, bool)> = Vec::new();
    for entry in entries {
        let Some(record) = server::known(&entry.path()) else { continue };
        let runs = build::interruptible(server::runs(&qemu, &entry.path()))?.ok_or_else(stopped)?;
        found.push((entry.file_name().to_string_lossy().into_owned(), record, runs));
    }
    found.sort_by(|a, b| a.0.cmp(&b.0));
    let state = |runs: bool| if runs { "running" } else { "off" };
    let ports = |record: &ServerRecord| -> Vec<String> {
        record.forwards.iter().map(|(address, host, guest)| format!("{address}:{host} -> {guest}")).collect()
    };
    if style.json {
        let servers: Vec<_> = found
            .iter()
            .map(|(name, record, runs)| {
                json!({
                    "server": name, "state": state(*runs), "image": record.image, "since": record.since,
                    "forwards": ports(record),
                })
            })
            .collect();
        return print_json(&json!({ "servers": servers }));
    }
    if found.is_empty() {
        return print("no server was started here\n");
    }
    let width = found.iter().map(|(name, ..)| name.chars().count()).max().unwrap_or(0).max(6);
    let mut out = format!("{:width$}  state    image\n", "server");
    for (name, record, runs) in &found {
        let line =
            format!("{name:width$}  {:7}  {}  {}", state(*runs), record.image, ports(record).join(", "));
        out.push_str(&format!("{}\n", line.trim_end()));
    }
    print(&out)
}

pub(super) fn logs(args: &LogsArgs, global: &Global) -> Outcome {
    let text = keeper::console(&Yard::open(global)?.find(&args.server)?);
    let text = text.map_err(|e| message(&args.server, format!("its console's log: {e}"), None))?;
    print_foreign(&String::from_utf8_lossy(&text))
}

pub(super) fn exec(args: &ExecArgs, global: &Global) -> Outcome {
    let mut command = args.command.clone();
    if let Some(name) = &args.operation {
        let operation = [AGENT.to_owned(), "operation".to_owned(), name.clone()];
        command.splice(0..0, operation);
    }
    enter(&args.server, command, args.terminal, global)
}

/// Whether there is a server of this name that was started.
pub(super) fn is_one(name: &str, global: &Global) -> bool {
    Yard::open(global).is_ok_and(|yard| yard.find(name).is_ok())
}

/// Runs a command, or a shell, in a server.
pub(super) fn enter(server: &str, command: Vec<String>, on_terminal: bool, global: &Global) -> Outcome {
    let yard = Yard::open(global)?;
    let home = yard.take(server)?;
    let exec = Exec { command, terminal: terminal::terminal(on_terminal) };
    let mut raw = None;
    let listen = || {
        raw = on_terminal.then(terminal::Raw::enter);
        terminal::listen(on_terminal)
    };
    let ended = build::interruptible(server::exec(&yard.qemu, &home, exec, listen, terminal::write));
    drop(raw);
    match ended?.ok_or_else(stopped)? {
        Ok(ended) => terminal::outcome(ended),
        Err(why) => Err(message(server, why, Some(format!("`vimg up {server}` boots what is off")))),
    }
}

pub(super) fn down(args: &DownArgs, global: &Global) -> Outcome {
    let yard = Yard::open(global)?;
    let home = yard.take(&args.server)?;
    let down = server::down(&yard.qemu, &home, args.force, args.remove);
    let down = build::interruptible(down)?.ok_or_else(stopped)?;
    let help = "`--force` does not ask the machine".to_owned();
    let ran = down.map_err(|why| message(&args.server, why, Some(help)))?;
    let what = if ran { "is off" } else { "was off" };
    let disk = if args.remove { ", and its disk is gone" } else { "" };
    print(&format!("{} {what}{disk}\n", args.server))
}

pub(super) fn restart(args: &RestartArgs, global: &Global, style: Style) -> Outcome {
    let down_args = DownArgs { server: args.server.clone(), force: false, remove: false };
    down(&down_args, global)?;
    let Planned { made, plan, home } = planned(&args.server, &args.how, global, style, false)?;
    let came = build::interruptible(server::up(&made.context, &plan, &home))?.ok_or_else(stopped)?;
    came.map_err(|failure| Error::Build(Box::new(made.sources), vec![*failure]))?;
    print(&format!("{} is back{}\n", plan.name, leads(&plan)))
}

pub(super) fn save(args: &SaveArgs, global: &Global) -> Outcome {
    let yard = Yard::open(global)?;
    let home = yard.take(&args.server)?;
    if args.to.exists() {
        return Err(message(&args.server, format!("{} is there already", args.to.display()), None));
    }
    let to = std::path::absolute(&args.to).unwrap_or_else(|_| args.to.clone());
    let saved = build::interruptible(server::save(&yard.qemu, &home, &to))?.ok_or_else(stopped)?;
    saved.map_err(|why| message(&args.server, why, None))?;
    let sum = sha256_of(&to).map_err(|e| message(&args.server, format!("{}: {e}", to.display()), None))?;
    let name = args.to.display();
    print(&format!(
        "{name} holds the disk of {}. An image of it:\n  disk \"{name}\" sha256=\"{sum}\"\n",
        args.server
    ))
}

/// Stays with a server. See [`keeper::keep`].
pub(super) fn keep() -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.and_then(|runtime| runtime.block_on(keeper::keep())).map_err(|e| Error::host(e.to_string()))
}

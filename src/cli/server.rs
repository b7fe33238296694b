//! `vimg up` and the other commands for servers.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::json;
use vimg_agent::protocol::{AGENT, Exec};

use super::build::{self, How, Made};
use super::global::Global;
use super::interrupt::{interruptible, stopped};
use super::output::{Error, FULL, Outcome, USAGE, print, print_foreign, print_json};
use super::{project, settings, terminal};
use crate::disk::QemuDisks;
use crate::disk::image::sha256_of;
use crate::event::Event;
use crate::execute::server::{self, Came, ServerRecord};
use crate::graph::ServerPlan;
use crate::host::Lines;
use crate::host::keeper;
use crate::host::network::Access;
use crate::provider::qemu::Qemu;
use crate::report::{Style, duration};
use crate::store::ServerHome;

/// Start a server of the recipe, and leave it running
///
/// vimg first builds what is missing of the image, and forks its machine. A
/// server that was switched off boots from its own disk.
#[derive(Debug, clap::Args)]
pub(super) struct UpArgs {
    /// A server of the recipe
    server: String,
    #[command(flatten)]
    how: How,
}

/// List the project's servers that were started
#[derive(Debug, clap::Args)]
pub(super) struct PsArgs {}

/// Print the serial console of a server
#[derive(Debug, clap::Args)]
pub(super) struct LogsArgs {
    /// A server that was started
    server: String,
}

/// Run a command in a server
///
/// Input, output and exit code are those of the command. If a signal kills it,
/// the exit code is 128 plus the number of the signal.
#[derive(Debug, clap::Args)]
pub(super) struct ExecArgs {
    /// A running server
    server: String,
    /// Give the command a terminal
    #[arg(short, long)]
    terminal: bool,
    /// Run an operation that the recipe defines
    ///
    /// The arguments after `--` are passed to it.
    #[arg(long, value_name = "NAME")]
    operation: Option<String>,
    /// The command and its arguments
    #[arg(last = true, required_unless_present = "operation", value_name = "COMMAND")]
    command: Vec<String>,
}

/// Shut a server down
///
/// Its disk stays, and `vimg up` boots it again. With `--remove`, the server
/// first runs its `decommission` hooks. If they fail, it is not removed.
#[derive(Debug, clap::Args)]
pub(super) struct DownArgs {
    /// A server that was started
    server: String,
    /// End the machine without shutting it down, and run no hooks
    #[arg(long)]
    force: bool,
    /// Remove the server and delete its disk
    #[arg(long)]
    remove: bool,
}

/// Shut a server down and boot it again
#[derive(Debug, clap::Args)]
pub(super) struct RestartArgs {
    /// A server that was started
    server: String,
    #[command(flatten)]
    how: How,
}

/// Write a server's current disk to a file
///
/// The file is a qcow2 disk that needs no other file. vimg prints the line with
/// which an image in a recipe can start from it. The server keeps running.
#[derive(Debug, clap::Args)]
pub(super) struct SaveArgs {
    /// A server that was started
    server: String,
    /// File to write; it must not exist
    #[arg(value_name = "FILE")]
    to: PathBuf,
}

pub(super) fn message(server: &str, why: impl std::fmt::Display, help: Option<String>) -> Error {
    Error::Message(format!("server `{server}`: {why}"), help, 1)
}

/// The error for a server that was never started.
pub(super) fn unknown(server: &str) -> Error {
    let help = "`vimg ps` lists the servers that were started";
    Error::Message(format!("server `{server}`: it was never started here"), Some(help.into()), USAGE)
}

/// The directory of the project's servers, and the provider that finds their
/// machines.
struct Yard {
    /// The project's root.
    root: PathBuf,
    dir: PathBuf,
    qemu: Qemu,
    disks: QemuDisks,
}

impl Yard {
    fn open(global: &Global) -> Result<Self, Error> {
        let opened = project::open(global)?;
        let quiet: Lines = Arc::new(|_: &str| {});
        let dirs = settings::dirs(&opened.store);
        let disks = QemuDisks::new(dirs.probes.clone());
        let qemu = Qemu::new(None, dirs, Access::default(), quiet);
        let root = opened.project.root().to_owned();
        Ok(Self { dir: opened.store.servers(&root), root, qemu, disks })
    }

    /// Returns the directory of a server that was started.
    fn find(&self, server: &str) -> Result<PathBuf, Error> {
        let dir = self.dir.join(server);
        // An invalid name, such as `..`, would lead out of the directory.
        if vimg_lang::value::is_name(server) && server::known(&dir).is_some() {
            return Ok(dir);
        }
        Err(unknown(server))
    }

    /// Locks the directory of a server, so that no other command works with it.
    fn take(&self, server: &str) -> Result<ServerHome, Error> {
        ServerHome::take(&self.find(server)?).map_err(|why| message(server, why, None))
    }
}

/// A server of the recipe, with the states of its image and its locked directory.
pub(super) struct Planned {
    pub(super) made: Made,
    pub(super) plan: ServerPlan,
    pub(super) home: ServerHome,
}

pub(super) fn planned(
    name: &str,
    how: &How,
    global: &Global,
    style: Style,
    build: bool,
) -> Result<Planned, Error> {
    let mut loaded = project::load(global, &project::only([&name.to_owned()]))?;
    let graph = project::graph(&mut loaded)?;
    let Some(plan) = ServerPlan::new(&graph, &loaded.model, &loaded.project, name) else {
        let names = loaded.model.servers.iter().map(|s| s.name.as_str());
        let diagnostic = vimg_lang::Diagnostic::global(
            vimg_lang::Code::UnknownImage,
            format!("the recipe has no server `{name}`"),
        )
        .suggest(name, names);
        let help = diagnostic.help.or_else(|| Some("declare it with `server`".into()));
        return Err(Error::Message(diagnostic.message, help, USAGE));
    };
    let plan = plan.map_err(|errors| project::unreadable(&mut loaded, errors))?;
    let dir = loaded.store.servers(loaded.project.root()).join(name);
    if build && !dir.exists() {
        // A build may take long, and an earlier start may not hold the ports.
        let free = interruptible(server::free_ports(&plan))?.ok_or_else(stopped)?;
        free.map_err(|failure| Error::Build(Box::new(std::mem::take(&mut loaded.sources)), vec![*failure]))?;
    }
    let home = ServerHome::take(&dir).map_err(|why| message(name, why, None))?;
    let states = if build && server::known(&dir).is_none() { vec![plan.image] } else { Vec::new() };
    let made = build::states(loaded, graph, &states, how, style, None)?;
    Ok(Planned { made, plan, home })
}

pub(super) fn up(args: &UpArgs, global: &Global, style: Style) -> Outcome {
    let Planned { made, plan, home } = planned(&args.server, &args.how, global, style, true)?;
    let Made { context, sources } = made;
    let start = std::time::Instant::now();
    let came = interruptible(server::up(&context, &plan, &home))?.ok_or_else(stopped)?;
    let came = came.map_err(|failure| Error::Build(Box::new(sources), vec![*failure]))?;
    let leads = leads(&plan, &home);
    let how = match came {
        Came::Running => "is already running".to_owned(),
        Came::Back => format!("is back after {}", duration(start.elapsed().as_secs_f64())),
        Came::New => format!("is up after {}", duration(start.elapsed().as_secs_f64())),
    };
    (context.sink)(Event::Notice { text: format!("{} {how}{leads}", plan.name) });
    Ok(())
}

/// Lists the ports that are forwarded into a server. The recipe may have others.
fn leads(plan: &ServerPlan, home: &ServerHome) -> String {
    let Some(record) = server::known(home.dir()) else { return String::new() };
    let now = ports(&record);
    let lead = |f: &vimg_lang::model::Forward| port(&f.address, f.host, f.guest);
    let wanted: Vec<String> = plan.forwards.iter().map(lead).collect();
    let leads = if now.is_empty() { String::new() } else { format!(", {}", now.join(", ")) };
    match now == wanted {
        true => leads,
        false => format!("{leads}; `vimg apply {}` forwards the ports of the recipe", plan.name),
    }
}

fn port(address: &str, host: u16, guest: u16) -> String {
    format!("{address}:{host} -> {guest}")
}

fn ports(record: &ServerRecord) -> Vec<String> {
    record.forwards.iter().map(|(address, host, guest)| port(address, *host, *guest)).collect()
}

pub(super) fn ps(global: &Global, style: Style) -> Outcome {
    let Yard { dir, qemu, .. } = Yard::open(global)?;
    let entries = std::fs::read_dir(&dir).into_iter().flatten().flatten();
    let mut found: Vec<(String, ServerRecord, bool)> = Vec::new();
    for entry in entries {
        let Some(record) = server::known(&entry.path()) else { continue };
        let runs = interruptible(server::runs(&qemu, &entry.path()))?.ok_or_else(stopped)?;
        found.push((entry.file_name().to_string_lossy().into_owned(), record, runs));
    }
    found.sort_by(|a, b| a.0.cmp(&b.0));
    let state = |runs: bool| if runs { "running" } else { "off" };
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
    let text = text.map_err(|e| message(&args.server, format!("can't read its console log: {e}"), None))?;
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

/// Whether a server of this name was started.
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
    let ended = interruptible(server::exec(&yard.qemu, &home, exec, listen, terminal::write));
    drop(raw);
    match ended?.ok_or_else(stopped)? {
        Ok(ended) => terminal::outcome(ended),
        Err(why) => Err(message(server, why, Some(format!("if it is off, `vimg up {server}` boots it")))),
    }
}

pub(super) fn down(args: &DownArgs, global: &Global) -> Outcome {
    let yard = Yard::open(global)?;
    let home = yard.take(&args.server)?;
    let down = server::down(&yard.qemu, &home, args.force, args.remove);
    let down = interruptible(down)?.ok_or_else(stopped)?;
    let help = "`--force` ends it without shutting it down".to_owned();
    let ran = down.map_err(|why| message(&args.server, why, Some(help)))?;
    let what = if ran { "is off" } else { "was already off" };
    let disk = if args.remove { ", and its disk is gone" } else { "" };
    print(&format!("{} {what}{disk}\n", args.server))
}

pub(super) fn restart(args: &RestartArgs, global: &Global, style: Style) -> Outcome {
    let down_args = DownArgs { server: args.server.clone(), force: false, remove: false };
    down(&down_args, global)?;
    let Planned { made, plan, home } = planned(&args.server, &args.how, global, style, false)?;
    let came = interruptible(server::up(&made.context, &plan, &home))?.ok_or_else(stopped)?;
    came.map_err(|failure| Error::Build(Box::new(made.sources), vec![*failure]))?;
    print(&format!("{} is back{}\n", plan.name, leads(&plan, &home)))
}

pub(super) fn save(args: &SaveArgs, global: &Global) -> Outcome {
    let yard = Yard::open(global)?;
    let home = yard.take(&args.server)?;
    if args.to.exists() {
        return Err(message(&args.server, format!("{} already exists", args.to.display()), None));
    }
    let to = std::path::absolute(&args.to).unwrap_or_else(|_| args.to.clone());
    let saved = interruptible(server::save(&yard.qemu, &yard.disks, &home, &to))?.ok_or_else(stopped)?;
    saved.map_err(|e| {
        let full = e.is_full.then(|| FULL.to_owned());
        message(&args.server, &e, full.or(e.help.clone()))
    })?;
    let sum = sha256_of(&to).map_err(|e| message(&args.server, format!("{}: {e}", to.display()), None))?;
    let (name, how) = (args.to.display(), pasted(&yard.root, &to, &sum));
    print(&format!("{name} is the disk of {}. {how}\n", args.server))
}

/// Says how an image starts from a disk. A recipe can name only files of its
/// project.
fn pasted(root: &Path, disk: &Path, sum: &str) -> String {
    let real = disk.canonicalize();
    let below = real.as_deref().unwrap_or(disk).strip_prefix(root).ok().and_then(Path::to_str);
    let line = |path: &str| format!("disk {} sha256=\"{sum}\"", vimg_lang::quoted(path));
    match below {
        Some(path) => format!("To start an image from it:\n  {}", line(&format!("//{path}"))),
        None => {
            let name = disk.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
            format!(
                "It is not in the project: copy it there to start an image from it:\n  cp {} {}\n  {}",
                disk.display(),
                root.display(),
                line(&format!("//{name}"))
            )
        }
    }
}

/// Runs the companion process of a server: see [`keeper::keep`].
pub(super) fn keep() -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.and_then(|runtime| runtime.block_on(keeper::keep())).map_err(|e| Error::host(e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The line that `save` prints works in a recipe of the project.
    #[test]
    fn a_saved_disk_is_named_as_a_recipe_can_name_it() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        let sum = "0123456789abcdef".repeat(4);
        for path in ["saved.qcow2", "disks/my \"old\" one.qcow2"] {
            let disk = root.join(path);
            std::fs::create_dir_all(disk.parent().unwrap()).unwrap();
            std::fs::write(&disk, "disk").unwrap();
            let told = pasted(&root, &disk, &sum);
            let line = told.lines().nth(1).unwrap();
            let graph = crate::graph::Graph::of(&root, &format!("image \"golden\" {{ {line} }}\n"));
            assert!(graph.image("golden").is_some(), "{told}");
        }
        let told = pasted(&root.join("disks"), &root.join("saved.qcow2"), &sum);
        assert!(told.contains("copy it there") && told.contains("disk \"//saved.qcow2\""), "{told}");
    }
}

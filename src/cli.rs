//! The command line: the only module that reads arguments, environment and
//! terminal, and that knows exit codes. One file for each command.

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand, ValueEnum};

use crate::event::stripped;
use crate::execute::{Failure, FailureKind};
use crate::report::{Shown, Style, diagnostics_json, render};
use vimg_lang::model::SecretSource;
use vimg_lang::{Diagnostic, Sources};

mod build;
mod cache;
mod caching;
mod check;
mod consent;
mod diff;
mod doctor;
mod fmt;
mod graph;
mod init;
mod junit;
mod list;
mod log;
mod plan;
mod project;
mod server;
mod settings;
mod shell;
mod test;
mod why;

/// Build bootable virtual-machine images from recipes, incrementally.
///
/// A recipe declares images, and the layers of configuration that make them.
/// vimg boots what is there already, applies what is missing, and keeps each
/// state, so that the next build does only what changed.
#[derive(Debug, Parser)]
#[command(name = "vimg", version, max_term_width = 80, after_help = EXIT_CODES)]
struct Args {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

const EXIT_CODES: &str = "\
Exit codes: 0 done; 1 a node could not be built; 2 wrong usage; 3 mistakes in
a recipe; 4 the host lacks something; 5 the store can't be used; 130 stopped
by Ctrl-C.";

/// What every command takes.
#[derive(Debug, Clone, clap::Args)]
struct Global {
    /// The main recipe [default: `main.vimg` here or in a directory above]
    #[arg(short, long, global = true, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Set a parameter
    #[arg(long, global = true, value_name = "NAME=VALUE", value_parser = parse_set)]
    set: Vec<(String, String)>,
    /// Take parameters from a KDL file, a node for each
    #[arg(long, global = true, value_name = "FILE")]
    values: Option<PathBuf>,
    /// Where states are kept [default: `$XDG_CACHE_HOME/vimg`]
    #[arg(long, global = true, value_name = "DIR", env = "VIMG_STORE")]
    store: Option<PathBuf>,
    /// Allow everything the project asks for, for this run only; see
    /// `vimg trust`
    #[arg(long, global = true, env = "VIMG_TRUST", value_parser = clap::builder::FalseyValueParser::new())]
    trust: bool,
    /// Read a secret from a variable or a file: NAME=env:VARIABLE or
    /// NAME=file:PATH
    #[arg(long, global = true, value_name = "NAME=SOURCE", value_parser = parse_secret)]
    secret: Vec<(String, SecretSource)>,
    /// When to use colours
    #[arg(long, global = true, value_enum, default_value = "auto", value_name = "WHEN")]
    color: Colour,
    /// Output format
    #[arg(long, global = true, value_enum, default_value = "text", value_name = "FORMAT")]
    format: Format,
    /// Say only what went wrong
    #[arg(short, long, global = true)]
    quiet: bool,
    /// Show each line that programs print
    #[arg(short, long, global = true)]
    verbose: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Colour {
    Auto,
    Always,
    Never,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    Text,
    Json,
    /// Graphviz, for `graph`
    Dot,
    /// Mermaid, for `graph`
    Mermaid,
}

fn parse_set(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("write NAME=VALUE".into()),
    }
}

fn parse_secret(text: &str) -> Result<(String, SecretSource), String> {
    let parts = text.split_once('=').and_then(|(name, source)| Some((name, source.split_once(':')?)));
    match parts {
        Some((name, ("env", variable))) => Ok((name.to_owned(), SecretSource::Env(variable.to_owned()))),
        Some((name, ("file", path))) => Ok((name.to_owned(), SecretSource::File(path.to_owned()))),
        _ => Err("write NAME=env:VARIABLE or NAME=file:PATH".into()),
    }
}

#[derive(Debug, Subcommand)]
enum Command {
    Init(init::Args),
    Check(check::Args),
    Fmt(fmt::Args),
    Plan(plan::Args),
    Build(build::Args),
    Test(test::Args),
    Shell(shell::ShellArgs),
    Run(shell::RunArgs),
    Console(shell::ConsoleArgs),
    Diff(diff::Args),
    Up(server::UpArgs),
    Apply(server::ApplyArgs),
    Ps(server::PsArgs),
    Logs(server::LogsArgs),
    Exec(server::ExecArgs),
    Down(server::DownArgs),
    Restart(server::RestartArgs),
    Save(server::SaveArgs),
    /// Run a server's companion process (internal)
    #[command(hide = true)]
    Keep,
    Why(why::Args),
    Graph(graph::Args),
    Log(log::Args),
    List(list::Args),
    Doctor(doctor::Args),
    Trust(consent::Args),
    Cache(cache::Args),
    /// Print a completion script for a shell
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
}

/// Why a command failed.
enum Error {
    /// A sentence, what to do, and the exit code.
    Message(String, Option<String>, u8),
    /// Mistakes in recipes.
    Recipe(Box<Sources>, Vec<Diagnostic>),
    /// Nodes that could not be built.
    Build(Box<Sources>, Vec<Failure>),
    /// All was said already.
    Code(u8),
}

const RECIPE: u8 = 3;
const HOST: u8 = 4;
const STORE: u8 = 5;
const INTERRUPTED: u8 = 130;

impl Error {
    fn host(message: impl Into<String>) -> Self {
        Self::Message(message.into(), None, HOST)
    }
}

impl From<crate::store::StoreError> for Error {
    fn from(error: crate::store::StoreError) -> Self {
        let help = "--store DIR or VIMG_STORE names another place".to_owned();
        Self::Message(error.to_string(), Some(help), STORE)
    }
}

type Outcome = Result<(), Error>;

/// Runs the program.
pub fn main() -> ExitCode {
    // A reader that goes away (`vimg graph | head`) ends the program quietly
    // where it writes next; see `print`.
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { 2 } else { 0 });
        }
    };
    let style = style(&args.global);
    let result = run(&args.command, &args.global, style);
    crate::store::settle();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => ExitCode::from(report(&error, style)),
    }
}

fn run(command: &Command, global: &Global, style: Style) -> Outcome {
    if matches!(global.format, Format::Dot | Format::Mermaid) && !matches!(command, Command::Graph(_)) {
        return Err(Error::Message("only `vimg graph` has this format".into(), None, 2));
    }
    match command {
        Command::Init(args) => init::run(args),
        Command::Check(_) => check::run(global, style),
        Command::Fmt(args) => fmt::run(args, style),
        Command::Plan(args) => plan::run(args, global, style),
        Command::Build(args) => build::run(args, global, style),
        Command::Test(args) => test::run(args, global, style),
        Command::Shell(args) => shell::shell(args, global, style),
        Command::Run(args) => shell::run(args, global, style),
        Command::Console(args) => shell::console(args, global, style),
        Command::Diff(args) => diff::run(args, global, style),
        Command::Up(args) => server::up(args, global, style),
        Command::Apply(args) => server::apply(args, global, style),
        Command::Ps(_) => server::ps(global, style),
        Command::Logs(args) => server::logs(args, global),
        Command::Exec(args) => server::exec(args, global),
        Command::Down(args) => server::down(args, global),
        Command::Restart(args) => server::restart(args, global, style),
        Command::Save(args) => server::save(args, global),
        Command::Keep => server::keep(),
        Command::Why(args) => why::run(args, global, style),
        Command::Graph(_) => graph::run(global),
        Command::Log(args) => log::run(args, global),
        Command::List(_) => list::run(global, style),
        Command::Doctor(args) => doctor::run(args, global, style),
        Command::Trust(args) => consent::run(args, global, style),
        Command::Cache(args) => cache::run(args, global, style),
        Command::Completions { shell } => {
            let mut bytes = Vec::new();
            clap_complete::generate(*shell, &mut Args::command(), "vimg", &mut bytes);
            print(&String::from_utf8_lossy(&bytes))
        }
    }
}

fn style(global: &Global) -> Style {
    let set = |name: &str| std::env::var_os(name).is_some_and(|v| !v.is_empty());
    let colour = match global.color {
        Colour::Always => true,
        Colour::Never => false,
        Colour::Auto => {
            let dumb = std::env::var_os("TERM").is_some_and(|t| t == "dumb");
            std::io::stderr().is_terminal() && !set("NO_COLOR") && !dumb
        }
    };
    Style { colour, json: global.format == Format::Json, quiet: global.quiet, verbose: global.verbose }
}

/// Reads a recipe that is no file of a project: at most as much of it as vimg
/// reads, and nothing that blocks or never ends.
fn read_recipe(path: &std::path::Path) -> Result<String, Error> {
    use std::io::Read;
    use std::os::unix::fs::OpenOptionsExt;
    let fail = |why: String, help: &str| {
        Error::Message(format!("{}: {why}", path.display()), Some(help.to_owned()), RECIPE)
    };
    let nonblock = rustix::fs::OFlags::NONBLOCK.bits() as i32;
    let file = std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(nonblock)
        .open(path)
        .map_err(|e| fail(e.to_string(), "check the path and its permissions"))?;
    if !file.metadata().is_ok_and(|m| m.is_file()) {
        return Err(fail("this is not a file".into(), "name a file"));
    }
    let mut bytes = Vec::new();
    let limit = vimg_lang::MAX_RECIPE;
    file.take(limit as u64 + 1).read_to_end(&mut bytes).map_err(|e| fail(e.to_string(), "check the file"))?;
    if bytes.len() > limit {
        return Err(fail("it is too large".into(), &format!("recipes have at most {} KiB", limit >> 10)));
    }
    String::from_utf8(bytes).map_err(|_| fail("it is not UTF-8".into(), "save it as UTF-8"))
}

/// Prints to standard output. A pipe that was closed is no error.
fn print(text: &str) -> Outcome {
    match std::io::stdout().lock().write_all(text.as_bytes()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Error::host(format!("standard output: {e}")))
        }
        _ => Ok(()),
    }
}

/// Prints what a machine printed: as it is for a program, and without what
/// would move it for a terminal.
fn print_foreign(text: &str) -> Outcome {
    if std::io::stdout().is_terminal() { print(&stripped(text)) } else { print(text) }
}

fn print_json(value: &serde_json::Value) -> Outcome {
    print(&format!("{}\n", serde_json::to_string_pretty(value).unwrap_or_default()))
}

/// Says why a command failed; returns the exit code.
fn report(error: &Error, style: Style) -> u8 {
    let mut err = std::io::stderr().lock();
    match error {
        Error::Code(code) => *code,
        Error::Message(message, help, code) if style.json => {
            let error = serde_json::json!({ "message": message, "help": help });
            let _ = print_json(&serde_json::json!({ "error": error }));
            *code
        }
        Error::Message(message, help, code) => {
            let shown = Shown::plain(message).help(help.clone());
            let _ = write!(err, "{}", render(&shown, style));
            *code
        }
        Error::Recipe(sources, diagnostics) => {
            if style.json {
                let _ = print_json(&diagnostics_json(sources, diagnostics));
                return RECIPE;
            }
            for diagnostic in diagnostics {
                let _ = write!(err, "{}", render(&Shown::new(sources, diagnostic), style));
            }
            let n = diagnostics.len();
            let more = if n >= vimg_lang::MOST { " and possibly more" } else { "" };
            let _ = writeln!(err, "{n} {}{more} in the recipe", if n == 1 { "mistake" } else { "mistakes" });
            RECIPE
        }
        Error::Build(sources, failures) => {
            for failure in failures {
                let _ = write!(err, "{}", failure_text(sources, failure, style));
            }
            let kind = |kind| failures.iter().any(|f| f.kind == kind);
            if kind(FailureKind::Recipe) {
                1
            } else if kind(FailureKind::Store) {
                STORE
            } else {
                HOST
            }
        }
    }
}

/// A failed node: its output, then the place in the recipe.
fn failure_text(sources: &Sources, failure: &Failure, style: Style) -> String {
    let mut out = String::new();
    if !failure.tail.is_empty() {
        out.push_str(&format!("last output of {}:\n", failure.node));
        for line in &failure.tail {
            out.push_str(&format!("  | {line}\n"));
        }
    }
    let mut shown = Shown::plain(&failure.message).help(failure.help.clone());
    shown.place(sources, failure.span, "");
    if let Some((span, text)) = &failure.related {
        shown.also(sources, *span, text);
    }
    out.push_str(&render(&shown, style));
    if failure.log.is_some() {
        out.push_str(&format!("the whole log: vimg log {}\n", failure.node));
    }
    out
}

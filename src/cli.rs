//! The command line. Only this module reads arguments and variables, and knows
//! exit codes. Each command has one file.

use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::report::Style;
use global::{Format, Global, style};
use output::{Error, Outcome, report};

pub use output::failure_text;

mod global;
mod output;
mod interrupt;
mod read;
mod settings;
mod consent;
mod ci;
mod secrets;
mod caching;
mod junit;
mod project;
mod build;
mod keys;
mod cache;
mod check;
mod complete;
mod cp;
mod diff;
mod doctor;
mod fmt;
mod graph;
mod init;
mod list;
mod log;
mod plan;
mod terminal;
mod server;
mod apply;
mod shell;
mod store;
mod test;
mod trust;
mod why;

/// Build bootable virtual-machine images from recipes, incrementally
///
/// A recipe declares images and the layers of configuration that they consist
/// of. vimg stores the state after each layer, so the next build repeats only
/// what changed.
#[derive(Debug, Parser)]
#[command(name = "vimg", version, max_term_width = 80, after_help = EXIT_CODES)]
struct Args {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

const EXIT_CODES: &str = "\
Exit codes: 0 done; 1 a node could not be built, or something is not there; 2
wrong usage, such as an unknown image or server; 3 mistakes in a recipe; 4 the
host lacks something; 5 the store can't be used; 130 stopped by Ctrl-C.";

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
    Cp(cp::Args),
    Diff(diff::Args),
    Up(server::UpArgs),
    Apply(apply::Args),
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
    Trust(trust::Args),
    Store(store::Args),
    Cache(cache::Args),
    Completions(complete::Args),
    /// Complete a command line (internal)
    #[command(name = "__complete", hide = true)]
    Complete(complete::CompleteArgs),
}

/// Returns the definition of the command line, from which a test generates
/// `docs/reference/cli.md`.
pub fn grammar() -> clap::Command {
    Args::command()
}

/// Returns the definition without environment variables that are empty. CI
/// systems set a variable to an empty text when a job leaves it out.
fn without_empty_variables(command: clap::Command) -> clap::Command {
    let is_empty = |name: &std::ffi::OsStr| std::env::var_os(name).is_some_and(|value| value.is_empty());
    let command = command.mut_args(|argument| match argument.get_env().is_some_and(is_empty) {
        true => argument.env(None::<&'static str>),
        false => argument,
    });
    command.mut_subcommands(without_empty_variables)
}

/// Runs the program and returns its exit code.
pub fn main() -> ExitCode {
    // A closed pipe (`vimg graph | head`) is no error: see `print`.
    let parsed = without_empty_variables(Args::command()).try_get_matches();
    let args = match parsed.and_then(|matches| Args::from_arg_matches(&matches)) {
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
        return Err(Error::Message("only `vimg graph` supports `dot` and `mermaid`".into(), None, 2));
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
        Command::Cp(args) => cp::run(args, global, style),
        Command::Diff(args) => diff::run(args, global, style),
        Command::Up(args) => server::up(args, global, style),
        Command::Apply(args) => apply::run(args, global, style),
        Command::Ps(_) => server::ps(global, style),
        Command::Logs(args) => server::logs(args, global),
        Command::Exec(args) => server::exec(args, global),
        Command::Down(args) => server::down(args, global),
        Command::Restart(args) => server::restart(args, global, style),
        Command::Save(args) => server::save(args, global),
        Command::Keep => server::keep(),
        Command::Why(args) => why::run(args, global, style),
        Command::Graph(args) => graph::run(args, global, style),
        Command::Log(args) => log::run(args, global, style),
        Command::List(_) => list::run(global, style),
        Command::Doctor(args) => doctor::run(args, global, style),
        Command::Trust(args) => trust::run(args, global, style),
        Command::Store(args) => store::run(args, global, style),
        Command::Cache(args) => cache::run(args, global, style),
        Command::Completions(args) => complete::script(args, &mut Args::command()),
        Command::Complete(args) => complete::run(args, Args::command()),
    }
}

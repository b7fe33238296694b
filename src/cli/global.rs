//! Options of every command.

use std::io::IsTerminal;
use std::path::PathBuf;

use clap::ValueEnum;
use vimg_lang::model::SecretSource;

use crate::report::Style;

/// Options of every command.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct Global {
    /// The main recipe [default: `main.vimg` here or in a directory above]
    #[arg(short, long, global = true, value_name = "FILE")]
    pub(super) file: Option<PathBuf>,
    /// Set a parameter
    #[arg(long, global = true, value_name = "NAME=VALUE", value_parser = parse_set)]
    pub(super) set: Vec<(String, String)>,
    /// Read parameters from a KDL file, with one node for each
    #[arg(long, global = true, value_name = "FILE")]
    pub(super) values: Option<PathBuf>,
    /// Directory of the store [default: `$XDG_CACHE_HOME/vimg`]
    #[arg(long, global = true, value_name = "DIR", env = "VIMG_STORE")]
    pub(super) store: Option<PathBuf>,
    /// Allow everything the project asks for, for this run only; see
    /// `vimg trust`
    #[arg(long, global = true, env = "VIMG_TRUST", value_parser = clap::builder::FalseyValueParser::new())]
    pub(super) trust: bool,
    /// Read a secret from a variable or a file: NAME=env:VARIABLE or
    /// NAME=file:PATH
    #[arg(long, global = true, value_name = "NAME=SOURCE", value_parser = parse_secret)]
    pub(super) secret: Vec<(String, SecretSource)>,
    /// When to use colours
    #[arg(long, global = true, value_enum, default_value = "auto", value_name = "WHEN")]
    pub(super) color: Colour,
    /// Output format
    #[arg(long, global = true, value_enum, default_value = "text", value_name = "FORMAT")]
    pub(super) format: Format,
    /// Print only errors
    #[arg(short, long, global = true)]
    pub(super) quiet: bool,
    /// Print each phase and each line that programs print
    #[arg(short, long, global = true)]
    pub(super) verbose: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Colour {
    Auto,
    Always,
    Never,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Format {
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
        _ => Err("expected NAME=VALUE".into()),
    }
}

fn parse_secret(text: &str) -> Result<(String, SecretSource), String> {
    let parts = text.split_once('=').and_then(|(name, source)| Some((name, source.split_once(':')?)));
    match parts {
        Some((name, ("env", variable))) => Ok((name.to_owned(), SecretSource::Env(variable.to_owned()))),
        Some((name, ("file", path))) => Ok((name.to_owned(), SecretSource::File(path.to_owned()))),
        _ => Err("expected NAME=env:VARIABLE or NAME=file:PATH".into()),
    }
}

/// Derives the style of all output from the options and the environment.
pub(super) fn style(global: &Global) -> Style {
    let set = |name: &str| std::env::var_os(name).is_some_and(|v| !v.is_empty());
    let colour = |is_terminal: bool| match global.color {
        Colour::Always => true,
        Colour::Never => false,
        Colour::Auto => {
            let dumb = std::env::var_os("TERM").is_some_and(|t| t == "dumb");
            is_terminal && !set("NO_COLOR") && !dumb
        }
    };
    Style {
        colour: colour(std::io::stderr().is_terminal()),
        colour_out: colour(std::io::stdout().is_terminal()),
        json: global.format == Format::Json,
        quiet: global.quiet,
        verbose: global.verbose,
    }
}

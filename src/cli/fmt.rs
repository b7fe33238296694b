//! `vimg fmt`

use std::path::{Path, PathBuf};

use vimg_lang::{Sources, format};

use super::output::{Error, Outcome, print};
use super::read::read_recipe;
use crate::report::Style;

/// Format recipe files; comments, numbers and strings keep their spelling
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Change nothing; exit with 1 if a file is not formatted
    #[arg(long)]
    check: bool,
    /// Files or directories [default: all recipes in and below this directory]
    #[arg(default_value = ".", hide_default_value = true)]
    paths: Vec<PathBuf>,
}

pub(super) fn run(args: &Args, style: Style) -> Outcome {
    let mut sources = Sources::default();
    let mut mistakes = Vec::new();
    let mut differ = 0;
    for path in recipes(&args.paths)? {
        let fail = |e: std::io::Error| Error::host(format!("{}: {e}", path.display()));
        // Resolves links, because replacing a link by a file would remove it.
        let path = path.canonicalize().unwrap_or(path.clone());
        let text = read_recipe(&path)?;
        let source = sources.add(shown(&path), text.as_str());
        let laid_out = match format(source, &text) {
            Ok(laid_out) => laid_out,
            Err(errors) => {
                mistakes.extend(errors);
                continue;
            }
        };
        if laid_out == text {
            continue;
        }
        differ += 1;
        if !args.check {
            crate::store::replace(&path, laid_out.as_bytes()).map_err(fail)?;
        }
        if !style.quiet {
            let verb = if args.check { "would change" } else { "changed" };
            print(&format!("{verb} {}\n", shown(&path)))?;
        }
    }
    if !mistakes.is_empty() {
        return Err(Error::Recipe(Box::new(sources), mistakes));
    }
    if args.check && differ > 0 { Err(Error::Code(1)) } else { Ok(()) }
}

/// Returns a path relative to the current directory, if it is below that.
fn shown(path: &Path) -> String {
    let here = std::env::current_dir().unwrap_or_default();
    path.strip_prefix(&here).unwrap_or(path).display().to_string()
}

fn recipes(paths: &[PathBuf]) -> Result<Vec<PathBuf>, Error> {
    let mut found = Vec::new();
    for path in paths {
        if !path.is_dir() {
            found.push(path.clone());
            continue;
        }
        let hidden =
            |e: &walkdir::DirEntry| e.depth() > 0 && e.file_name().as_encoded_bytes().starts_with(b".");
        for entry in walkdir::WalkDir::new(path).sort_by_file_name().into_iter().filter_entry(|e| !hidden(e))
        {
            let entry = entry.map_err(|e| Error::host(e.to_string()))?;
            if entry.file_type().is_file() && entry.path().extension().is_some_and(|e| e == "vimg") {
                found.push(entry.into_path());
            }
        }
    }
    Ok(found)
}

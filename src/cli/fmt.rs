//! `vimg fmt`

use std::fs;
use std::path::PathBuf;

use vimg_lang::{MAX_RECIPE, Sources, format};

use super::{Error, Outcome, print};
use crate::report::Style;

/// Lay out recipes anew; comments, numbers and strings keep their spelling
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Change nothing; fail if a file is not laid out
    #[arg(long)]
    check: bool,
    /// Files or directories; all recipes from here downwards unless given
    #[arg(default_value = ".")]
    paths: Vec<PathBuf>,
}

pub(super) fn run(args: &Args, style: Style) -> Outcome {
    let mut sources = Sources::default();
    let mut mistakes = Vec::new();
    let mut differ = 0;
    for path in recipes(&args.paths)? {
        let fail = |e: std::io::Error| Error::host(format!("{}: {e}", path.display()));
        if fs::metadata(&path).map_err(fail)?.len() > MAX_RECIPE as u64 {
            return Err(Error::host(format!("{} is too large for a recipe", path.display())));
        }
        let text = fs::read_to_string(&path).map_err(fail)?;
        let source = sources.add(path.display().to_string(), text.as_str());
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
            let new = path.with_extension("vimg-new");
            fs::write(&new, laid_out).map_err(fail)?;
            let mode = fs::metadata(&path).map_err(fail)?.permissions();
            fs::set_permissions(&new, mode).map_err(fail)?;
            fs::rename(&new, &path).map_err(fail)?;
        }
        if !style.quiet {
            let verb = if args.check { "would change" } else { "changed" };
            print(&format!("{verb} {}\n", path.display()))?;
        }
    }
    if !mistakes.is_empty() {
        return Err(Error::Recipe(Box::new(sources), mistakes));
    }
    if args.check && differ > 0 { Err(Error::Code(1)) } else { Ok(()) }
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

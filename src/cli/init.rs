//! `vimg init`

use std::fs;
use std::path::{Path, PathBuf};

use super::output::{Error, Outcome, print};

/// Write a starter recipe
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Directory to write it to
    #[arg(default_value = ".")]
    directory: PathBuf,
}

const FILES: &[(&str, &str)] = &[
    ("main.vimg", include_str!("init/main.vimg")),
    ("site/index.html.j2", include_str!("init/index.html.j2")),
];

pub(super) fn run(args: &Args) -> Outcome {
    let fail = |path: &Path, e: std::io::Error| Error::host(format!("{}: {e}", path.display()));
    for (name, _) in FILES {
        let path = args.directory.join(name);
        if path.symlink_metadata().is_ok() {
            let help = "name another directory: vimg init DIRECTORY".to_owned();
            return Err(Error::Message(format!("{} already exists", path.display()), Some(help), 2));
        }
    }
    for (name, text) in FILES {
        let path = args.directory.join(name);
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir).map_err(|e| fail(dir, e))?;
        }
        fs::write(&path, text).map_err(|e| fail(&path, e))?;
        print(&format!("wrote {}\n", path.display()))?;
    }
    if args.directory == Path::new(".") {
        return print("next: vimg build\n");
    }
    print(&format!("next: cd {} && vimg build\n", args.directory.display()))
}

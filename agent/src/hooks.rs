//! Scripts that a machine keeps: for its first boot, for each boot, for its
//! end, and operations that a person asks for.
//!
//! While vimg makes an image out of a machine they are kept and not run. In a
//! server vimg says when. In a machine that is on its own, a disk that was
//! written and is booted elsewhere, its systemd does, with
//! `vimg-hooks.service`.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use crate::command;
use crate::failure::{Failure, HOME};
use crate::protocol::{Around, PORT};
use crate::system;

const AROUND: &str = "json";

/// Where scripts are kept that are for the same.
pub(crate) fn dir(when: &str) -> PathBuf {
    Path::new(HOME).join("hooks").join(when)
}

/// Where it is kept what a script finds around it.
pub(crate) fn around(script: &Path) -> PathBuf {
    let mut name = script.as_os_str().to_owned();
    name.push(".");
    name.push(AROUND);
    name.into()
}

/// Is there once the hooks of the first boot have passed.
pub(crate) fn stamp() -> PathBuf {
    Path::new(HOME).join("first-boot-done")
}

/// Why a script did not pass, and the exit code to say so with.
#[derive(Debug)]
pub struct Failed {
    /// For people.
    pub message: String,
    /// The script's own, or 1.
    pub code: u8,
}

impl From<String> for Failed {
    fn from(message: String) -> Self {
        Self { message, code: 1 }
    }
}

/// What a machine does that has booted, unless vimg is there and says when.
pub fn boot() -> Result<(), Failed> {
    if system::port(PORT).is_some() { Ok(()) } else { live() }
}

/// The same for a machine that begins its life, whatever the one that its disk
/// is from has lived through.
pub fn begin() -> Result<(), Failed> {
    match fs::remove_file(stamp()) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(format!("{}: {e}", stamp().display()).into()),
        _ => live(),
    }
}

/// Runs the hooks of the first boot until they have passed once, then those of
/// each boot.
pub fn live() -> Result<(), Failed> {
    if !stamp().exists() {
        all("first-boot", None)?;
        let done = File::create(stamp()).and_then(|file| file.sync_all());
        done.map_err(|e| format!("{}: {e}", stamp().display()))?;
    }
    all("each-boot", None)
}

/// Runs the hooks for the machine's end.
pub fn decommission() -> Result<(), Failed> {
    all("decommission", None)
}

/// Runs an operation. Its arguments are those of its scripts.
pub fn operation(name: &str, args: &[String]) -> Result<(), Failed> {
    let known = known(&dir("operation"));
    if known.iter().any(|other| other == name) {
        return all(&format!("operation/{name}"), Some(args));
    }
    let there = match known.as_slice() {
        [] => "this machine has none".to_owned(),
        known => format!("this machine has: {}", known.join(", ")),
    };
    Err(format!("there is no operation `{name}`; {there}").into())
}

/// The names of operations that have a script.
fn known(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| !scripts(&entry.path()).is_empty())
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

fn scripts(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut found: Vec<PathBuf> = entries.filter(|path| around(path).exists()).collect();
    found.sort();
    found
}

/// Runs what is kept for `when`, in order, up to the first that fails; with
/// arguments if a person asks for it.
fn all(when: &str, args: Option<&[String]>) -> Result<(), Failed> {
    for path in scripts(&dir(when)) {
        one(&path, args).map_err(|failure| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            // The page's number and the step's are for the order alone.
            let layer = name.split_once('-').map_or(&*name, |(_, rest)| rest);
            let layer = layer.rsplit_once('.').map_or(layer, |(layer, _)| layer);
            let message =
                format!("`{}` of the layer `{layer}` failed: {}", when.replace('/', " "), failure.message);
            let code = failure.exit.and_then(|code| u8::try_from(code).ok()).unwrap_or(1);
            Failed { message, code }
        })?;
    }
    Ok(())
}

fn one(path: &Path, args: Option<&[String]>) -> Result<(), Failure> {
    let fail = |e: io::Error| Failure::at(path, e);
    let kept = fs::read(around(path)).map_err(fail)?;
    let around: Around = serde_json::from_slice(&kept).map_err(|e| fail(e.into()))?;
    let user = system::user(&around.user)
        .ok_or_else(|| Failure::new(format!("there is no user `{}` in the machine any more", around.user)))?;
    let mut command = command::script(path, &around, &user).map_err(fail)?;
    // Nobody is there to answer a hook.
    if let Some(args) = args {
        command.args(args).stdin(Stdio::inherit());
    }
    command::pass(&mut command, Duration::from_secs(around.timeout))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_half_there_is_no_script() {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join("rotate");
        fs::create_dir(&dir).unwrap();
        assert!(known(home.path()).is_empty());
        for name in ["0002-b.00001", "0001-a.00004", "0001-a.00003"] {
            fs::write(dir.join(name), "").unwrap();
            fs::write(around(&dir.join(name)), "").unwrap();
        }
        fs::write(dir.join("0001-a.00005"), "").unwrap();
        let found = scripts(&dir);
        let names: Vec<_> = found.iter().filter_map(|path| path.file_name()?.to_str()).collect();
        assert_eq!(names, ["0001-a.00003", "0001-a.00004", "0002-b.00001"]);
        assert_eq!(known(home.path()), ["rotate"]);
    }
}

//! Hooks and operations: scripts in the machine for its first boot, for each boot, for
//! its end, and for requests of the user.
//!
//! While vimg builds an image, they do not run. In a server, vimg runs them. In a machine
//! that was booted elsewhere from a written disk, systemd runs them with
//! `vimg-hooks.service`.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use crate::command;
use crate::failure::{Failure, HOME};
use crate::protocol::{Around, PORT, When};
use crate::system;

const AROUND: &str = "json";

/// The directory of the scripts for an event.
pub(crate) fn dir(when: &When) -> PathBuf {
    below().join(when.to_string())
}

/// The directory of all scripts.
fn below() -> PathBuf {
    Path::new(HOME).join("hooks")
}

/// The file with the environment of a script.
pub(crate) fn around(script: &Path) -> PathBuf {
    let mut name = script.as_os_str().to_owned();
    name.push(".");
    name.push(AROUND);
    name.into()
}

/// The file that exists once the hooks of the first boot have succeeded.
pub(crate) fn stamp() -> PathBuf {
    Path::new(HOME).join("first-boot-done")
}

/// Why a script failed, and the exit code of the agent.
#[derive(Debug)]
pub struct Failed {
    /// The message.
    pub message: String,
    /// The exit code of the script, or 1.
    pub code: u8,
}

impl From<String> for Failed {
    fn from(message: String) -> Self {
        Self { message, code: 1 }
    }
}

/// Runs the hooks of a boot, unless vimg controls the machine.
pub fn boot() -> Result<(), Failed> {
    if system::port(PORT).is_some() { Ok(()) } else { live() }
}

/// Runs the hooks of the first boot and of each boot, even if the disk comes from a
/// machine that has run them.
pub fn begin() -> Result<(), Failed> {
    match fs::remove_file(stamp()) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(format!("{}: {e}", stamp().display()).into()),
        _ => live(),
    }
}

/// Runs the hooks of the first boot, if they have not succeeded yet, and then those of
/// each boot.
pub fn live() -> Result<(), Failed> {
    if !stamp().exists() {
        all(&When::FirstBoot, None)?;
        let done = File::create(stamp()).and_then(|file| file.sync_all());
        done.map_err(|e| format!("{}: {e}", stamp().display()))?;
    }
    all(&When::EachBoot, None)
}

/// Runs the hooks of the machine's end.
pub fn decommission() -> Result<(), Failed> {
    all(&When::Decommission, None)
}

/// Runs the scripts of an operation with arguments.
pub fn operation(name: &str, args: &[String]) -> Result<(), Failed> {
    let known = known(&below().join("operation"));
    if known.iter().any(|other| other == name) {
        return all(&When::Operation(name.to_owned()), Some(args));
    }
    let there = match known.as_slice() {
        [] => "this machine has none".to_owned(),
        known => format!("this machine has: {}", known.join(", ")),
    };
    Err(format!("there is no operation `{name}`; {there}").into())
}

/// Lists the operations that have a script.
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

/// Runs the scripts for `when`, in order, up to the first that fails. Operations have
/// arguments.
fn all(when: &When, args: Option<&[String]>) -> Result<(), Failed> {
    for path in scripts(&dir(when)) {
        one(&path, args).map_err(|failure| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            // The file name is `PAGE-LAYER.STEP`; both numbers only define the order.
            let layer = name.split_once('-').map_or(&*name, |(_, rest)| rest);
            let layer = layer.rsplit_once('.').map_or(layer, |(layer, _)| layer);
            let message = format!(
                "`{}` of the layer `{layer}` failed: {}",
                when.to_string().replace('/', " "),
                failure.message
            );
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
        .ok_or_else(|| Failure::new(format!("there is no longer a user `{}` in the machine", around.user)))?;
    let mut command = command::script(path, &around, &user).map_err(fail)?;
    // Only an operation has a person who could type input.
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

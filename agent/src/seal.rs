//! Makes a machine fit for being many: takes out what must not be the same
//! in two of them, and what belongs to its making and not to its use.

use std::fs;
use std::io;
use std::path::Path;

use crate::command;
use crate::failure::HOME;

/// Services that stay up while the others are stopped: without them the
/// machine can't answer any more.
const KEPT: &[&str] = &["vimg-agent", "dbus", "systemd-", "user@"];

/// Seals the machine. It must not run on after this.
pub(crate) fn seal() -> io::Result<()> {
    stop_services();
    empty_file("/etc/machine-id")?;
    for path in [
        "/var/lib/dbus/machine-id",
        "/var/lib/systemd/random-seed",
        "/var/lib/systemd/credential.secret",
        "/boot/efi/loader/random-seed",
        "/root/.bash_history",
    ] {
        remove(Path::new(path))?;
    }
    for (dir, matches) in [
        ("/etc/ssh", "ssh_host_"),
        ("/var/lib/dhcp", ""),
        ("/var/lib/systemd/network", ""),
        ("/var/lib/NetworkManager", ""),
        ("/var/lib/apt/lists", ""),
        ("/var/cache/apt", ""),
        ("/var/lib/cloud", ""),
        ("/var/log/journal", ""),
        ("/var/tmp", ""),
        ("/tmp", ""),
    ] {
        empty_dir(Path::new(dir), matches)?;
    }
    remove(&Path::new(HOME).join("tmp"))?;
    empty_logs(Path::new("/var/log"))?;
    if Path::new("/var/lib/dbus").is_dir() {
        std::os::unix::fs::symlink("/etc/machine-id", "/var/lib/dbus/machine-id")?;
    }
    // What was deleted becomes holes in the disk.
    let _ = command::query(command::command("fstrim").arg("/"));
    Ok(())
}

/// Stops what runs, so that databases and the like close their files.
fn stop_services() {
    let mut list = command::command("systemctl");
    list.args([
        "list-units",
        "--type=service,socket,timer",
        "--state=active",
        "--plain",
        "--no-legend",
        "--full",
    ]);
    let Ok(output) = command::query(&mut list) else { return };
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let units: Vec<&str> = text
        .lines()
        .filter_map(|l| l.split_whitespace().next())
        .filter(|unit| !KEPT.iter().any(|kept| unit.starts_with(kept)))
        .collect();
    if units.is_empty() {
        return;
    }
    let mut stop = command::command("systemctl");
    stop.arg("stop").arg("--").args(units);
    // A unit that refuses to be stopped is no reason not to seal.
    let _ = command::query(&mut stop);
}

fn empty_file(path: &str) -> io::Result<()> {
    if Path::new(path).exists() { fs::write(path, "") } else { Ok(()) }
}

fn remove(path: &Path) -> io::Result<()> {
    let result = match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match result {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn empty_dir(dir: &Path, matches: &str) -> io::Result<()> {
    let Ok(entries) = fs::read_dir(dir) else { return Ok(()) };
    for entry in entries.flatten() {
        if entry.file_name().to_string_lossy().starts_with(matches) {
            // Mount points and the like stay.
            let _ = remove(&entry.path());
        }
    }
    Ok(())
}

/// Empties log files and drops rotated ones; directories and owners stay.
fn empty_logs(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)?.flatten() {
        let path = entry.path();
        let Ok(kind) = entry.file_type() else { continue };
        if kind.is_dir() {
            empty_logs(&path)?;
        } else if kind.is_file() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let rotated = name.ends_with(".gz") || name.ends_with(".old") || name.ends_with(".1");
            if rotated { fs::remove_file(&path)? } else { fs::write(&path, "")? }
        }
    }
    Ok(())
}

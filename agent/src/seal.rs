//! Seals a machine: removes what two machines must not share, and what only its build
//! needed.

use std::fs;
use std::io;
use std::path::Path;

use crate::failure::HOME;
use crate::fsctl;
use crate::hooks;
use crate::init;
use crate::packages;

/// Seals the machine. It must be switched off after this.
pub(crate) fn seal() -> io::Result<()> {
    // Databases and the like close their files.
    if let Ok(init) = init::find()
        && init.is_up()
    {
        init.stop_services();
    }
    empty_file("/etc/machine-id")?;
    let commands = first_boot();
    for path in [
        "/etc/ssl/private/ssl-cert-snakeoil.key",
        "/etc/iscsi/initiatorname.iscsi",
        "/etc/nvme/hostid",
        "/etc/nvme/hostnqn",
        "/var/lib/systemd/timesync/clock",
        "/var/lib/dbus/machine-id",
        "/var/lib/systemd/random-seed",
        "/var/lib/systemd/credential.secret",
        "/var/cache/ldconfig/aux-cache",
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
        ("/var/lib/cloud", ""),
        ("/var/log/journal", ""),
        ("/var/tmp", ""),
        ("/tmp", ""),
    ] {
        empty_dir(Path::new(dir), matches)?;
    }
    for dir in packages::find().map(|packages| packages.caches()).unwrap_or_default() {
        empty_dir(Path::new(dir), "")?;
    }
    if !commands.is_empty() {
        let stamp = Path::new(HOME).join("first-boot");
        fs::create_dir_all(HOME)?;
        fs::write(&stamp, "")?;
        let init = init::find().map_err(|failure| io::Error::other(failure.message))?;
        init.run_at_next_boot(&commands, &stamp)?;
    }
    remove(&Path::new(HOME).join("tmp"))?;
    remove(&hooks::stamp())?;
    empty_logs(Path::new("/var/log"))?;
    if Path::new("/var/lib/dbus").is_dir() {
        std::os::unix::fs::symlink("/etc/machine-id", "/var/lib/dbus/machine-id")?;
    }
    // Turn the blocks of deleted files into holes of the disk. In a container, only the
    // host can do this.
    if let Ok(root) = fs::File::open("/") {
        fsctl::trim(root);
    }
    Ok(())
}

/// Lists the programs that create, at the first boot, what sealing removes and services
/// need: SSH host keys and the self-signed certificate of `ssl-cert`.
fn first_boot() -> Vec<&'static str> {
    let mut commands = Vec::new();
    if Path::new("/usr/bin/ssh-keygen").exists() && Path::new("/etc/ssh/sshd_config").exists() {
        commands.push("/usr/bin/ssh-keygen -A");
    }
    if Path::new("/usr/sbin/make-ssl-cert").exists() {
        commands.push("/usr/sbin/make-ssl-cert generate-default-snakeoil --force-overwrite");
    }
    commands
}

fn empty_file(path: &str) -> io::Result<()> {
    if Path::new(path).exists() { fs::write(path, "") } else { Ok(()) }
}

/// Truncates a file, without O_CREAT: in a sticky directory that users can write to, the
/// kernel denies O_CREAT even to root (`fs.protected_regular`).
fn truncate(path: &Path) -> io::Result<()> {
    fs::File::options().write(true).truncate(true).open(path).map(|_| ())
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
            // Ignore errors: a mount point can't be removed.
            let _ = remove(&entry.path());
        }
    }
    Ok(())
}

/// Truncates log files and deletes rotated ones; keeps directories and owners.
fn empty_logs(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)?.flatten() {
        let path = entry.path();
        let Ok(kind) = entry.file_type() else { continue };
        if kind.is_dir() {
            empty_logs(&path)?;
        } else if kind.is_file() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let rotated = name.ends_with(".gz") || name.ends_with(".old") || name.ends_with(".1");
            let done = if rotated { fs::remove_file(&path) } else { truncate(&path) };
            done.map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", path.display())))?;
        }
    }
    Ok(())
}

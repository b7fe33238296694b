//! Seals a machine: removes what two machines must not share, and what only its build
//! needed.

use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use crate::command;
use crate::failure::HOME;
use crate::fsctl;
use crate::hooks;

/// Prefixes of services that sealing does not stop: the agent needs them, or they have no
/// files to close.
const KEPT: &[&str] = &[
    "vimg-agent",
    "dbus",
    "systemd-",
    "user@",
    "getty@",
    "serial-getty@",
    "console-getty",
    "kmod-static-nodes",
];

/// How long services may take to stop.
const STOP: Duration = Duration::from_secs(600);

/// Seals the machine. It must be switched off after this.
pub(crate) fn seal() -> io::Result<()> {
    if Path::new("/run/systemd/system").is_dir() {
        stop_services();
    }
    empty_file("/etc/machine-id")?;
    let keys = first_boot()?;
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
        ("/var/lib/apt/lists", ""),
        ("/var/cache/apt", ""),
        ("/var/lib/cloud", ""),
        ("/var/log/journal", ""),
        ("/var/tmp", ""),
        ("/tmp", ""),
    ] {
        empty_dir(Path::new(dir), matches)?;
    }
    if let Some(unit) = keys {
        fs::write(FIRST_BOOT, unit)?;
        fs::create_dir_all(WANTED)?;
        let link = Path::new(WANTED).join("vimg-first-boot.service");
        remove(&link)?;
        std::os::unix::fs::symlink(FIRST_BOOT, link)?;
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

const FIRST_BOOT: &str = "/etc/systemd/system/vimg-first-boot.service";
const WANTED: &str = "/etc/systemd/system/multi-user.target.wants";

/// Writes the text of a unit that creates, at the first boot, what sealing removes and
/// services need: SSH host keys and the self-signed certificate of `ssl-cert`. Returns
/// `None` if the machine has neither.
fn first_boot() -> io::Result<Option<String>> {
    let ssh = Path::new("/usr/bin/ssh-keygen").exists() && Path::new("/etc/ssh/sshd_config").exists();
    let ssl = Path::new("/usr/sbin/make-ssl-cert").exists();
    let mut runs = String::new();
    if ssh {
        runs.push_str("ExecStart=/usr/bin/ssh-keygen -A\n");
    }
    if ssl {
        runs.push_str("ExecStart=/usr/sbin/make-ssl-cert generate-default-snakeoil --force-overwrite\n");
    }
    if runs.is_empty() {
        return Ok(None);
    }
    let stamp = Path::new(HOME).join("first-boot");
    fs::create_dir_all(HOME)?;
    fs::write(&stamp, "")?;
    let stamp = stamp.display();
    Ok(Some(format!(
        "[Unit]\nDescription=Keys of this machine\nConditionPathExists={stamp}\n\
         After=systemd-random-seed.service local-fs.target\n\
         Before=ssh.service sshd.service postgresql.service postgresql@.service apache2.service \
         nginx.service lighttpd.service postfix.service dovecot.service exim4.service\n\n\
         [Service]\nType=oneshot\n{runs}ExecStartPost=/bin/rm -f {stamp}\n\n\
         [Install]\nWantedBy=multi-user.target\n"
    )))
}

/// Stops services, so that databases and the like close their files.
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
    let Ok((_, text)) = command::query(&mut list, command::QUESTION) else { return };
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
    // Seal even if a unit can't be stopped.
    let _ = command::query(&mut stop, STOP);
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

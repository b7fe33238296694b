//! Seals a machine: removes what two machines must not share, and what only its build
//! needed.
//!
//! What a layer has declared stays: files, trees and archives have an entry in the
//! ledger. All else that is removed is told.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::boot_loader;
use crate::failure::HOME;
use crate::fsctl;
use crate::hooks;
use crate::init;
use crate::ledger::{Entry, Ledger, unescape};
use crate::packages;
use crate::private_keys;
use crate::protocol::{AGENT, Sealed};

/// The content of `/etc/machine-id` in an image: the next boot is its first
/// (machine-id(5), "First Boot Semantics").
const NO_MACHINE_ID: &str = "uninitialized\n";

/// Files of one machine: its identity, its state, its history.
const FILES: &[&str] = &[
    "/etc/ssl/private/ssl-cert-snakeoil.key",
    "/etc/bind/rndc.key",
    "/etc/iscsi/initiatorname.iscsi",
    "/etc/nvme/hostid",
    "/etc/nvme/hostnqn",
    "/var/lib/rabbitmq/.erlang.cookie",
    "/var/lib/systemd/timesync/clock",
    "/var/lib/dbus/machine-id",
    "/var/lib/systemd/random-seed",
    "/var/lib/systemd/credential.secret",
    "/var/cache/ldconfig/aux-cache",
    "/boot/efi/loader/random-seed",
    "/root/.bash_history",
];

/// Certificates, each with its key: without the key, they are as random, and of no use.
const CERTIFICATES: &[(&str, &str)] =
    &[("/etc/ssl/certs/ssl-cert-snakeoil.pem", "/etc/ssl/private/ssl-cert-snakeoil.key")];

/// Directories whose entries are of one machine, or of its build, and how the names of
/// these entries begin.
const ENTRIES: &[(&str, &str)] = &[
    ("/etc/ssh", "ssh_host_"),
    ("/var/lib/dhcp", ""),
    ("/var/lib/systemd/network", ""),
    ("/var/lib/systemd/coredump", ""),
    ("/var/lib/NetworkManager", ""),
    ("/var/lib/cloud", ""),
    ("/var/log/journal", ""),
    ("/var/tmp", ""),
    ("/tmp", ""),
];

/// What belongs to the agent that is installed in an image.
const INSTALLED: &[&str] = &[
    "/etc/systemd/system/vimg-agent.service",
    "/etc/systemd/system/vimg-hooks.service",
    "/etc/systemd/system/multi-user.target.wants/vimg-agent.service",
    "/etc/systemd/system/multi-user.target.wants/vimg-hooks.service",
    HOME,
];

/// The most removed paths that are told.
const TOLD: usize = 500;

/// A program that creates again what sealing removes, if these files exist.
struct Again {
    exists: &'static [&'static str],
    command: &'static str,
}

const AGAIN: &[Again] = &[
    Again { exists: &["/usr/bin/ssh-keygen", "/etc/ssh/sshd_config"], command: "/usr/bin/ssh-keygen -A" },
    // Overwrites no key that a layer declares.
    Again {
        exists: &["/usr/sbin/make-ssl-cert"],
        command: "/usr/sbin/make-ssl-cert generate-default-snakeoil",
    },
    // As Debian's package does when it is installed.
    Again {
        exists: &["/usr/sbin/rndc-confgen", "/etc/bind/rndc.key"],
        command: "/usr/sbin/rndc-confgen -a -u bind",
    },
];

/// Seals the machine. It must be switched off after this. `agent` says whether the agent
/// stays in the image.
pub(crate) fn seal(agent: bool) -> io::Result<Sealed> {
    // Databases and the like close their files.
    let init = init::find().ok();
    if let Some(init) = init.filter(|init| init.is_up()) {
        init.stop_services();
    }
    boot_loader::settle()?;
    let root = Path::new("/");
    let pages = Ledger::below(Path::new(HOME), false).pages().map_err(|f| io::Error::other(f.message))?;
    let entries = pages.iter().flat_map(|page| &page.entries);
    let declared = entries
        .filter_map(|entry| if let Entry::Path { path, .. } = entry { Some(unescape(path)) } else { None })
        .collect();
    let mut sealing = Sealing { root, declared, removed: Vec::new() };
    let again: Vec<&str> = AGAIN
        .iter()
        .filter(|again| again.exists.iter().all(|path| root.join(&path[1..]).exists()))
        .map(|again| again.command)
        .collect();
    sealing.identity()?;
    for dir in packages::find().map(|packages| packages.caches()).unwrap_or_default() {
        sealing.empty_dir(Path::new(dir), "");
    }
    sealing.empty_logs(Path::new("/var/log"))?;
    remove(&Path::new(HOME).join("tmp"))?;
    remove(&hooks::stamp())?;
    if let Some(init) = init {
        init.prepare_first_boot(&again)?;
    }
    if !agent {
        for path in INSTALLED.iter().chain([&AGENT]) {
            remove(Path::new(path))?;
        }
        // Only if nothing else is there.
        let _ = fs::remove_dir(Path::new(AGENT).parent().unwrap_or(root));
    }
    if sealing.removed.len() > TOLD {
        let more = sealing.removed.len() - TOLD;
        sealing.removed.truncate(TOLD);
        sealing.removed.push(format!("{more} more"));
    }
    let private_keys = private_keys::find(root, &sealing.declared);
    // Turn the blocks of deleted files into holes of the disk. In a container, only the
    // host can do this.
    if let Ok(root) = fs::File::open("/") {
        fsctl::trim(root);
    }
    Ok(Sealed { removed: sealing.removed, private_keys })
}

/// A machine that is sealed.
struct Sealing<'a> {
    root: &'a Path,
    /// The paths that layers declare.
    declared: HashSet<PathBuf>,
    /// The removed paths, for people.
    removed: Vec<String>,
}

impl Sealing<'_> {
    /// Removes what identifies the machine. Its next boot is a first boot.
    fn identity(&mut self) -> io::Result<()> {
        let id = Path::new("/etc/machine-id");
        if self.at(id).exists() && !self.declared.contains(id) {
            fs::write(self.at(id), NO_MACHINE_ID)?;
        }
        for path in FILES {
            self.remove(Path::new(path))?;
        }
        for (certificate, key) in CERTIFICATES {
            if !self.at(Path::new(key)).exists() {
                self.remove(Path::new(certificate))?;
            }
        }
        for home in fs::read_dir(self.at(Path::new("/home"))).into_iter().flatten().flatten() {
            self.remove(&Path::new("/home").join(home.file_name()).join(".bash_history"))?;
        }
        for (dir, begin) in ENTRIES {
            self.empty_dir(Path::new(dir), begin);
        }
        let link = Path::new("/var/lib/dbus/machine-id");
        if self.at(link).parent().is_some_and(Path::is_dir) && fs::symlink_metadata(self.at(link)).is_err() {
            std::os::unix::fs::symlink("/etc/machine-id", self.at(link))?;
        }
        Ok(())
    }

    /// The place of a path of the machine.
    fn at(&self, path: &Path) -> PathBuf {
        self.root.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// Whether a layer declares a path, or something below it.
    fn has_declared(&self, path: &Path) -> bool {
        self.declared.iter().any(|declared| declared.starts_with(path))
    }

    /// Removes a path with all that is below it. What a layer declares stays.
    fn remove(&mut self, path: &Path) -> io::Result<()> {
        let place = self.at(path);
        let Ok(meta) = fs::symlink_metadata(&place) else { return Ok(()) };
        if !self.has_declared(path) {
            remove(&place)?;
            self.removed.push(path.display().to_string());
        } else if meta.is_dir() {
            for entry in fs::read_dir(&place)?.flatten() {
                self.remove(&path.join(entry.file_name()))?;
            }
        }
        Ok(())
    }

    fn empty_dir(&mut self, dir: &Path, begin: &str) {
        for entry in fs::read_dir(self.at(dir)).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with(begin) {
                // Ignore errors: a mount point can't be removed.
                let _ = self.remove(&dir.join(entry.file_name()));
            }
        }
    }

    /// Truncates log files and deletes rotated ones; keeps directories and owners.
    fn empty_logs(&mut self, dir: &Path) -> io::Result<()> {
        for entry in fs::read_dir(self.at(dir)).into_iter().flatten().flatten() {
            let (path, place) = (dir.join(entry.file_name()), entry.path());
            let Ok(kind) = entry.file_type() else { continue };
            if kind.is_dir() {
                self.empty_logs(&path)?;
                continue;
            }
            let meta = entry.metadata()?;
            if !kind.is_file() || self.declared.contains(&path) {
                continue;
            }
            let name = entry.file_name().to_string_lossy().into_owned();
            let rotated = name.ends_with(".gz") || name.ends_with(".old") || name.ends_with(".1");
            if rotated || meta.len() > 0 {
                let done = if rotated { fs::remove_file(&place) } else { truncate(&place) };
                done.map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", path.display())))?;
                let how = if rotated { "" } else { " (emptied)" };
                self.removed.push(format!("{}{how}", path.display()));
            }
        }
        Ok(())
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_layer_declares_stays_and_the_rest_is_told() {
        let root = tempfile::tempdir().unwrap();
        let put = |path: &str, content: &str| {
            let place = root.path().join(&path[1..]);
            fs::create_dir_all(place.parent().unwrap()).unwrap();
            fs::write(place, content).unwrap();
        };
        let read = |path: &str| fs::read_to_string(root.path().join(&path[1..])).ok();
        for path in [
            "/etc/machine-id",
            "/etc/ssh/ssh_host_ed25519_key",
            "/etc/ssh/ssh_host_rsa_key",
            "/etc/ssh/sshd_config",
            "/var/lib/cloud/seed/nocloud/user-data",
            "/var/lib/cloud/seed/nocloud/other",
            "/var/lib/cloud/instance/boot-finished",
            "/var/log/app/README",
            "/var/log/app/log",
            "/var/log/app/log.1",
            "/home/ada/.bash_history",
            "/etc/ssl/certs/ssl-cert-snakeoil.pem",
            "/etc/ssl/private/ssl-cert-snakeoil.key",
        ] {
            put(path, "x\n");
        }
        put("/var/log/empty", "");
        let declared = [
            "/etc/ssh/ssh_host_ed25519_key",
            "/var/lib/cloud/seed/nocloud",
            "/var/lib/cloud/seed/nocloud/user-data",
            "/var/log/app",
            "/var/log/app/README",
        ];
        let declared = declared.map(PathBuf::from).into();
        let mut sealing = Sealing { root: root.path(), declared, removed: Vec::new() };
        sealing.identity().unwrap();
        sealing.empty_logs(Path::new("/var/log")).unwrap();
        sealing.removed.sort();
        assert_eq!(
            sealing.removed,
            [
                "/etc/ssh/ssh_host_rsa_key",
                "/etc/ssl/certs/ssl-cert-snakeoil.pem",
                "/etc/ssl/private/ssl-cert-snakeoil.key",
                "/home/ada/.bash_history",
                "/var/lib/cloud/instance",
                "/var/lib/cloud/seed/nocloud/other",
                "/var/log/app/log (emptied)",
                "/var/log/app/log.1",
            ]
        );
        for path in [
            "/etc/ssh/ssh_host_ed25519_key",
            "/etc/ssh/sshd_config",
            "/var/lib/cloud/seed/nocloud/user-data",
            "/var/log/app/README",
        ] {
            assert_eq!(read(path).as_deref(), Some("x\n"), "{path}");
        }
        assert_eq!(read("/etc/machine-id").as_deref(), Some("uninitialized\n"));
        assert_eq!(
            (read("/var/log/app/log").as_deref(), read("/etc/ssh/ssh_host_rsa_key")),
            (Some(""), None)
        );
    }
}

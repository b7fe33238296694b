//! Offline layers: changes a machine that is switched off. No services are started, and
//! changes take effect at the next boot.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use rustix::thread::{CapabilitySet, remove_capability_from_bounding_set};

use crate::protocol::CAPABILITIES;

static OFFLINE: AtomicBool = AtomicBool::new(false);
static CONFINED: AtomicBool = AtomicBool::new(false);
static PROXIES: Mutex<Vec<(String, String)>> = Mutex::new(Vec::new());

/// Programs that stand in for those of the machine while a layer is applied offline. Not on
/// the disk, and not in a directory that the layer may empty.
const STAND_INS: &str = "/run/vimg/bin";
/// Scripts ask `uname` for the kernel of the machine to get its headers or modules, or to
/// remove the other kernels. The kernel that runs is another one.
const UNAME: &str = r#"#!/bin/sh
# The machine is switched off. This answers with the kernel that it boots.
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
text=$(uname "$@") || exit
runs=$(uname -r)
boots=$(readlink -f /vmlinuz)
case $boots in
*/vmlinuz-*)
    case $text in
    *"$runs"*) text="${text%%"$runs"*}${boots##*/vmlinuz-}${text#*"$runs"}" ;;
    esac
    ;;
esac
printf '%s\n' "$text"
"#;

/// hosts(5).
pub(crate) const HOSTS: &str = "/etc/hosts";

/// Whether the current layer is applied offline.
pub(crate) fn is() -> bool {
    OFFLINE.load(Ordering::Relaxed)
}

/// Makes all later programs run without capabilities that could reach beyond the root
/// filesystem.
pub(crate) fn confine() {
    CONFINED.store(true, Ordering::Relaxed);
}

/// Sets the environment variables that name the user's proxies, for programs that may use
/// the network. They enter no file and no key.
pub(crate) fn set_proxies(variables: Vec<(String, String)>) {
    *PROXIES.lock().unwrap_or_else(PoisonError::into_inner) = variables;
}

/// Returns the variables of [`set_proxies`].
pub(crate) fn proxies() -> Vec<(String, String)> {
    PROXIES.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

/// Returns the search path of programs in the current layer.
pub(crate) fn path() -> String {
    const OWN: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    if is() { format!("{STAND_INS}:{OWN}") } else { OWN.to_owned() }
}

/// Adapts a program to the current layer: environment and capabilities.
pub(crate) fn adapt(command: &mut Command) {
    if is() {
        // systemctl then only enables and disables units.
        command.env("SYSTEMD_OFFLINE", "1");
    }
    if CONFINED.load(Ordering::Relaxed) {
        let kept: CapabilitySet =
            CAPABILITIES.iter().filter_map(|name| CapabilitySet::from_name(name)).collect();
        // SAFETY: the closure makes system calls only.
        unsafe {
            command.pre_exec(move || {
                // As in a container: set-user-id programs have no effect.
                rustix::thread::set_no_new_privs(true)?;
                for bit in 0..64 {
                    let one = CapabilitySet::from_bits_retain(1 << bit);
                    if kept.contains(one) {
                        continue;
                    }
                    match remove_capability_from_bounding_set(one) {
                        // The kernel has no more capabilities.
                        Err(rustix::io::Errno::INVAL) => break,
                        result => result?,
                    }
                }
                Ok(())
            });
        }
    }
}

/// Kills the processes that a layer left running, and empties what a reboot would empty:
/// the next layer must not depend on whether the same instance applied this one.
pub(crate) fn clear_away() {
    kill_all();
    for dir in ["/run", "/dev/shm"] {
        let Ok(entries) = fs::read_dir(dir) else { continue };
        for entry in entries.flatten().filter(|e| e.file_name() != "vimg") {
            let path = entry.path();
            let _ = match entry.file_type() {
                Ok(kind) if kind.is_dir() => fs::remove_dir_all(path),
                _ => fs::remove_file(path),
            };
        }
    }
}

/// Kills all processes except this one and process 1. The kernel signals all of them at
/// once (kill(2)), so that none can escape by a fork.
fn kill_all() {
    // SAFETY: the call takes numbers only.
    unsafe { libc::kill(-1, libc::SIGKILL) };
    // Wait until they have released their files.
    for _ in 0..200 {
        if !others_live() {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

/// Whether there are running processes of user space besides this one and process 1.
fn others_live() -> bool {
    let own = std::process::id();
    let Ok(entries) = fs::read_dir("/proc") else { return false };
    let mut pids = entries.flatten().filter_map(|e| e.file_name().to_str()?.parse::<u32>().ok());
    pids.any(|pid| {
        // Kernel threads and zombies have no memory.
        pid > 1
            && pid != own
            && fs::read_to_string(format!("/proc/{pid}/statm")).is_ok_and(|s| !s.starts_with("0 "))
    })
}

/// Files that are in the machine only while a layer is applied to it. Drop removes them,
/// unless the layer has replaced them.
pub(crate) struct Guests {
    put: Vec<(PathBuf, String)>,
}

/// The line of [`HOSTS`] that names the host of the build, with the content and
/// modification time of the file before the line was added.
static HOST_LINE: Mutex<Option<HostLine>> = Mutex::new(None);

struct HostLine {
    line: String,
    was: Vec<u8>,
    modified: Option<std::time::SystemTime>,
}

/// The content of a file without the line that [`Guests`] added to it.
pub(crate) fn own_content(path: &Path, content: Vec<u8>) -> Vec<u8> {
    match &*HOST_LINE.lock().unwrap_or_else(PoisonError::into_inner) {
        Some(host) if path == Path::new(HOSTS) => without(&content, host.line.as_bytes()),
        _ => content,
    }
}

/// Removes all lines that equal `line` from a text.
fn without(text: &[u8], line: &[u8]) -> Vec<u8> {
    text.split_inclusive(|b| *b == b'\n').filter(|one| *one != line).flatten().copied().collect()
}

impl Guests {
    /// Writes the files. `forbids` is a program that keeps packages from starting
    /// services, and its text.
    pub(crate) fn enter(
        offline: bool,
        host: Option<&str>,
        forbids: Option<(&str, &str)>,
    ) -> io::Result<Self> {
        OFFLINE.store(offline, Ordering::Relaxed);
        let mut guests = Self { put: Vec::new() };
        if offline {
            let uname = Path::new(STAND_INS).join("uname");
            fs::create_dir_all(STAND_INS)?;
            fs::write(&uname, UNAME)?;
            fs::set_permissions(&uname, fs::Permissions::from_mode(0o755))?;
        }
        if let Some((path, text)) = forbids
            && offline
            && Path::new(path).parent().is_some_and(Path::is_dir)
            && fs::symlink_metadata(path).is_err()
        {
            guests.put(path.into(), text.into())?;
            fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
        }
        if let Some(host) = host
            && let Ok(was) = fs::read(HOSTS)
        {
            let line = format!("{host} host.vimg.internal\n");
            let modified = fs::metadata(HOSTS).and_then(|meta| meta.modified()).ok();
            // Add it as the first line: the last line of the file may have no newline.
            fs::write(HOSTS, [line.as_bytes(), &was].concat())?;
            *HOST_LINE.lock().unwrap_or_else(PoisonError::into_inner) =
                Some(HostLine { line, was, modified });
        }
        Ok(guests)
    }

    fn put(&mut self, path: PathBuf, text: String) -> io::Result<()> {
        fs::write(&path, &text)?;
        self.put.push((path, text));
        Ok(())
    }
}

impl Drop for Guests {
    fn drop(&mut self) {
        // A layer may have added lines of its own.
        let host = HOST_LINE.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(HostLine { line, was, modified }) = host
            && let Ok(now) = fs::read(HOSTS)
        {
            let own = without(&now, line.as_bytes());
            if own != now {
                let _ = fs::write(HOSTS, &own);
            }
            if let Some(modified) = modified.filter(|_| own == was) {
                let _ =
                    fs::File::options().write(true).open(HOSTS).and_then(|file| file.set_modified(modified));
            }
        }
        for (path, text) in self.put.drain(..) {
            if fs::read(&path).ok().as_deref() == Some(text.as_bytes()) {
                let _ = fs::remove_file(&path);
            }
        }
        OFFLINE.store(false, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_of_the_host_goes_wherever_it_stands() {
        let line = b"198.51.100.1 host.vimg.internal\n";
        let text = [&b"127.0.0.1 localhost\n"[..], line, b"10.0.0.5 db"].concat();
        assert_eq!(without(&text, line), b"127.0.0.1 localhost\n10.0.0.5 db");
    }

    #[test]
    fn the_kernel_is_that_which_the_machine_boots() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().to_str().unwrap();
        let uname = |arguments: &[&str]| {
            let text = UNAME.replace("/vmlinuz)", &format!("{root}/vmlinuz)"));
            let out = Command::new("sh").args(["-c", &text, "uname"]).args(arguments).output().unwrap();
            String::from_utf8(out.stdout).unwrap()
        };
        let real = |arguments: &[&str]| {
            String::from_utf8(Command::new("uname").args(arguments).output().unwrap().stdout).unwrap()
        };
        // A machine without a kernel.
        assert_eq!(uname(&["-r"]), real(&["-r"]));
        fs::create_dir(dir.path().join("boot")).unwrap();
        fs::write(dir.path().join("boot/vmlinuz-6.1.0-9-cloud-amd64"), "").unwrap();
        std::os::unix::fs::symlink("boot/vmlinuz-6.1.0-9-cloud-amd64", dir.path().join("vmlinuz")).unwrap();
        assert_eq!(uname(&["-r"]), "6.1.0-9-cloud-amd64\n");
        assert_eq!(uname(&["-m"]), real(&["-m"]));
        assert_eq!(uname(&["-a"]), real(&["-a"]).replacen(real(&["-r"]).trim(), "6.1.0-9-cloud-amd64", 1));
    }

    #[test]
    fn every_capability_has_a_number() {
        assert!(CAPABILITIES.iter().all(|name| CapabilitySet::from_name(name).is_some()));
    }
}

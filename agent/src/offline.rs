//! A machine that is switched off: nothing is started in it, and what is done
//! to it is done as it would be before its next boot.

use std::fs;
use std::io;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use rustix::thread::{CapabilitySet, remove_capability_from_bounding_set};

use crate::protocol::CAPABILITIES;

static OFFLINE: AtomicBool = AtomicBool::new(false);
static CONFINED: AtomicBool = AtomicBool::new(false);
static RESOLV_CONF: Mutex<Option<String>> = Mutex::new(None);
static PROXIES: Mutex<Vec<(String, String)>> = Mutex::new(Vec::new());

/// What Debian's `invoke-rc.d` and `deb-systemd-invoke` ask before they start
/// anything; 101 forbids it (Debian's policy, "invoke-rc.d interface").
const POLICY: &str = "/usr/sbin/policy-rc.d";
const FORBIDS: &str = "#!/bin/sh\n# Nothing is started while vimg applies a layer offline.\nexit 101\n";

const RESOLV: &str = "/etc/resolv.conf";
/// hosts(5).
pub(crate) const HOSTS: &str = "/etc/hosts";

/// Whether a layer is applied to a machine that is switched off.
pub(crate) fn is() -> bool {
    OFFLINE.load(Ordering::Relaxed)
}

/// From now on programs run without the powers that could reach beyond the
/// root filesystem.
pub(crate) fn confine() {
    CONFINED.store(true, Ordering::Relaxed);
}

/// What resolves names while layers are applied.
pub(crate) fn resolve_by(resolv_conf: &str) {
    *RESOLV_CONF.lock().unwrap_or_else(PoisonError::into_inner) = Some(resolv_conf.to_owned());
}

/// Variables that lead programs which may use the network to the proxies of
/// the person who builds. They are in no file and no key.
pub(crate) fn set_proxies(variables: Vec<(String, String)>) {
    *PROXIES.lock().unwrap_or_else(PoisonError::into_inner) = variables;
}

/// The same, for a program that may use the network.
pub(crate) fn proxies() -> Vec<(String, String)> {
    PROXIES.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

/// Makes a program fit for a machine that is switched off.
pub(crate) fn adapt(command: &mut Command) {
    if is() {
        // systemctl then enables and disables, and ignores the rest.
        command.env("SYSTEMD_OFFLINE", "1");
    }
    if CONFINED.load(Ordering::Relaxed) {
        let kept: CapabilitySet =
            CAPABILITIES.iter().filter_map(|name| CapabilitySet::from_name(name)).collect();
        // SAFETY: the closure makes system calls only.
        unsafe {
            command.pre_exec(move || {
                // As in a container: a program's owner gives nobody rights.
                rustix::thread::set_no_new_privs(true)?;
                for bit in 0..64 {
                    let one = CapabilitySet::from_bits_retain(1 << bit);
                    if kept.contains(one) {
                        continue;
                    }
                    match remove_capability_from_bounding_set(one) {
                        // The kernel knows no more of them.
                        Err(rustix::io::Errno::INVAL) => break,
                        result => result?,
                    }
                }
                Ok(())
            });
        }
    }
}

/// Ends what a layer left running and forgets what a reboot would: the next
/// layer finds the machine as it would be if it came on another day.
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

/// Kills all processes but this one and the first. The kernel lets none fork
/// meanwhile (kill(2)), so that none escapes.
fn kill_all() {
    // SAFETY: the call takes numbers only.
    unsafe { libc::kill(-1, libc::SIGKILL) };
    // They may take a moment to let go of what they hold.
    for _ in 0..200 {
        if !others_live() {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

/// Whether there are processes of user space that have not ended, besides this
/// one and the first.
fn others_live() -> bool {
    let own = std::process::id();
    let Ok(entries) = fs::read_dir("/proc") else { return false };
    let mut pids = entries.flatten().filter_map(|e| e.file_name().to_str()?.parse::<u32>().ok());
    pids.any(|pid| {
        // The kernel's own threads have no memory of their own, nor has what
        // has ended and waits for its parent.
        pid > 1
            && pid != own
            && fs::read_to_string(format!("/proc/{pid}/statm")).is_ok_and(|s| !s.starts_with("0 "))
    })
}

/// What stands in the machine only while a layer is applied to it. Dropped,
/// it is gone again, unless the layer has put something else in its place.
pub(crate) struct Guests {
    put: Vec<(PathBuf, String, Option<Vec<u8>>)>,
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

/// Removes all lines from a text that equal `line`.
fn without(text: &[u8], line: &[u8]) -> Vec<u8> {
    text.split_inclusive(|b| *b == b'\n').filter(|one| *one != line).flatten().copied().collect()
}

impl Guests {
    /// Lets the guests in.
    pub(crate) fn enter(offline: bool, host: Option<&str>) -> io::Result<Self> {
        OFFLINE.store(offline, Ordering::Relaxed);
        let mut guests = Self { put: Vec::new() };
        if offline && Path::new("/usr/sbin").is_dir() && fs::symlink_metadata(POLICY).is_err() {
            guests.put(POLICY.into(), FORBIDS.into(), None)?;
            fs::set_permissions(POLICY, fs::Permissions::from_mode(0o755))?;
        }
        if let Some(host) = host
            && let Ok(was) = fs::read(HOSTS)
        {
            let line = format!("{host} host.vimg.internal\n");
            let modified = fs::metadata(HOSTS).and_then(|meta| meta.modified()).ok();
            // The first: the last line of the file may have no end.
            fs::write(HOSTS, [line.as_bytes(), &was].concat())?;
            *HOST_LINE.lock().unwrap_or_else(PoisonError::into_inner) =
                Some(HostLine { line, was, modified });
        }
        let resolv_conf = RESOLV_CONF.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(text) = resolv_conf
            && Path::new("/etc").is_dir()
        {
            match fs::read_link(RESOLV) {
                // It leads to a file of a service that does not run.
                Ok(target) => {
                    let target = Path::new("/etc").join(target);
                    let below_run = clean(&target).strip_prefix("/run").is_ok();
                    if below_run && !target.exists() {
                        if let Some(dir) = target.parent() {
                            fs::create_dir_all(clean(dir))?;
                        }
                        guests.put(target, text, None)?;
                    }
                }
                Err(_) => {
                    let was = fs::read(RESOLV).ok();
                    guests.put(RESOLV.into(), text, was)?;
                }
            }
        }
        Ok(guests)
    }

    fn put(&mut self, path: PathBuf, text: String, was: Option<Vec<u8>>) -> io::Result<()> {
        fs::write(&path, &text)?;
        self.put.push((path, text, was));
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
        for (path, text, was) in self.put.drain(..) {
            if fs::read(&path).ok().as_deref() != Some(text.as_bytes()) {
                continue;
            }
            let _ = match was {
                Some(was) => fs::write(&path, was),
                None => fs::remove_file(&path),
            };
        }
        OFFLINE.store(false, Ordering::Relaxed);
    }
}

/// Keeps packages of a machine that runs from starting anything. Dropped, it
/// lets them.
pub(crate) struct Hold;

/// Where it is noted what packages ask for meanwhile.
pub(crate) const HELD: &str = "/run/vimg-held";

impl Hold {
    /// Whether the machine has a policy of its own about that.
    pub(crate) fn is_taken() -> bool {
        fs::symlink_metadata(POLICY).is_ok()
    }

    pub(crate) fn enter() -> io::Result<Self> {
        fs::write(HELD, "")?;
        let text = format!("#!/bin/sh\necho \"$*\" >>{HELD}\nexit 101\n");
        let mut file = fs::File::options().write(true).create_new(true).mode(0o755).open(POLICY)?;
        let hold = Self;
        io::Write::write_all(&mut file, text.as_bytes())?;
        Ok(hold)
    }

    /// What they asked for, a line each.
    pub(crate) fn asked(self) -> String {
        fs::read_to_string(HELD).unwrap_or_default()
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let _ = fs::remove_file(POLICY);
        let _ = fs::remove_file(HELD);
    }
}

/// The path without `..`, as text.
fn clean(path: &Path) -> PathBuf {
    let mut out = PathBuf::new();
    for part in path.components() {
        match part {
            std::path::Component::ParentDir => {
                out.pop();
            }
            part => out.push(part),
        }
    }
    out
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
    fn every_capability_has_a_number() {
        assert!(CAPABILITIES.iter().all(|name| CapabilitySet::from_name(name).is_some()));
    }
}

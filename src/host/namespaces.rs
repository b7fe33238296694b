//! User and network namespaces for programs that run without rights on the
//! host. A small process holds them open.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::OnceLock;

use rustix::thread::{
    CapabilitySet, CapabilitySets, LinkNameSpaceType, UnshareFlags, configure_capability_in_ambient_set,
    move_into_link_name_space, set_capabilities, unshare_unsafe,
};

/// The first host id of the range that root maps: the last 65,536 of the ids
/// that systemd leaves to containers (systemd's `UIDS-GIDS.md`: 524288 to
/// 1879048191).
const FIRST: u32 = 1_879_048_191 - COUNT + 1;
/// The number of ids of a system: 0 to 65535.
const COUNT: u32 = 1 << 16;

/// The id mapping of a user namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ids {
    /// Only the calling user, as itself.
    Same,
    /// The 65,536 ids of a system. If root makes the namespace, root inside is
    /// `FIRST` outside; otherwise it is the calling user.
    System,
}

/// A user namespace, with or without its own network namespace.
#[derive(Debug)]
pub struct Namespaces {
    user: OwnedFd,
    net: Option<OwnedFd>,
    ids: Ids,
    /// The process that holds them.
    holder: u32,
    /// The holder, if this value owns it. It ends when its input is closed.
    own: Option<(Child, Option<ChildStdin>)>,
}

impl Namespaces {
    /// Makes both namespaces. Takes some milliseconds.
    ///
    /// # Errors
    ///
    /// The kernel or the system's settings forbid them, or this user has no
    /// subordinate ids.
    pub fn new(ids: Ids) -> io::Result<Self> {
        Self::make(ids, true)
    }

    /// Makes a user namespace only. Its programs have the host's network.
    ///
    /// # Errors
    ///
    /// As for [`Self::new`].
    pub fn of_users(ids: Ids) -> io::Result<Self> {
        Self::make(ids, false)
    }

    fn make(ids: Ids, network: bool) -> io::Result<Self> {
        let root = rustix::process::geteuid().is_root();
        let mut command = super::command(Path::new("/bin/cat")).into_std();
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        let leave = root && ids == Ids::System;
        // SAFETY: the closure makes system calls only.
        unsafe {
            command.pre_exec(move || {
                if leave {
                    // The namespace belongs to the user that makes it.
                    become_id(FIRST)?;
                }
                if !network {
                    return Ok(unshare_unsafe(UnshareFlags::NEWUSER)?);
                }
                unshare_unsafe(UnshareFlags::NEWUSER | UnshareFlags::NEWNET)?;
                loopback()
            });
        }
        let mut holder = command.spawn()?;
        let gate = holder.stdin.take();
        match map(holder.id(), ids, root).and_then(|()| Self::of(holder.id(), ids)) {
            Ok(mut made) => {
                if !network {
                    made.net = None;
                }
                made.own = Some((holder, gate));
                Ok(made)
            }
            Err(error) => {
                drop(gate);
                let _ = holder.wait();
                Err(error)
            }
        }
    }

    /// Opens the namespaces of another process.
    ///
    /// # Errors
    ///
    /// The process has ended, or belongs to another user.
    pub fn of(holder: u32, ids: Ids) -> io::Result<Self> {
        let open = |kind: &str| File::open(format!("/proc/{holder}/ns/{kind}")).map(OwnedFd::from);
        Ok(Self { user: open("user")?, net: Some(open("net")?), ids, holder, own: None })
    }

    /// The process that holds them, for programs that need a path in `/proc`.
    pub fn holder(&self) -> u32 {
        self.holder
    }

    /// The user namespace, for an id-mapped mount.
    pub fn user(&self) -> BorrowedFd<'_> {
        self.user.as_fd()
    }

    /// Starts a program in both, as their root if they have one.
    pub fn enter(&self, command: &mut Command) {
        let (user, net, ids) = (self.user.as_raw_fd(), self.net.as_ref().map(AsRawFd::as_raw_fd), self.ids);
        // SAFETY: the closure makes system calls only; the descriptors stay
        // open in the parent until the child has been spawned.
        unsafe {
            command.pre_exec(move || {
                join(user, LinkNameSpaceType::User)?;
                if let Some(net) = net {
                    join(net, LinkNameSpaceType::Network)?;
                }
                if ids == Ids::System { become_id(0) } else { Ok(()) }
            });
        }
    }

    /// Starts a program in both that configures the network.
    pub fn administer(&self, command: &mut Command) {
        self.enter(command);
        if self.ids == Ids::Same {
            // A process that is not root loses its capabilities at exec.
            unsafe { command.pre_exec(|| keep_only(CapabilitySet::NET_ADMIN)) };
        }
    }

    /// Starts a program in the network namespace without changing its user. An
    /// ordinary user must also join the user namespace.
    pub fn enter_network(&self, command: &mut Command) {
        if !rustix::process::geteuid().is_root() {
            return self.enter(command);
        }
        let Some(net) = self.net.as_ref().map(AsRawFd::as_raw_fd) else { return };
        // SAFETY: as above.
        unsafe { command.pre_exec(move || join(net, LinkNameSpaceType::Network)) };
    }

    /// Runs a program of the host as the owner of the namespaces. With
    /// `listens` it may use ports below 1024 if this user may.
    pub fn own(&self, command: &mut Command, listens: bool) {
        if rustix::process::geteuid().is_root() && self.ids == Ids::System {
            // SAFETY: as above.
            unsafe {
                command.pre_exec(move || {
                    if !listens {
                        return become_id(FIRST);
                    }
                    libc::prctl(libc::PR_SET_KEEPCAPS, 1);
                    become_id(FIRST)?;
                    keep_only(CapabilitySet::NET_BIND_SERVICE)
                })
            };
        }
    }
}

impl Drop for Namespaces {
    fn drop(&mut self) {
        if let Some((mut holder, gate)) = self.own.take() {
            drop(gate);
            let _ = holder.wait();
        }
    }
}

/// Drops all other capabilities of a process. It keeps `rights` over its next
/// exec.
fn keep_only(rights: CapabilitySet) -> io::Result<()> {
    let sets = CapabilitySets { effective: rights, permitted: rights, inheritable: rights };
    set_capabilities(None, sets)?;
    configure_capability_in_ambient_set(rights, true)?;
    Ok(())
}

fn join(namespace: RawFd, kind: LinkNameSpaceType) -> io::Result<()> {
    // SAFETY: the descriptor is open; see the callers.
    let namespace = unsafe { BorrowedFd::borrow_raw(namespace) };
    move_into_link_name_space(namespace, Some(kind)).map_err(Into::into)
}

/// Brings up the loopback interface of a new network namespace.
fn loopback() -> io::Result<()> {
    // SAFETY: the structure is plain numbers, and outlives the calls; the
    // socket ends with the process or its exec.
    unsafe {
        let socket = libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0);
        let mut request: libc::ifreq = std::mem::zeroed();
        for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
            *to = *from as libc::c_char;
        }
        request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
        if socket >= 0 && libc::ioctl(socket, libc::SIOCSIFFLAGS, &raw const request) == 0 {
            return Ok(());
        }
    }
    Err(io::Error::last_os_error())
}

/// Changes user and group to `id`, irrevocably.
fn become_id(id: u32) -> io::Result<()> {
    // SAFETY: the calls take numbers and an empty list. libc's own functions
    // would also change other threads, of which this process has none.
    let done = unsafe {
        libc::syscall(libc::SYS_setgroups, 0usize, std::ptr::null::<libc::gid_t>()) == 0
            && libc::syscall(libc::SYS_setresgid, id, id, id) == 0
            && libc::syscall(libc::SYS_setresuid, id, id, id) == 0
    };
    if done { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Writes the id maps of the user namespace of the process `holder`
/// (user_namespaces(7)).
fn map(holder: u32, ids: Ids, root: bool) -> io::Result<()> {
    let write = |file: &str, text: String| std::fs::write(format!("/proc/{holder}/{file}"), text);
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    match ids {
        Ids::Same => {
            write("setgroups", "deny".into())?;
            write("gid_map", format!("{gid} {gid} 1"))?;
            write("uid_map", format!("{uid} {uid} 1"))
        }
        Ids::System if root => {
            write("gid_map", format!("0 {FIRST} {COUNT}"))?;
            write("uid_map", format!("0 {FIRST} {COUNT}"))
        }
        Ids::System => {
            map_by("newgidmap", holder, gid, &subordinate("/etc/subgid"))?;
            map_by("newuidmap", holder, uid, &subordinate("/etc/subuid"))
        }
    }
}

/// Writes a map with newuidmap or newgidmap, which may use the ids that an
/// administrator gave this user.
fn map_by(program: &str, holder: u32, own: u32, ranges: &[(u32, u32)]) -> io::Result<()> {
    let path = super::find(program)
        .ok_or_else(|| io::Error::other(format!("`{program}` is not installed (package uidmap)")))?;
    let mut command = super::command(&path).into_std();
    command.arg(holder.to_string()).args(["0", &own.to_string(), "1"]);
    let mut inside = 1;
    for (first, count) in ranges {
        let count = (*count).min(COUNT - inside);
        if count > 0 {
            command.args([inside, *first, count].map(|n| n.to_string()));
        }
        inside += count;
    }
    let output = command.stdin(Stdio::null()).output()?;
    if output.status.success() {
        return Ok(());
    }
    Err(io::Error::other(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
}

/// Tests whether this user may make namespaces, once.
///
/// # Errors
///
/// What failed, and what to do about it.
pub fn allowed() -> Result<(), (String, String)> {
    static ALLOWED: OnceLock<Result<(), String>> = OnceLock::new();
    let ids = if rustix::process::geteuid().is_root() { Ids::System } else { Ids::Same };
    let tried = ALLOWED.get_or_init(|| Namespaces::new(ids).map(drop).map_err(|e| e.to_string()));
    tried.clone().map_err(|why| {
        (format!("vimg can't create user and network namespaces on this host: {why}"), advice().to_owned())
    })
}

/// Advises on the host setting that most likely forbids user namespaces.
fn advice() -> &'static str {
    let setting = |name: &str| std::fs::read_to_string(Path::new("/proc/sys").join(name)).unwrap_or_default();
    let is = |name: &str, value: &str| setting(name).trim() == value;
    if is("kernel/apparmor_restrict_unprivileged_userns", "1") {
        "as root: sysctl kernel.apparmor_restrict_unprivileged_userns=0"
    } else if is("kernel/unprivileged_userns_clone", "0") {
        "as root: sysctl kernel.unprivileged_userns_clone=1"
    } else if is("user/max_user_namespaces", "0") {
        "as root: sysctl user.max_user_namespaces=10000"
    } else {
        "in a container, its seccomp profile may forbid them (docker run --privileged)"
    }
}

/// The subordinate ids of this user, as first and count (subuid(5)).
pub fn subordinate(file: &str) -> Vec<(u32, u32)> {
    let uid = rustix::process::geteuid().as_raw().to_string();
    let passwd = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    let name = passwd
        .lines()
        .map(|line| line.split(':').collect::<Vec<_>>())
        .find(|fields| fields.get(2) == Some(&uid.as_str()))
        .map_or_else(|| uid.clone(), |fields| fields[0].to_owned());
    let text = std::fs::read_to_string(file).unwrap_or_default();
    let range = |line: &str| {
        let mut fields = line.trim().split(':');
        let owner = fields.next().filter(|owner| *owner == name || *owner == uid);
        owner.and_then(|_| Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?)))
    };
    text.lines().filter_map(range).collect()
}

/// Removes a tree, even if files belong to subordinate ids of this user.
///
/// # Errors
///
/// Errors of the system.
pub fn remove_tree(path: &Path) -> io::Result<()> {
    // Killed processes may still write for a moment.
    let mut tries = 100;
    let denied = loop {
        match std::fs::remove_dir_all(path) {
            Err(e) if e.kind() == io::ErrorKind::DirectoryNotEmpty && tries > 0 => {
                tries -= 1;
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => break e,
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => return Ok(()),
        }
    };
    if rustix::process::geteuid().is_root() {
        return Err(denied);
    }
    let inside = Namespaces::of_users(Ids::System)?;
    let mut command = super::command(Path::new("/bin/rm")).into_std();
    command.args(["-rf", "--"]).arg(path).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    inside.enter(&mut command);
    if command.status()?.success() { Ok(()) } else { Err(denied) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn root_inside_has_another_id_outside() {
        // Some hosts forbid user namespaces to some users.
        let Ok(made) = Namespaces::new(Ids::System) else { return };
        let mut command = super::super::command(Path::new("/bin/sh"));
        command
            .args(["-c", "id -u; cat /proc/self/uid_map; ls /sys/class/net | wc -l; wc -l </proc/net/dev"]);
        made.enter(command.as_std_mut());
        let output = command.output().await.unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let mut lines = text.lines();
        assert_eq!(lines.next(), Some("0"), "{text}{}", String::from_utf8_lossy(&output.stderr));
        let outside: u32 = lines.next().unwrap().split_whitespace().nth(1).unwrap().parse().unwrap();
        let root = rustix::process::geteuid().is_root();
        assert_eq!(outside, if root { FIRST } else { rustix::process::geteuid().as_raw() });
        // Two lines of heading, and the loopback.
        assert_eq!(text.lines().last(), Some("3"));
    }
}

//! The first process of a container: `bwrap`, which starts the agent in its
//! namespaces, with a filter for system calls.

use std::ffi::{CStr, OsStr, OsString};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use rustix::fs::{FileType, MemfdFlags, Mode};
use rustix::mount::{MoveMountFlags, move_mount};
use tokio::net::UnixStream;
use tokio::process::{Child, Command};
use vimg_agent::protocol::CAPABILITIES;

use super::mount::Mounted;
use super::seccomp;
use crate::agent;
use crate::host::cgroup::{self, Group};
use crate::host::namespaces::Namespaces;
use crate::host::network::Gateway;
use crate::host::{self, HostError, child};

/// The path of the agent's program inside, and the descriptors that pass the
/// agent, the filter and `bwrap` itself.
const AGENT_PATH: &str = "/run/vimg/agent";
const AGENT_FD: i32 = 100;
const FILTER_FD: i32 = 101;
const BWRAP_FD: i32 = 102;

/// The network of a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    None,
    Gateway,
    Host,
}

/// The network, the namespaces and the control group of a container's first
/// process.
pub(super) struct Inside<'a> {
    pub(super) network: Way,
    pub(super) users: Option<&'a Namespaces>,
    pub(super) gateway: Option<&'a Gateway>,
    pub(super) group: Option<&'a Group>,
}

/// Files of `/proc` that show the host or reach its kernel, as container
/// engines hide them (moby's `DefaultMaskedPaths`).
const HIDDEN: &[&str] = &[
    "acpi",
    "asound",
    "interrupts",
    "kcore",
    "keys",
    "latency_stats",
    "mtrr",
    "pressure",
    "sched_debug",
    "scsi",
    "timer_list",
    "timer_stats",
];
/// Directories and files of `/proc` that are read-only.
const READ_ONLY: &[&str] = &["bus", "fs", "irq", "sys", "sysrq-trigger"];

/// Nodes of `/dev`: name, major and minor number (Linux's `devices.txt`).
const NODES: [(&str, u32, u32); 6] =
    [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];

/// Temporary mount point of the disk. The mapped root can't reach into the store.
const STAGE: &CStr = c"/tmp";

/// Starts `bwrap` (a program of the host), and in it the agent. Returns the
/// agent's connection, and the process. Device nodes are made in `scratch`.
pub(super) fn spawn(
    bwrap: &Path,
    mounted: &Mounted,
    scratch: &Path,
    inside: &Inside,
) -> Result<(UnixStream, Child), HostError> {
    let fail = |e: io::Error| HostError::io("can't run bwrap", &e);
    let filter = seccomp::filter().map_err(|e| HostError::new(format!("the seccomp filter: {e}")))?;
    let (agent, filter) = (memory(agent::PROGRAM).map_err(fail)?, memory(&filter).map_err(fail)?);
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().map_err(fail)?;
    ours.set_nonblocking(true).map_err(fail)?;
    // If root inside is the host's root, its first process must not be a
    // program file of the host, and it must not get the host's device nodes.
    let copy = match inside.users {
        Some(_) => None,
        None => Some(memory(&std::fs::read(bwrap).map_err(fail)?).map_err(fail)?),
    };
    let program = match &copy {
        Some(_) => PathBuf::from(format!("/proc/self/fd/{BWRAP_FD}")),
        None => bwrap.to_owned(),
    };
    let own_nodes = copy.as_ref().map(|_| scratch);
    if let Some(dir) = own_nodes {
        nodes(dir).map_err(|e| HostError::io("can't create device nodes", &e))?;
    }
    let mut command = host::command(&program);
    // A container can read the environment of its first process in
    // /proc/1/environ.
    command.env_clear();
    command.args(isolation(mounted, inside.network));
    command.args(mounts(own_nodes));
    command.args(["--seccomp", &FILTER_FD.to_string(), "--chdir", "/", "--clearenv"]);
    command.args([AGENT_PATH, "container"]);
    command
        .stdin(OwnedFd::from(theirs))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true);
    let mut parts = vec![(agent.as_raw_fd(), AGENT_FD), (filter.as_raw_fd(), FILTER_FD)];
    parts.extend(copy.as_ref().map(|copy| (copy.as_raw_fd(), BWRAP_FD)));
    enter(&mut command, mounted, inside, parts);
    let child = command.spawn().map_err(fail)?;
    drop(command);
    let ours = UnixStream::from_std(ours).map_err(fail)?;
    Ok((ours, child))
}

/// Arguments of `bwrap`: its namespaces, name and capabilities.
fn isolation(mounted: &Mounted, network: Way) -> Vec<String> {
    let mut args: Vec<&str> = vec!["--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"];
    if network == Way::None {
        args.push("--unshare-net");
    }
    let hostname = mounted.read("etc/hostname");
    if let Some(name) = hostname.as_deref().map(str::trim).filter(|n| is_hostname(n)) {
        args.extend(["--hostname", name]);
    }
    args.extend(["--die-with-parent", "--new-session", "--cap-drop", "ALL"]);
    let mut args: Vec<String> = args.into_iter().map(str::to_owned).collect();
    for capability in CAPABILITIES {
        args.extend(["--cap-add".to_owned(), format!("CAP_{capability}")]);
    }
    args
}

/// Arguments of `bwrap`: its mounts. `own_nodes` is the directory of the device
/// nodes, if the container must not get those of the host.
fn mounts(own_nodes: Option<&Path>) -> Vec<OsString> {
    let mut args: Vec<OsString> = Vec::new();
    let mut add = |words: &[&OsStr]| args.extend(words.iter().map(|word| (*word).to_owned()));
    add(&["--bind".as_ref(), OsStr::from_bytes(STAGE.to_bytes()), "/".as_ref()]);
    add(&["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/run"].map(OsStr::new));
    for (name, ..) in NODES.iter().filter(|_| own_nodes.is_some()) {
        let from = own_nodes.map(|dir| dir.join(name)).unwrap_or_default();
        add(&["--dev-bind".as_ref(), from.as_os_str(), Path::new("/dev").join(name).as_os_str()]);
    }
    let there = |name: &&&str| Path::new("/proc").join(name).exists();
    for name in HIDDEN.iter().filter(there) {
        let path = format!("/proc/{name}");
        if Path::new(&path).is_dir() {
            add(&["--tmpfs", &path, "--remount-ro", &path].map(OsStr::new));
        } else {
            add(&["--ro-bind", "/dev/null", &path].map(OsStr::new));
        }
    }
    // bwrap covers these only if access(2) says that they are writable. The
    // kernel denies that for a root that can write them all the same.
    for name in READ_ONLY.iter().filter(there) {
        let path = format!("/proc/{name}");
        add(&["--ro-bind-try", &path, &path].map(OsStr::new));
    }
    add(&["--perms", "0555", "--ro-bind-data", &AGENT_FD.to_string(), AGENT_PATH].map(OsStr::new));
    args
}

/// Makes a process enter its namespaces and its control group before it becomes
/// `bwrap`, with the disk at [`STAGE`] and the descriptors `parts` (from, to),
/// which must stay open until it is spawned.
fn enter(command: &mut Command, mounted: &Mounted, inside: &Inside, parts: Vec<(i32, i32)>) {
    let mount = mounted.mount.as_raw_fd();
    match inside.group {
        Some(group) => group.enter(command.as_std_mut()),
        None => cgroup::limit_processes(command.as_std_mut()),
    }
    // SAFETY: the closure makes system calls only; the descriptors stay open
    // in the parent until the child has been spawned.
    unsafe {
        command.pre_exec(move || {
            host::own_mounts()?;
            move_mount(
                BorrowedFd::borrow_raw(mount),
                c"",
                rustix::fs::CWD,
                STAGE,
                MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
            )?;
            Ok(())
        });
    }
    match (inside.users, inside.gateway) {
        (Some(users), _) => users.enter(command.as_std_mut()),
        (None, Some(gateway)) => gateway.namespaces().enter_network(command.as_std_mut()),
        (None, None) => {}
    }
    // SAFETY: as above.
    unsafe {
        command.pre_exec(move || {
            for (from, to) in &parts {
                let mut to = std::mem::ManuallyDrop::new(OwnedFd::from_raw_fd(*to));
                // dup2 leaves the copy open over exec.
                rustix::io::dup2(BorrowedFd::borrow_raw(*from), &mut to)?;
            }
            Ok(())
        });
    }
    // Must come last: a change of user clears the death signal.
    child::die_with_us(command);
}

/// Makes device nodes in a directory.
fn nodes(dir: &Path) -> io::Result<()> {
    for (name, major, minor) in NODES {
        let (path, mode) = (dir.join(name), Mode::from_raw_mode(0o666));
        let device = rustix::fs::makedev(major, minor);
        rustix::fs::mknodat(rustix::fs::CWD, &path, FileType::CharacterDevice, mode, device)?;
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o666))?;
    }
    Ok(())
}

fn is_hostname(name: &str) -> bool {
    !name.is_empty()
        && name.len() < 64
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'.')
}

/// Makes a file in memory.
fn memory(bytes: &[u8]) -> io::Result<File> {
    use std::io::Seek;
    let mut file = File::from(rustix::fs::memfd_create("vimg", MemfdFlags::CLOEXEC)?);
    file.write_all(bytes)?;
    file.rewind()?;
    // Above the numbers that the child uses.
    let high = rustix::io::fcntl_dupfd_cloexec(&file, 2 * AGENT_FD)?;
    Ok(File::from(high))
}

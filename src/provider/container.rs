//! Applies layers in a container, with the host's own kernel: native speed
//! where machines are emulated.
//!
//! `qemu-storage-daemon` exports the overlay as a plain file, the kernel mounts
//! its filesystem, and the agent works in namespaces that `bwrap` makes: it has
//! its own processes, names and mounts, no devices, few capabilities, and a
//! seccomp filter. The host's kernel mounts only filesystems that were made
//! here.

use std::ffi::{CStr, OsStr};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{FileType, MemfdFlags, Mode};
use rustix::mount::{MoveMountFlags, move_mount};
use serde_json::json;
use tokio::net::UnixStream;
use tokio::process::Child;
use vimg_agent::protocol::{CAPABILITIES, Network};

use super::qemu::{Disks, Monitor, Programs};
use super::{Ended, Instance, Launch, Place};
use crate::agent;
use crate::disk::layout::Layout;
use crate::host::cgroup::{self, Bounds, Group};
use crate::host::child::{self, Tail};
use crate::host::namespaces::{Ids, Namespaces};
use crate::host::network::{self, Access, Gateway, WayOut};
use crate::host::{self, HostError, space};

mod mount;
mod seccomp;

/// Timeout for exporting the disk.
const OPENING: Duration = Duration::from_secs(20);

/// The log of `qemu-storage-daemon`, in the scratch directory.
const LOG: &str = "daemon.log";
/// How much output of `bwrap` is remembered, in bytes.
const WORDS: usize = 8 << 10;

/// The path of the agent's program inside, and the descriptors that pass the
/// agent, the filter and `bwrap` itself.
const AGENT_PATH: &str = "/run/vimg/agent";
const AGENT_FD: i32 = 100;
const FILTER_FD: i32 = 101;
const BWRAP_FD: i32 = 102;

/// The programs that run containers.
#[derive(Debug, Clone)]
pub(super) struct Engine {
    bwrap: PathBuf,
    daemon: PathBuf,
    version: String,
    /// Whether root inside is unprivileged on the host.
    mapped: bool,
}

impl Engine {
    /// Finds what is needed to run containers on disks of a store that only
    /// root owns (`owned`). The error says why containers are not possible.
    pub(super) async fn allowed(owned: bool) -> Result<Self, HostError> {
        if !rustix::process::geteuid().is_root() {
            return Err(HostError::new("only root may mount filesystems"));
        }
        if !owned {
            return Err(HostError::new(
                "users other than root can write to the store or to a directory above it",
            )
            .help("fix the owner and mode of these directories, or use another store"));
        }
        // Otherwise the limit would be an input of the layer that its key does
        // not contain.
        if let Some(most) = host::too_few_files() {
            let why = format!("this process may open only {most} files, fewer than a layer is allowed");
            return Err(HostError::new(why).help("raise the hard limit: ulimit -Hn 4096"));
        }
        let find = |name: &str, package: &str| {
            host::find(name).ok_or_else(|| {
                HostError::new(format!("`{name}` is not installed"))
                    .help(format!("install it: apt-get install {package}"))
            })
        };
        let bwrap = find("bwrap", "bubblewrap")?;
        let daemon = find("qemu-storage-daemon", "qemu-utils")?;
        for device in ["/dev/fuse", "/dev/loop-control"] {
            File::options()
                .read(true)
                .write(true)
                .open(device)
                .map_err(|e| HostError::new(format!("{device}: {e}")))?;
        }
        // This fails where namespaces are forbidden.
        let users = Namespaces::new(Ids::System).ok();
        let mut output = try_bwrap(&bwrap, users.as_ref()).await?;
        let mapped = users.is_some() && output.status.success() && maps_ids();
        if users.is_some() && !mapped {
            output = try_bwrap(&bwrap, None).await?;
        }
        if !output.status.success() {
            let words = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            return Err(HostError::new(format!("can't create namespaces: {words}")));
        }
        let text = String::from_utf8_lossy(&output.stdout);
        let version = text.split_whitespace().last().unwrap_or("unknown").to_owned();
        Ok(Self { bwrap, daemon, version, mapped })
    }

    /// Describes the isolation.
    pub(super) fn isolation(&self) -> String {
        let who = if self.mapped {
            "is unprivileged on the host"
        } else {
            "is the host's root without most capabilities"
        };
        match Group::bounds() {
            // The kernel exempts the host's root from RLIMIT_NPROC.
            Bounds::Processes if !self.mapped => format!("root inside {who}; no limits"),
            bounds => format!("root inside {who}; limits: {bounds}"),
        }
    }

    /// The runner's name for records.
    pub(super) fn name(&self) -> String {
        format!("container, bwrap {}", self.version)
    }
}

/// Whether the kernel supports id-mapped mounts of ext4 (since Linux 5.12).
fn maps_ids() -> bool {
    let uname = rustix::system::uname();
    let mut parts = uname.release().to_str().unwrap_or_default().split(['.', '-']).map(str::parse::<u32>);
    matches!((parts.next(), parts.next()), (Some(Ok(major)), Some(Ok(minor))) if (major, minor) >= (5, 12))
}

/// Runs `bwrap --version` in a container, as a test.
async fn try_bwrap(bwrap: &Path, users: Option<&Namespaces>) -> Result<std::process::Output, HostError> {
    let mut command = host::command(bwrap);
    command
        .args(["--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-net", "--ro-bind", "/", "/"])
        .args(["--proc", "/proc", "--dev", "/dev"])
        .arg(bwrap)
        .arg("--version")
        .stdin(Stdio::null());
    if let Some(users) = users {
        users.enter(command.as_std_mut());
    }
    command.output().await.map_err(|e| HostError::io("can't run bwrap", &e))
}

/// A running container.
pub struct ContainerInstance {
    agent: Option<UnixStream>,
    bwrap: Child,
    mounted: Option<mount::Mounted>,
    daemon: Child,
    monitor: Monitor,
    disks: Disks,
    words: Tail,
    network: Option<Network>,
    way_out: WayOut,
    way: String,
    scratch: PathBuf,
    /// Its control group; must be dropped last.
    _group: Option<Group>,
}

/// Starts a container on a disk.
pub(super) async fn start(
    engine: &Engine,
    programs: &Programs,
    launch: &Launch,
    access: &Access,
) -> Result<ContainerInstance, HostError> {
    let scratch = &launch.scratch;
    let disks = Disks::new(programs, launch).await?;
    let fail = |what: &'static str| {
        move |e: io::Error| HostError::io(format_args!("can't start the container: {what}"), &e)
    };
    let (shown, root) = (scratch.join("shown"), scratch.join("root"));
    File::create(&shown).map_err(fail("its disk"))?;
    std::fs::create_dir(&root).map_err(fail("its root"))?;
    let mut daemon = spawn_daemon(engine, &disks, launch, &shown)?;
    let connected = tokio::time::timeout(OPENING, Monitor::wait(scratch, "qmp", &mut daemon)).await;
    let Ok(Some(monitor)) = connected else {
        let words = child::last_words(&scratch.join(LOG));
        return Err(HostError::new(format!("qemu-storage-daemon does not start: {words}")));
    };
    let monitor = monitor?;
    // The export is visible in the daemon's mount namespace only.
    let pid = daemon.id().ok_or_else(|| HostError::new("qemu-storage-daemon ended"))?;
    let seen = format!("/proc/{pid}/root{}", shown.display());
    let disk = File::options().read(true).write(true).open(&seen).map_err(fail("its disk"))?;
    let root_at = Layout::of_chain(&launch.chain).map_err(fail("its disk"))?.root;
    let mut users = match engine.mapped {
        true => {
            // If the host's network is used directly, it needs no namespace.
            let shared = launch.network && access.reach.all;
            let made = if shared { Namespaces::of_users } else { Namespaces::new };
            Some(Arc::new(made(Ids::System).map_err(fail("its namespaces"))?))
        }
        false => None,
    };
    let (first, size) = (root_at.start, root_at.end - root_at.start);
    let mount = |users: Option<Arc<Namespaces>>| {
        let disk = disk.try_clone();
        tokio::task::spawn_blocking(move || {
            mount::Mounted::new(&disk?, first, size, users.as_ref().map(|users| users.user()))
        })
    };
    let broken = |e: tokio::task::JoinError| HostError::new(e.to_string());
    let mut mounted = mount(users.clone()).await.map_err(broken)?;
    let mut way = engine.name();
    if mounted.as_ref().is_err_and(|e| e.kind() == io::ErrorKind::Unsupported) && users.is_some() {
        users = None;
        way.push_str(" (the kernel can't map its ids)");
        mounted = mount(None).await.map_err(broken)?;
    }
    let mounted = mounted.map_err(fail("mount"))?;
    if mounted.has("boot/efi") {
        mounted.release();
        let _ = daemon.kill().await;
        return Err(HostError::new("the image has a second filesystem, at /boot/efi"));
    }
    let gateway = match (launch.network && !access.reach.all, &users) {
        (false, _) => None,
        (true, Some(users)) => Some(access.gateway_in(users.clone(), &[]).await?),
        (true, None) => access.gateway(Ids::System).await?,
    };
    let group = Group::new(host::memory() / 4 * 3).ok();
    let inside = Inside { users: users.as_deref(), gateway: gateway.as_ref(), group: group.as_ref() };
    let network = match (launch.network, &gateway) {
        (false, _) => Way::None,
        (true, Some(_)) => Way::Gateway,
        (true, None) => Way::Host,
    };
    let (agent, mut bwrap) = spawn_agent(engine, &mounted, &root, network, &inside)?;
    let err = bwrap.stderr.take().ok_or_else(|| HostError::new("bwrap ended"))?;
    Ok(ContainerInstance {
        agent: Some(agent),
        bwrap,
        mounted: Some(mounted),
        daemon,
        monitor,
        disks,
        words: Tail::of(err, WORDS),
        network: launch.network.then(|| resolver(gateway.is_some())),
        way_out: access.way_out(gateway, "127.0.0.1"),
        way,
        scratch: scratch.clone(),
        _group: group,
    })
}

/// Uses the resolver of the gateway, or that of the host.
fn resolver(gateway: bool) -> Network {
    let resolv_conf = match gateway {
        true => format!("nameserver {}\n", network::RESOLVER),
        false => std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default(),
    };
    Network { resolv_conf }
}

/// Starts the daemon that exports the disk, in its own mount namespace, which
/// ends with it. No mount is left, however vimg ends.
fn spawn_daemon(engine: &Engine, disks: &Disks, launch: &Launch, shown: &Path) -> Result<Child, HostError> {
    let fail = |e: io::Error| HostError::io("can't run qemu-storage-daemon", &e);
    let log = launch.scratch.join(LOG);
    let mut command = child::daemon(&engine.daemon, &launch.scratch, &log, false).map_err(fail)?;
    for node in disks.nodes(launch) {
        command.args(["--blockdev", &node.to_string()]);
    }
    let export = json!({
        "type": "fuse", "id": "shown", "node-name": disks.top(), "mountpoint": shown, "writable": true,
    });
    // The monitor comes last: when it accepts connections, the disk is
    // exported.
    command
        .args(["--export", &export.to_string()])
        .args(["--chardev", "socket,id=qmp,path=qmp,server=on,wait=off"])
        .args(["--monitor", "chardev=qmp,mode=control"]);
    // SAFETY: the closure makes system calls only.
    unsafe { command.pre_exec(host::own_mounts) };
    command.spawn().map_err(fail)
}

/// The network of a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    None,
    Gateway,
    Host,
}

/// The namespaces and the control group of a container's first process.
struct Inside<'a> {
    users: Option<&'a Namespaces>,
    gateway: Option<&'a Gateway>,
    group: Option<&'a Group>,
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

fn spawn_agent(
    engine: &Engine,
    mounted: &mount::Mounted,
    scratch: &Path,
    network: Way,
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
        None => Some(memory(&std::fs::read(&engine.bwrap).map_err(fail)?).map_err(fail)?),
    };
    let program = match &copy {
        Some(_) => PathBuf::from(format!("/proc/self/fd/{BWRAP_FD}")),
        None => engine.bwrap.clone(),
    };
    let mut command = host::command(&program);
    // A container can read the environment of its first process in
    // /proc/1/environ.
    command.env_clear();
    command.args(["--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]);
    if network == Way::None {
        command.arg("--unshare-net");
    }
    if let Some(name) = mounted.read("etc/hostname").as_deref().map(str::trim).filter(|n| is_hostname(n)) {
        command.args(["--hostname", name]);
    }
    command.args(["--die-with-parent", "--new-session", "--cap-drop", "ALL"]);
    for capability in CAPABILITIES {
        command.args(["--cap-add", &format!("CAP_{capability}")]);
    }
    command.arg("--bind").arg(OsStr::from_bytes(STAGE.to_bytes())).arg("/");
    command.args(["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/run"]);
    if copy.is_some() {
        nodes(scratch).map_err(|e| HostError::io("can't create device nodes", &e))?;
        for (name, ..) in NODES {
            command.arg("--dev-bind").arg(scratch.join(name)).arg(Path::new("/dev").join(name));
        }
    }
    let there = |name: &&&str| Path::new("/proc").join(name).exists();
    for name in HIDDEN.iter().filter(there) {
        let path = format!("/proc/{name}");
        if Path::new(&path).is_dir() {
            command.args(["--tmpfs", &path, "--remount-ro", &path]);
        } else {
            command.args(["--ro-bind", "/dev/null", &path]);
        }
    }
    // bwrap covers these only if access(2) says that they are writable. The
    // kernel denies that for a root that can write them all the same.
    for name in READ_ONLY.iter().filter(there) {
        let path = format!("/proc/{name}");
        command.args(["--ro-bind-try", &path, &path]);
    }
    command.args(["--perms", "0555", "--ro-bind-data", &AGENT_FD.to_string(), AGENT_PATH]);
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
    child::die_with_us(&mut command);
    let child = command.spawn().map_err(fail)?;
    drop(command);
    let ours = UnixStream::from_std(ours).map_err(fail)?;
    Ok((ours, child))
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

impl ContainerInstance {
    /// Whether the host's disk with the overlay is full.
    fn host_is_full(&self) -> bool {
        space::is_scarce(&self.scratch)
    }
}

impl Instance for ContainerInstance {
    type Channel = UnixStream;

    fn runner(&self) -> String {
        self.way.clone()
    }

    fn place(&self) -> Place {
        Place::Outside(self.network.clone())
    }

    fn channel(&mut self) -> Option<UnixStream> {
        self.agent.take()
    }

    async fn snapshot(&mut self, next: &Path) -> Result<(), HostError> {
        let full = self.host_is_full();
        let fail = |e: io::Error| {
            // The kernel sees only that its device failed.
            let error = HostError::io("can't write the layer to its disk", &e);
            HostError { is_full: error.is_full || full, ..error }
        };
        let mounted =
            self.mounted.as_ref().ok_or_else(|| HostError::new("the container has already stopped"))?;
        self.disks.add(&mut self.monitor, next).await?;
        mounted.sync().map_err(fail)?;
        // Dropping it thaws the filesystem, whatever happens.
        let held = mounted.hold().map_err(fail)?;
        let switched = self.disks.switch(&mut self.monitor).await;
        drop(held);
        switched
    }

    fn guards_disk(&self) -> bool {
        true
    }

    fn way_out(&self) -> WayOut {
        self.way_out.clone()
    }

    fn trim(&self) {
        if let Some(mounted) = &self.mounted {
            mounted.trim();
        }
    }

    async fn ended(&mut self) -> Ended {
        tokio::select! {
            _ = self.daemon.wait() => {
                Ended::Killed(format!("qemu-storage-daemon: {}", child::last_words(&self.scratch.join(LOG))))
            }
            _ = self.bwrap.wait() => {
                if self.host_is_full() {
                    return Ended::HostDiskFull;
                }
                // Its last output may still be on its way.
                tokio::time::sleep(Duration::from_millis(50)).await;
                let said = self.words.text().trim().to_owned();
                if said.is_empty() { Ended::AgentGone } else { Ended::Killed(said) }
            }
        }
    }

    fn console_since(&self, seen: u64) -> (u64, Vec<u8>) {
        self.words.since(seen)
    }

    async fn stop(mut self) {
        let _ = self.bwrap.kill().await;
        if let Some(mounted) = self.mounted.take() {
            let _ = tokio::task::spawn_blocking(move || mounted.release()).await;
        }
        let _ = self.daemon.kill().await;
    }
}

/// Stops from the top down, so that the kernel is not left with a filesystem
/// without a disk.
impl Drop for ContainerInstance {
    fn drop(&mut self) {
        let _ = self.bwrap.start_kill();
        if let Some(mounted) = self.mounted.take() {
            mounted.release();
        }
        let _ = self.daemon.start_kill();
    }
}

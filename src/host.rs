//! Finds programs of the host, and starts them with nothing of the caller but
//! their arguments.
//!
//! This is the only place that makes a [`Command`]. It decides what a program
//! inherits: an environment of a few names, only descriptors that it gets on
//! purpose, a fixed umask, fixed limits, default signals. The caller's settings
//! can thus neither leak to guests nor change what a build makes. This module
//! knows nothing of disks and recipes. Only `keeper` knows of machines: it
//! holds the network of a server.

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use rustix::fs::Mode;
use rustix::mount::{MountPropagationFlags, mount_change};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{UnshareFlags, unshare_unsafe};
use tokio::process::Command;

pub mod space;
pub mod limits;
pub mod cgroup;
pub mod child;
mod error;
pub mod namespaces;
pub mod network;
pub(crate) mod sockets;
pub mod keeper;
pub mod version;

pub use error::{HostError, Lines};

/// Directories with programs for administrators, which are not in an ordinary
/// user's PATH.
const ADMIN: [&str; 3] = ["/usr/local/sbin", "/usr/sbin", "/sbin"];

/// Finds a program in PATH and in the directories for administrators.
pub fn find(name: &str) -> Option<PathBuf> {
    use std::os::unix::fs::PermissionsExt;
    std::env::split_paths(search_path())
        .map(|dir| dir.join(name))
        .find(|file| file.metadata().is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0))
}

/// The directories to search. Relative directories are left out, because they
/// would be in the checkout.
fn search_path() -> &'static OsString {
    static PATH: OnceLock<OsString> = OnceLock::new();
    PATH.get_or_init(|| {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let dirs = std::env::split_paths(&path).chain(ADMIN.map(PathBuf::from)).filter(|d| d.is_absolute());
        std::env::join_paths(dirs).unwrap_or_default()
    })
}

/// Soft and hard limit of open files: what Linux gives the first process of a
/// machine, so that containers and appliances agree.
const OPEN_FILES: (u64, u64) = (1024, 4096);

/// Makes a command with a clean environment: `PATH` and a locale.
pub fn command(program: &Path) -> Command {
    let mut command = Command::new(program);
    command.env_clear().env("PATH", search_path()).env("LC_ALL", "C.UTF-8");
    // SAFETY: the closure makes system calls and touches no memory that the
    // parent shares.
    unsafe { command.pre_exec(clean) };
    command
}

/// Resets what a child process inherits: descriptors, umask, signals, limits,
/// priority.
fn clean() -> io::Result<()> {
    close_others();
    rustix::process::umask(Mode::from_raw_mode(0o022));
    default_signals();
    // A limit that can't be raised stays as it is.
    let (soft, hard) = OPEN_FILES;
    limit(Resource::Nofile, Some(soft), Some(hard));
    limit(Resource::Core, Some(0), Some(0));
    for resource in [Resource::Fsize, Resource::Data, Resource::As, Resource::Cpu] {
        limit(resource, None, None);
    }
    limit(Resource::Stack, Some(8 << 20), None);
    // Raising the priority needs CAP_SYS_NICE.
    let _ = rustix::process::setpriority_process(None, 0);
    Ok(())
}

/// The hard limit of open files that programs can get, if it is lower than
/// [`command`] wants: this process's own limit, which it may not raise.
pub fn too_few_files() -> Option<u64> {
    let most = getrlimit(Resource::Nofile).maximum?;
    let raises = rustix::thread::capabilities(None)
        .is_ok_and(|sets| sets.effective.contains(rustix::thread::CapabilitySet::SYS_RESOURCE));
    (most < OPEN_FILES.1 && !raises).then_some(most)
}

/// Sets a limit, or only its soft half if the hard one may not be raised.
fn limit(resource: Resource, soft: Option<u64>, hard: Option<u64>) {
    let most = getrlimit(resource).maximum;
    if setrlimit(resource, Rlimit { current: soft, maximum: hard }).is_err() {
        let current = match (soft, most) {
            (Some(soft), Some(most)) => Some(soft.min(most)),
            (soft, most) => soft.or(most),
        };
        let _ = setrlimit(resource, Rlimit { current, maximum: most });
    }
}

/// Sets close-on-exec on all descriptors above 2. Descriptors that a program
/// should get are put in place later.
pub fn close_others() {
    // SAFETY: the call changes flags of descriptors; none is closed.
    let marked =
        unsafe { libc::syscall(libc::SYS_close_range, 3u32, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    if marked == 0 {
        return;
    }
    // Kernels before 5.11 mark one at a time.
    let most = getrlimit(Resource::Nofile).current.unwrap_or(1 << 20).min(1 << 20);
    for fd in 3..most as libc::c_int {
        // SAFETY: the call changes a flag of a descriptor, or fails.
        unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) };
    }
}

/// Creates a private mount namespace.
pub(crate) fn own_mounts() -> io::Result<()> {
    // SAFETY: only the mount namespace changes, which no descriptor depends on.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS)? };
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    Ok(())
}

/// Resets all signals: none is ignored or blocked.
fn default_signals() {
    // `struct sigaction` as the kernel has it: handler, flags, restorer, mask.
    // The C library's own function excludes two signals.
    let default = [0_u64; 4];
    for signal in 1..=64 {
        // SAFETY: the structure outlives the call; a signal that can't be set
        // is an error that is ignored.
        unsafe {
            libc::syscall(
                libc::SYS_rt_sigaction,
                signal,
                default.as_ptr(),
                std::ptr::null::<u64>(),
                std::mem::size_of::<u64>(),
            );
        }
    }
    // SAFETY: the set outlives both calls.
    unsafe {
        let mut none = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
    }
}

/// Prepares this process for what it holds: secrets, keys, and the caller's
/// descriptors.
pub fn harden() {
    close_others();
    // Neither a core dump nor another process of this user shows its memory.
    limit(Resource::Core, Some(0), Some(0));
    // SAFETY: both calls take numbers only.
    unsafe {
        libc::prctl(libc::PR_SET_DUMPABLE, 0);
        // A write beyond the file size limit is then an error, not a signal.
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
    }
}

/// The memory that this process may use, in bytes: the host's, or the limit of
/// its control groups.
pub fn memory() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total = text
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:")?.split_whitespace().next()?.parse::<u64>().ok())
        .map_or(4 << 30, |kib| kib * 1024);
    let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    groups.lines().filter_map(memory_limit).fold(total, u64::min)
}

/// The memory limit from a line of `/proc/self/cgroup` and the groups above, in
/// bytes (cgroups(7): version 2 has an empty list of controllers).
fn memory_limit(line: &str) -> Option<u64> {
    let mut parts = line.splitn(3, ':').skip(1);
    let (controllers, path) = (parts.next()?, parts.next()?);
    let (root, file) = match controllers {
        "" => ("/sys/fs/cgroup", "memory.max"),
        list if list.split(',').any(|c| c == "memory") => ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
        _ => return None,
    };
    let own = Path::new(path.trim_start_matches('/'));
    let limits = own.ancestors().filter_map(|group| {
        std::fs::read_to_string(Path::new(root).join(group).join(file)).ok()?.trim().parse::<u64>().ok()
    });
    limits.min()
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    #[tokio::test]
    async fn a_program_has_nothing_of_its_callers() {
        // A descriptor as a supervisor leaves it: open over exec.
        let file = std::fs::File::open("/").unwrap();
        let left = rustix::io::dup(&file).unwrap();
        rustix::io::fcntl_setfd(&left, rustix::io::FdFlags::empty()).unwrap();
        let script = "umask; ulimit -n; ulimit -c; ls /proc/self/fd | wc -w; env | sort | cut -d= -f1; \
                      grep -E 'Sig(Ign|Blk)' /proc/self/status";
        let output = command(Path::new("/bin/sh")).args(["-c", script]).output().await.unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        // `ls` has the three standard ones and the directory that it reads.
        let expected =
            "0022\n1024\n0\n4\nLC_ALL\nPATH\nPWD\nSigBlk:\t0000000000000000\nSigIgn:\t0000000000000000\n";
        assert_eq!(text, expected);
        assert!(left.as_raw_fd() > 2);
    }

    #[test]
    fn a_relative_directory_of_the_path_is_not_searched() {
        assert!(std::env::split_paths(search_path()).all(|dir| dir.is_absolute()));
        assert!(find("sh").is_some_and(|path| path.is_absolute()));
    }

    #[test]
    fn lines_of_control_groups_without_memory_say_nothing() {
        assert_eq!(memory_limit("4:cpu,cpuacct:/"), None);
        assert_eq!(memory_limit("garbage"), None);
        assert!(memory() > 64 << 20);
    }
}

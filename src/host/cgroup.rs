//! A control group that limits the processes and the memory of a program and
//! its children.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Maximum number of processes in a group: package managers need a few dozen,
/// parallel compilers some hundreds.
const PROCESSES: u64 = 4096;
/// Time for killed processes to leave a group.
const RELEASE: Duration = Duration::from_secs(2);

/// A control group (cgroups(7)): one directory in version 2, or one per
/// controller in version 1. Removed when dropped.
#[derive(Debug)]
pub struct Group {
    dirs: Vec<PathBuf>,
    procs: Vec<File>,
}

/// How programs are limited on this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bounds {
    /// By control groups of version 2.
    Two,
    /// By control groups of version 1.
    One,
    /// Only by the number of a user's processes.
    Processes,
}

impl std::fmt::Display for Bounds {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Two => "control groups (version 2)",
            Self::One => "control groups (version 1)",
            Self::Processes => "RLIMIT_NPROC, which does not limit memory",
        })
    }
}

impl Group {
    /// Makes a group with at most `memory` bytes. Fails if this user can't make
    /// control groups.
    pub fn new(memory: u64) -> io::Result<Self> {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let n = COUNTER.fetch_add(1, Ordering::Relaxed);
        // Processes of other namespaces may have the same ids, and see the same
        // groups.
        let mut random = [0; 4];
        rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
        let name = format!("vimg-{}-{n}-{:08x}", std::process::id(), u32::from_ne_bytes(random));
        let memory = memory.to_string();
        let processes = PROCESSES.to_string();
        let root = Path::new("/sys/fs/cgroup");
        if n == 0 {
            remove_dead(&[root, &root.join("pids"), &root.join("memory")]);
        }
        let mut group = Self { dirs: Vec::new(), procs: Vec::new() };
        if root.join("cgroup.controllers").exists() {
            group.add(root.join(&name), &[("pids.max", &processes), ("memory.max", &memory)])?;
            // A kernel without swap accounting lacks this file.
            let _ = fs::write(group.dirs[0].join("memory.swap.max"), "0");
        } else {
            group.add(root.join("pids").join(&name), &[("pids.max", &processes)])?;
            group.add(root.join("memory").join(&name), &[("memory.limit_in_bytes", &memory)])?;
        }
        Ok(group)
    }

    fn add(&mut self, dir: PathBuf, limits: &[(&str, &str)]) -> io::Result<()> {
        fs::create_dir(&dir)?;
        self.dirs.push(dir.clone());
        for (file, value) in limits {
            OpenOptions::new().write(true).open(dir.join(file))?.write_all(value.as_bytes())?;
        }
        self.procs.push(OpenOptions::new().write(true).open(dir.join("cgroup.procs"))?);
        Ok(())
    }

    /// Starts a program in the group.
    pub fn enter(&self, command: &mut Command) {
        let procs: Vec<i32> = self.procs.iter().map(AsRawFd::as_raw_fd).collect();
        // SAFETY: the closure makes system calls only; the files stay open in
        // the parent until the child has been spawned.
        unsafe {
            command.pre_exec(move || {
                for fd in &procs {
                    // 0 means the writing process.
                    if libc::write(*fd, c"0".as_ptr().cast(), 1) != 1 {
                        return Err(io::Error::last_os_error());
                    }
                }
                Ok(())
            });
        }
    }

    /// Tests how programs are limited on this host.
    pub fn bounds() -> Bounds {
        match Self::new(64 << 20) {
            Ok(group) if group.dirs.len() == 1 => Bounds::Two,
            Ok(_) => Bounds::One,
            Err(_) => Bounds::Processes,
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        for dir in &self.dirs {
            let _ = fs::write(dir.join("cgroup.kill"), "1");
            let start = Instant::now();
            while fs::remove_dir(dir).is_err_and(|e| e.kind() != io::ErrorKind::NotFound) {
                if start.elapsed() > RELEASE {
                    break;
                }
                std::thread::sleep(Duration::from_millis(2));
            }
        }
    }
}

/// Removes groups that killed processes of vimg left. A group in use can't be
/// removed.
fn remove_dead(dirs: &[&Path]) {
    for entry in dirs.iter().filter_map(|dir| fs::read_dir(dir).ok()).flatten().flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|name| name.strip_prefix("vimg-")?.split('-').next());
        if pid.is_some_and(|pid| pid.parse::<u32>().is_ok() && !Path::new("/proc").join(pid).exists()) {
            let _ = fs::remove_dir(entry.path());
        }
    }
}

/// Limits the number of processes by the limit of the program's user.
pub fn limit_processes(command: &mut Command) {
    // SAFETY: the closure makes one system call.
    unsafe {
        command.pre_exec(|| {
            super::limit(rustix::process::Resource::Nproc, Some(PROCESSES), Some(PROCESSES));
            Ok(())
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_group_bounds_processes_and_goes() {
        let Ok(group) = Group::new(256 << 20) else { return };
        let mut command = crate::host::command(Path::new("/bin/cat"));
        command.arg("/proc/self/cgroup");
        group.enter(command.as_std_mut());
        let output = command.output().await.unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(text.contains(&format!("/vimg-{}-", std::process::id())), "{text}");
        let dirs = group.dirs.clone();
        drop(group);
        assert!(dirs.iter().all(|dir| !dir.exists()));
    }
}

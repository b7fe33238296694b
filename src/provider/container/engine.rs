//! Finds the programs that run containers, and tests whether they can.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use crate::host::cgroup::{Bounds, Group};
use crate::host::namespaces::{Ids, Namespaces};
use crate::host::{self, HostError};

/// The programs that run containers.
#[derive(Debug, Clone)]
pub(in crate::provider) struct Engine {
    pub(super) bwrap: PathBuf,
    pub(super) daemon: PathBuf,
    version: String,
    /// Whether root inside is unprivileged on the host.
    pub(super) mapped: bool,
}

impl Engine {
    /// Finds what is needed to run containers on disks of a store that only
    /// root owns (`owned`). The error says why containers are not possible.
    pub(in crate::provider) async fn allowed(owned: bool) -> Result<Self, HostError> {
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
    pub(in crate::provider) fn isolation(&self) -> String {
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
    pub(in crate::provider) fn name(&self) -> String {
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

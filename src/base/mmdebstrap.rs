//! Runs mmdebstrap in user, process, mount and network namespaces, where its
//! root is unprivileged on the host.

use std::collections::VecDeque;
use std::ffi::CString;
use std::fs::{File, Permissions};
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;

use rustix::mount::mount_bind;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{ChildStderr, Command};

use crate::host::namespaces::{self, Ids, Namespaces};
use crate::host::network::{Access, Gateway};
use crate::host::{self, HostError, Lines, child};

/// The programs that a bootstrap needs, and their packages on Debian.
const PROGRAMS: &[(&str, &str)] = &[
    ("mmdebstrap", "mmdebstrap"),
    ("mke2fs", "e2fsprogs"),
    ("mkfs.vfat", "dosfstools"),
    ("mcopy", "mtools"),
    ("newuidmap", "uidmap"),
    ("unshare", "util-linux"),
];

/// Returns an error if this host lacks something for a bootstrap.
pub(super) fn missing() -> Option<HostError> {
    let root = rustix::process::geteuid().is_root();
    let missing: Vec<(&str, &str)> = PROGRAMS
        .iter()
        .filter(|(program, _)| !(root && *program == "newuidmap"))
        .filter(|(program, _)| host::find(program).is_none())
        .copied()
        .collect();
    if !missing.is_empty() {
        let programs: Vec<&str> = missing.iter().map(|(program, _)| *program).collect();
        let packages: Vec<&str> = missing.iter().map(|(_, package)| *package).collect();
        return Some(
            HostError::new(format!(
                "a bootstrap needs {}, which this host does not have",
                programs.join(", ")
            ))
            .help(format!("install it: apt-get install {}", packages.join(" "))),
        );
    }
    if root {
        return None;
    }
    let ids = |file| namespaces::subordinate(file).iter().map(|(_, count)| u64::from(*count)).sum::<u64>();
    if ids("/etc/subuid").min(ids("/etc/subgid")) < 65535 {
        return Some(
            HostError::new("you have fewer than 65536 subordinate user ids")
                .help("as root: usermod --add-subuids 100000-165535 --add-subgids 100000-165535 YOU"),
        );
    }
    None
}

/// The first descriptor of the outputs. mmdebstrap's own shell commands use
/// descriptors of one digit.
pub(super) const FIRST_FD: i32 = 100;

/// Directory for mmdebstrap's files, below the directory of the base.
const WORK: &str = "work";

/// A bootstrap.
pub(super) struct Run<'a> {
    /// The suite, from a recipe.
    pub(super) suite: &'a str,
    pub(super) packages: Vec<&'a str>,
    /// Files that the new root gets: a name, the content, and the path.
    pub(super) uploads: &'a [(&'a str, &'a [u8], &'a str)],
    /// Scripts of the distribution, in the order in which mmdebstrap runs them.
    /// The uploads are there before the last one.
    pub(super) hooks: Hooks<'a>,
    /// Variables for the scripts.
    pub(super) variables: Vec<(&'a str, String)>,
    /// Files that the scripts write to, from descriptor [`FIRST_FD`] on.
    pub(super) outputs: &'a [File],
    /// A private directory.
    pub(super) dir: &'a Path,
}

/// Scripts that mmdebstrap runs outside of the new root, whose path is `$1`.
pub(super) struct Hooks<'a> {
    pub(super) setup: &'a str,
    pub(super) essential: &'a str,
    pub(super) customize: &'a str,
}

impl Run<'_> {
    /// Runs mmdebstrap. `lines` receives what it prints.
    pub(super) async fn run(&self, access: &Access, lines: &Lines) -> Result<(), HostError> {
        if let Some(missing) = missing() {
            return Err(missing);
        }
        let fail = |e: io::Error| HostError::io("can't create the disk", &e);
        let work = self.dir.join(WORK);
        std::fs::create_dir(&work).map_err(fail)?;
        for (name, bytes, _) in self.uploads {
            std::fs::write(work.join(name), bytes).map_err(fail)?;
            std::fs::set_permissions(work.join(name), Permissions::from_mode(0o644)).map_err(fail)?;
        }
        // Root in the namespace has another host id. Only this user can enter
        // the directory above.
        std::fs::set_permissions(&work, Permissions::from_mode(0o1777)).map_err(fail)?;
        let ran = self.run_in(&work, access, lines).await;
        // If it is stopped, its files belong to other user ids.
        let removed = tokio::task::spawn_blocking(move || namespaces::remove_tree(&work)).await;
        let removed = removed.unwrap_or_else(|e| Err(io::Error::other(e)));
        ran?;
        removed.map_err(fail)
    }

    async fn run_in(&self, work: &Path, access: &Access, lines: &Lines) -> Result<(), HostError> {
        let way_out = access.gateway(Ids::System).await?;
        let root = rustix::process::geteuid().is_root();
        // The mapped root can't enter the store, so the directory is bound to
        // /tmp.
        let inside = if root { PathBuf::from("/tmp") } else { work.to_owned() };
        let mut command = self.command(&inside)?;
        command.envs(access.proxies.variables("127.0.0.1"));
        let fail = |e: io::Error| HostError::io("can't run mmdebstrap", &e);
        self.enter(&mut command, root.then_some(work), way_out.as_ref())?;
        // The copies must stay open until the child has been spawned.
        let copies = pass(&mut command, self.outputs).map_err(fail)?;
        child::die_with_us(&mut command);
        if let Some(gateway) = &way_out {
            gateway.set(true).await.map_err(|e| HostError::io("the network", &e))?;
        }
        let mut child = command.spawn().map_err(fail)?;
        drop((command, copies));
        let said = match child.stderr.take() {
            Some(err) => follow(err, lines).await,
            None => Said::default(),
        };
        // It removes what it has written before it ends.
        let is_full = said.is_full || host::space::is_scarce(self.dir);
        let status = child.wait().await.map_err(|e| HostError::io("mmdebstrap", &e))?;
        if status.success() {
            return Ok(());
        }
        let help = "check that the mirror is reachable; allow a private address with `network-allow`. On \
                    Ubuntu, install Debian's keys: apt-get install debian-archive-keyring";
        let what = format!("mmdebstrap failed ({status})");
        let tail: Vec<String> = said.tail.into();
        let error = HostError::program(what, &format!("\n{}", tail.join("\n"))).help(help);
        Err(HostError { is_full: error.is_full || is_full, ..error })
    }

    /// Makes the command line. All processes and mounts are in one namespace
    /// each. They end with the first process, which ends with vimg.
    fn command(&self, inside: &Path) -> Result<Command, HostError> {
        let unshare = host::find("unshare").ok_or_else(|| HostError::new("`unshare` is not installed"))?;
        let upload =
            |name: &str, to: &str| format!("--customize-hook=upload {} {to}", quoted(&inside.join(name)));
        let mut command = host::command(&unshare);
        command
            .args(["--fork", "--pid", "--kill-child=KILL", "--mount", "--ipc", "--uts", "--", "mmdebstrap"])
            .args(["--mode=root", "--variant=apt", "--format=null"])
            .arg(format!("--include={}", self.packages.join(",")))
            .args([
                "--aptopt=APT::Sandbox::User \"root\"",
                "--aptopt=Acquire::Languages \"none\"",
                "--aptopt=Acquire::Retries \"3\"",
                "--dpkgopt=force-unsafe-io",
            ])
            .arg(format!("--setup-hook={}", self.hooks.setup))
            .arg(format!("--essential-hook={}", self.hooks.essential))
            .arg("--customize-hook=mkdir -p \"$1/usr/lib/vimg\" \"$1/etc/systemd/system\"")
            .args(self.uploads.iter().map(|(name, _, to)| upload(name, to)))
            .arg(format!("--customize-hook={}", self.hooks.customize))
            // Arguments from the recipe follow. They must not become options.
            .arg("--")
            .arg(self.suite)
            .arg("/dev/null")
            .envs(self.variables.iter().map(|(name, value)| (name, value)))
            .env("TMPDIR", inside)
            .env("HOME", inside)
            .env("DEBIAN_FRONTEND", "noninteractive")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true);
        Ok(command)
    }

    /// Starts the command in its namespaces, with `tmp` as its `/tmp`, and with
    /// the resolver of its gateway.
    fn enter(
        &self,
        command: &mut Command,
        tmp: Option<&Path>,
        way_out: Option<&Gateway>,
    ) -> Result<(), HostError> {
        let fail = |e: io::Error| HostError::io("can't run mmdebstrap", &e);
        let own = match way_out {
            Some(gateway) => gateway.namespaces().clone(),
            None => Arc::new(
                Namespaces::of_users(Ids::System)
                    .map_err(|e| HostError::io("a bootstrap needs a user namespace", &e))?,
            ),
        };
        let resolver = way_out.map(|_| host::network::resolv_conf(self.dir)).transpose().map_err(fail)?;
        // The store may be below /tmp, so this comes last.
        let binds = [(resolver, "/etc/resolv.conf"), (tmp.map(Path::to_owned), "/tmp")];
        let binds: Vec<(CString, CString)> = binds
            .into_iter()
            .filter_map(|(from, to)| Some((from?, to)))
            .map(|(from, to)| {
                Ok((CString::new(from.into_os_string().into_encoded_bytes())?, CString::new(to)?))
            })
            .collect::<Result<_, std::ffi::NulError>>()
            .map_err(|e| fail(e.into()))?;
        let bind = move || {
            host::own_mounts()?;
            binds.iter().try_for_each(|(from, to)| match mount_bind(from.as_c_str(), to.as_c_str()) {
                // A host without a resolv.conf resolves no names either.
                Err(rustix::io::Errno::NOENT) => Ok(()),
                bound => bound,
            })?;
            io::Result::Ok(())
        };
        // Root can see the store only outside; a user may mount only inside.
        // SAFETY: the closure makes system calls only.
        unsafe {
            if tmp.is_some() {
                command.pre_exec(bind);
                own.enter(command.as_std_mut());
            } else {
                own.enter(command.as_std_mut());
                command.pre_exec(bind);
            }
        }
        Ok(())
    }
}

/// Passes files to a command, from descriptor [`FIRST_FD`] on. The copies that
/// it returns must stay open until the command was started.
fn pass(command: &mut Command, files: &[File]) -> io::Result<Vec<OwnedFd>> {
    // The copies have numbers far above the final ones, so that dup2 overwrites
    // none of them.
    let copies = files
        .iter()
        .map(|f| rustix::io::fcntl_dupfd_cloexec(f, 2 * FIRST_FD))
        .collect::<Result<Vec<OwnedFd>, _>>()?;
    let numbers: Vec<i32> = copies.iter().map(AsRawFd::as_raw_fd).collect();
    let outputs = move || {
        for (n, fd) in numbers.iter().enumerate() {
            // SAFETY: the descriptors stay open in the parent until the child
            // has been spawned.
            let (fd, mut to) = unsafe {
                let to = OwnedFd::from_raw_fd(FIRST_FD + n as i32);
                (BorrowedFd::borrow_raw(*fd), ManuallyDrop::new(to))
            };
            // dup2 leaves the copy open over exec.
            rustix::io::dup2(fd, &mut to)?;
        }
        Ok(())
    };
    // SAFETY: the closure makes system calls only.
    unsafe { command.pre_exec(outputs) };
    Ok(copies)
}

/// What mmdebstrap has printed.
#[derive(Default)]
struct Said {
    /// The last lines.
    tail: VecDeque<String>,
    /// Whether a line, which may be further up, says that the disk is full.
    is_full: bool,
}

/// Reports what mmdebstrap prints.
async fn follow(err: ChildStderr, lines: &Lines) -> Said {
    let mut said = Said::default();
    let mut reader = BufReader::new(err).split(b'\n');
    while let Ok(Some(line)) = reader.next_segment().await {
        let line = String::from_utf8_lossy(&line).trim_end().to_owned();
        if is_for_people(&line) {
            lines(&line);
        }
        said.is_full |= host::space::says_full(&line);
        said.tail.push_back(line);
        if said.tail.len() > 12 {
            said.tail.pop_front();
        }
    }
    said
}

/// Whether a line of mmdebstrap says something to the user. Its other lines
/// repeat the text of the hooks, and name files of vimg.
fn is_for_people(line: &str) -> bool {
    ["I: ", "W: ", "E: "].iter().any(|p| line.starts_with(p))
        && ![" hook", "-hook"].iter().any(|p| line.contains(p))
}

/// Quotes a path for mmdebstrap's own commands, which split words as a shell
/// does.
fn quoted(path: &Path) -> String {
    format!("'{}'", path.display().to_string().replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_vimg_itself_runs_is_not_shown() {
        assert!(is_for_people("I: downloading and installing packages..."));
        assert!(is_for_people("E: apt-get update failed"));
        assert!(!is_for_people("Get:1 http://deb.debian.org/debian bookworm InRelease"));
        assert!(!is_for_people("I: running special hook: upload '/store/staging/1-2/work/agent' /usr/lib"));
        assert!(!is_for_people("I: running --customize-hook in shell: sh -c 'mkdir -p'"));
    }

    #[test]
    fn quotes_are_quoted() {
        assert_eq!(quoted(Path::new("/a'b c")), "'/a'\\''b c'");
    }
}

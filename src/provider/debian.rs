//! Makes a base disk from Debian's packages. mmdebstrap runs in user, process,
//! mount and network namespaces, where its root is unprivileged on the host.
//! `mke2fs -d` makes the filesystem in there; this module writes the partition
//! table and the boot code. It needs no loop device and boots no machine.

use std::collections::VecDeque;
use std::ffi::CString;
use std::fs::{File, OpenOptions, Permissions};
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;

use rustix::mount::mount_bind;
use tokio::io::{AsyncBufReadExt, BufReader};
use vimg_agent::protocol;
use vimg_lang::model::Bootstrap;

use super::{AGENT, Lines, ProviderError, gpt, initramfs};
use crate::digest::Digest;
use crate::host::namespaces::{self, Ids, Namespaces};
use crate::host::network::Access;
use crate::host::{self, child};

/// Raise when the same bootstrap gives another disk.
pub const BEHAVIOUR: u32 = 4;

/// Packages of every base: enough to boot, to use a network and to install
/// more. GRUB is purged again after it has made its images.
const PACKAGES: &[&str] = &[
    "linux-image-cloud-amd64",
    "initramfs-tools",
    "zstd",
    "xz-utils",
    "systemd-sysv",
    "systemd-resolved",
    "udev",
    "dbus",
    "kmod",
    "e2fsprogs",
    "ca-certificates",
    "iproute2",
    "netbase",
    "passwd",
    "login",
    "procps",
    "grub2-common",
    "grub-pc-bin",
    "grub-efi-amd64-bin",
];

/// The programs that a bootstrap needs, and their packages.
pub const PROGRAMS: &[(&str, &str)] = &[
    ("mmdebstrap", "mmdebstrap"),
    ("mke2fs", "e2fsprogs"),
    ("mkfs.vfat", "dosfstools"),
    ("mcopy", "mtools"),
    ("newuidmap", "uidmap"),
    ("unshare", "util-linux"),
];

/// A new disk.
pub(super) struct Made {
    pub(super) disk: PathBuf,
    pub(super) kernel: PathBuf,
    pub(super) initrd: PathBuf,
    /// Modules for an appliance with the same kernel.
    pub(super) modules: PathBuf,
}

/// Returns an error if this host lacks something for a bootstrap.
pub fn missing() -> Option<ProviderError> {
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
            ProviderError::new(format!(
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
            ProviderError::new("you have fewer than 65536 subordinate user ids")
                .help("as root: usermod --add-subuids 100000-165535 --add-subgids 100000-165535 YOU"),
        );
    }
    None
}

/// Files that the hooks write to, from descriptor 100 on: disk, kernel,
/// modules, GRUB's core, its first sector, its UEFI program, an appliance's
/// modules.
const OUTPUTS: [&str; 7] =
    ["disk.raw", "vmlinuz", "modules.cpio", "core.img", "boot.img", "bootx64.efi", "appliance.cpio"];

/// Files that a base has besides the packages of its distribution.
const UPLOADS: [(&str, &[u8], &str); 3] = [
    ("agent", AGENT, protocol::AGENT),
    (
        "vimg-agent.service",
        include_bytes!("debian/vimg-agent.service"),
        "/etc/systemd/system/vimg-agent.service",
    ),
    (
        "vimg-hooks.service",
        include_bytes!("debian/vimg-hooks.service"),
        "/etc/systemd/system/vimg-hooks.service",
    ),
];

/// The first descriptor of the outputs. mmdebstrap's own shell commands use
/// descriptors of one digit.
const FIRST_FD: i32 = 100;

/// Directory for mmdebstrap's files, below the directory of the base.
const WORK: &str = "work";

pub(super) async fn bootstrap(
    bootstrap: &Bootstrap,
    size: u64,
    dir: &Path,
    access: &Access,
    lines: &Lines,
) -> Result<Made, ProviderError> {
    if let Some(missing) = missing() {
        return Err(missing);
    }
    let fail = |e: io::Error| ProviderError::new(format!("can't create the disk: {e}"));
    let work = dir.join(WORK);
    std::fs::create_dir(&work).map_err(fail)?;
    for (name, bytes, _) in UPLOADS {
        std::fs::write(work.join(name), bytes).map_err(fail)?;
        std::fs::set_permissions(work.join(name), Permissions::from_mode(0o644)).map_err(fail)?;
    }
    // Root in the namespace has another host id. Only this user can enter the
    // directory above.
    std::fs::set_permissions(&work, Permissions::from_mode(0o1777)).map_err(fail)?;
    let id = disk_id(bootstrap, size);
    let files = open_outputs(dir, size).map_err(fail)?;
    let made = mmdebstrap(bootstrap, size, id, dir, &files, access, lines).await;
    // If it is stopped, its files belong to other user ids.
    let left = work.clone();
    let removed = tokio::task::spawn_blocking(move || host::namespaces::remove_tree(&left)).await;
    let removed = removed.unwrap_or_else(|e| Err(io::Error::other(e)));
    made?;
    removed.map_err(fail)?;
    drop(files);
    for name in OUTPUTS {
        std::fs::set_permissions(dir.join(name), Permissions::from_mode(0o600)).map_err(fail)?;
    }
    esp(dir).await?;
    finish(dir, id).map_err(fail)
}

/// The UUID of the filesystem and the disk. The same bootstrap gives the same
/// UUID, so that nothing in the result is random.
fn disk_id(bootstrap: &Bootstrap, size: u64) -> [u8; 16] {
    let what = format!("vimg disk\0{bootstrap:?}\0{size}");
    let mut id = [0; 16];
    id.copy_from_slice(&Digest::of(what.as_bytes()).0[..16]);
    // A version 8 UUID: made by the program's own rules (RFC 9562). The bytes
    // are a UUID in text order; GPT takes them as they are.
    id[6] = id[6] & 0x0f | 0x80;
    id[8] = id[8] & 0x3f | 0x80;
    id[15] &= 0xf0;
    id
}

fn uuid(id: [u8; 16]) -> String {
    let hex: String = id.iter().map(|b| format!("{b:02x}")).collect();
    format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}

/// Creates the output files, writable for all users while mmdebstrap runs,
/// because the root of its namespace is another user. The directory is private.
fn open_outputs(dir: &Path, size: u64) -> io::Result<Vec<File>> {
    OUTPUTS
        .iter()
        .map(|name| {
            let path = dir.join(name);
            let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&path)?;
            file.set_permissions(Permissions::from_mode(0o666))?;
            if *name == "disk.raw" {
                file.set_len(size)?;
            }
            Ok(file)
        })
        .collect()
}

async fn mmdebstrap(
    bootstrap: &Bootstrap,
    size: u64,
    id: [u8; 16],
    dir: &Path,
    files: &[File],
    access: &Access,
    lines: &Lines,
) -> Result<(), ProviderError> {
    let way_out = access.gateway(Ids::System).await?;
    let own = match &way_out {
        Some(gateway) => gateway.namespaces().clone(),
        None => Arc::new(
            Namespaces::of_users(Ids::System)
                .map_err(|e| ProviderError::new(format!("a bootstrap needs a user namespace: {e}")))?,
        ),
    };
    let root = rustix::process::geteuid().is_root();
    let work = dir.join(WORK);
    // The mapped root can't enter the store, so the directory is bound to /tmp.
    let inside = if root { PathBuf::from("/tmp") } else { work.clone() };
    let packages: Vec<&str> =
        PACKAGES.iter().copied().chain(bootstrap.packages.iter().map(String::as_str)).collect();
    let root_kib = (gpt::root_end(size) - gpt::ROOT_START) * gpt::SECTOR / 1024;
    // All processes and mounts are in one namespace each. They end with the
    // first process, which ends with vimg.
    let unshare = host::find("unshare").ok_or_else(|| ProviderError::new("`unshare` is not installed"))?;
    let mut command = host::command(&unshare);
    command
        .args(["--fork", "--pid", "--kill-child=KILL", "--mount", "--ipc", "--uts", "--", "mmdebstrap"])
        .args(["--mode=root", "--variant=apt", "--format=null"])
        .arg(format!("--include={}", packages.join(",")))
        .args([
            "--aptopt=APT::Sandbox::User \"root\"",
            "--aptopt=Acquire::Languages \"none\"",
            "--aptopt=Acquire::Retries \"3\"",
            "--dpkgopt=force-unsafe-io",
        ])
        .arg(format!("--setup-hook={}", include_str!("debian/setup.sh")))
        .arg(format!("--essential-hook={}", include_str!("debian/essential.sh")))
        .arg("--customize-hook=mkdir -p \"$1/usr/lib/vimg\" \"$1/etc/systemd/system\"")
        .args(
            UPLOADS
                .map(|(name, _, to)| format!("--customize-hook=upload {} {to}", quoted(&inside.join(name)))),
        )
        .arg(format!("--customize-hook={}", include_str!("debian/customize.sh")))
        // Arguments from the recipe follow. They must not become options.
        .arg("--")
        .arg(&bootstrap.suite)
        .arg("/dev/null")
        .env("VIMG_ROOT_UUID", uuid(id))
        .env("VIMG_ROOT_OFFSET", (gpt::ROOT_START * gpt::SECTOR).to_string())
        .env("VIMG_ROOT_KIB", root_kib.to_string())
        .env("VIMG_MKFS", include_str!("debian/mkfs.sh"))
        .env("VIMG_MIRROR", bootstrap.mirror.as_deref().unwrap_or_default())
        .env("TMPDIR", &inside)
        .env("HOME", &inside)
        .env("MKE2FS_CONFIG", "/dev/null")
        .env("DEBIAN_FRONTEND", "noninteractive")
        .envs(access.proxies.variables("127.0.0.1"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true);
    // The copies have numbers far above the final ones, so that dup2 overwrites
    // none of them.
    let fail = |e: io::Error| ProviderError::new(format!("can't run mmdebstrap: {e}"));
    let copies = files
        .iter()
        .map(|f| rustix::io::fcntl_dupfd_cloexec(f, 2 * FIRST_FD))
        .collect::<Result<Vec<OwnedFd>, _>>()
        .map_err(|e| fail(e.into()))?;
    let resolver = way_out.as_ref().map(|_| host::network::resolv_conf(dir)).transpose().map_err(fail)?;
    // The store may be below /tmp, so this comes last.
    let binds = [(resolver, "/etc/resolv.conf"), (root.then_some(work), "/tmp")];
    let binds: Vec<(CString, CString)> = binds
        .into_iter()
        .filter_map(|(from, to)| Some((from?, to)))
        .map(|(from, to)| Ok((CString::new(from.into_os_string().into_encoded_bytes())?, CString::new(to)?)))
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
    // SAFETY: the closures make system calls only.
    unsafe {
        // Root can see the store only outside; a user may mount only inside.
        if root {
            command.pre_exec(bind);
            own.enter(command.as_std_mut());
        } else {
            own.enter(command.as_std_mut());
            command.pre_exec(bind);
        }
        command.pre_exec(outputs);
    }
    child::die_with_us(&mut command);
    if let Some(gateway) = &way_out {
        gateway.set(true).await.map_err(|e| ProviderError::new(format!("the network: {e}")))?;
    }
    let mut child = command.spawn().map_err(fail)?;
    drop(command);
    let mut tail: VecDeque<String> = VecDeque::new();
    if let Some(err) = child.stderr.take() {
        let mut reader = BufReader::new(err).split(b'\n');
        while let Ok(Some(line)) = reader.next_segment().await {
            let line = String::from_utf8_lossy(&line).trim_end().to_owned();
            // Its other lines repeat the text of the hooks.
            if ["I: ", "W: ", "E: "].iter().any(|p| line.starts_with(p)) && !line.contains("-hook") {
                lines(&line);
            }
            tail.push_back(line);
            if tail.len() > 12 {
                tail.pop_front();
            }
        }
    }
    let status = child.wait().await.map_err(|e| ProviderError::new(format!("mmdebstrap: {e}")))?;
    if status.success() {
        return Ok(());
    }
    let words: Vec<String> = tail.into_iter().collect();
    let help = if words.iter().any(|line| line.contains("No space left on device")) {
        "the disk that holds the store is full: make room, or set VIMG_STORE to another disk"
    } else {
        "check that the mirror is reachable; allow a private address with `network-allow`. On \
         Ubuntu, install Debian's keys: apt-get install debian-archive-keyring"
    };
    Err(ProviderError::new(format!("mmdebstrap failed ({status}):\n{}", words.join("\n"))).help(help))
}

/// Quotes a path for mmdebstrap's own commands, which split words as a shell
/// does.
fn quoted(path: &Path) -> String {
    format!("'{}'", path.display().to_string().replace('\'', "'\\''"))
}

/// Makes the EFI system partition, with GRUB.
async fn esp(dir: &Path) -> Result<(), ProviderError> {
    let file = dir.join("esp.img");
    File::create(&file)
        .and_then(|f| f.set_len(gpt::ESP_SECTORS * gpt::SECTOR))
        .map_err(|e| ProviderError::new(format!("{}: {e}", file.display())))?;
    let (image, program) = (file.display().to_string(), dir.join("bootx64.efi").display().to_string());
    for (name, args) in [
        ("mkfs.vfat", vec!["-F", "32", "-s", "1", "-n", "ESP", "-i", "56494d47", &image]),
        ("mmd", vec!["-i", &image, "::/EFI", "::/EFI/BOOT"]),
        ("mcopy", vec!["-i", &image, &program, "::/EFI/BOOT/BOOTX64.EFI"]),
    ] {
        let path = host::find(name).unwrap_or_else(|| name.into());
        let output = host::command(&path)
            .args(args)
            .stdin(Stdio::null())
            .output()
            .await
            .map_err(|e| ProviderError::new(format!("can't run {name}: {e}")))?;
        if !output.status.success() {
            let words = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            return Err(ProviderError::new(format!("{name}: {words}")));
        }
    }
    Ok(())
}

/// Assembles disk and initrd from their parts.
fn finish(dir: &Path, id: [u8; 16]) -> io::Result<Made> {
    use std::io::{Seek, SeekFrom};
    let disk = dir.join("disk.raw");
    let mut file = OpenOptions::new().read(true).write(true).open(&disk)?;
    file.seek(SeekFrom::Start(gpt::ESP_START * gpt::SECTOR))?;
    sparse_copy(&mut File::open(dir.join("esp.img"))?, &mut file)?;
    gpt::write(&mut file, id, &std::fs::read(dir.join("boot.img"))?, &std::fs::read(dir.join("core.img"))?)?;
    let initrd = dir.join("initrd");
    // The kernel accepts several archives, one after the other.
    let mut early = initramfs::with_init(AGENT);
    early.extend(std::fs::read(dir.join("modules.cpio"))?);
    std::fs::write(&initrd, early)?;
    for name in ["esp.img", "modules.cpio", "core.img", "boot.img", "bootx64.efi"] {
        std::fs::remove_file(dir.join(name))?;
    }
    Ok(Made { disk, kernel: dir.join("vmlinuz"), initrd, modules: dir.join("appliance.cpio") })
}

/// Copies to the current position of `to`, with holes where `from` has only
/// zeros.
fn sparse_copy(from: &mut File, to: &mut File) -> io::Result<()> {
    use std::io::{Read, Seek, SeekFrom, Write};
    let mut buffer = vec![0; 64 << 10];
    loop {
        let n = from.read(&mut buffer)?;
        if n == 0 {
            return Ok(());
        }
        if buffer[..n].iter().all(|b| *b == 0) {
            to.seek(SeekFrom::Current(n as i64))?;
        } else {
            to.write_all(&buffer[..n])?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identities_depend_on_what_is_made() {
        let bootstrap = |suite: &str| Bootstrap {
            distribution: "debian".into(),
            suite: suite.into(),
            mirror: None,
            packages: vec![],
        };
        let a = disk_id(&bootstrap("bookworm"), 1 << 30);
        assert_eq!(a, disk_id(&bootstrap("bookworm"), 1 << 30));
        assert_ne!(a, disk_id(&bootstrap("trixie"), 1 << 30));
        let text = uuid(a);
        assert_eq!(text.len(), 36);
        assert_eq!(&text[14..15], "8");
    }

    #[test]
    fn quotes_are_quoted() {
        assert_eq!(quoted(Path::new("/a'b c")), "'/a'\\''b c'");
    }
    /// As mmdebstrap writes them for a stable suite.
    const SOURCES: &str = "deb http://deb.debian.org/debian bookworm main\n\
        deb http://deb.debian.org/debian bookworm-updates main\n\
        deb http://security.debian.org/debian-security bookworm-security main\n";

    #[test]
    fn a_mirror_keeps_the_security_updates() {
        let root = tempfile::tempdir().unwrap();
        let list = root.path().join("etc/apt/sources.list");
        std::fs::create_dir_all(list.parent().unwrap()).unwrap();
        std::fs::write(&list, SOURCES).unwrap();
        let setup = |mirror: Option<&str>| {
            let mut command = std::process::Command::new("sh");
            command.args(["-c", include_str!("debian/setup.sh"), "sh"]).arg(root.path()).env_clear();
            command.envs(mirror.map(|mirror| ("VIMG_MIRROR", mirror)));
            assert!(command.status().unwrap().success());
            std::fs::read_to_string(&list).unwrap()
        };
        assert_eq!(setup(None), SOURCES);
        let mirrored = setup(Some("https://mirror.example/debian"));
        assert_eq!(mirrored, SOURCES.replace("http://deb.debian.org/", "https://mirror.example/"));
    }
}

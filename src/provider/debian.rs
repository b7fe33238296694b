//! Makes a base disk from Debian's packages, without root: mmdebstrap in a
//! user namespace, the filesystem by `mke2fs -d` inside of it, partition
//! table and boot code by ourselves. No loop device, no machine is booted.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions, Permissions};
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::Command;
use vimg_agent::protocol;
use vimg_lang::model::Bootstrap;

use super::{AGENT, Lines, ProviderError, gpt, initramfs};
use crate::digest::Digest;

/// Raise when the same bootstrap gives another disk.
pub const BEHAVIOUR: u32 = 3;

/// What every base has: enough to boot, to be on a network and to install
/// more. GRUB is purged again once it has made its images.
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

/// The programs that are needed, and the packages they are in.
pub const PROGRAMS: &[(&str, &str)] = &[
    ("mmdebstrap", "mmdebstrap"),
    ("mke2fs", "e2fsprogs"),
    ("mkfs.vfat", "dosfstools"),
    ("mcopy", "mtools"),
    ("newuidmap", "uidmap"),
];

/// A new disk.
pub(super) struct Made {
    pub(super) disk: PathBuf,
    pub(super) kernel: PathBuf,
    pub(super) initrd: PathBuf,
    /// Modules for an appliance with the same kernel.
    pub(super) modules: PathBuf,
}

/// Looks a program up in PATH and in the directories for administrators,
/// which an ordinary user's PATH leaves out.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|file| file.metadata().is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0))
}

/// What is missing on this host for a bootstrap, with what to do about it.
pub fn missing() -> Option<ProviderError> {
    let root = rustix::process::geteuid().is_root();
    let missing: Vec<(&str, &str)> = PROGRAMS
        .iter()
        .filter(|(program, _)| !(root && *program == "newuidmap"))
        .filter(|(program, _)| find_program(program).is_none())
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
    match subids() {
        Ok(n) if n >= 65536 => None,
        Ok(_) => Some(
            ProviderError::new("you have fewer than 65536 subordinate user ids")
                .help("as root: usermod --add-subuids 100000-165535 --add-subgids 100000-165535 YOU"),
        ),
        Err(why) => Some(ProviderError::new(why)),
    }
}

/// How many subordinate user ids this user has.
fn subids() -> Result<u64, String> {
    let uid = rustix::process::geteuid().as_raw().to_string();
    let passwd = std::fs::read_to_string("/etc/passwd").map_err(|e| format!("/etc/passwd: {e}"))?;
    let name = passwd
        .lines()
        .map(|l| l.split(':').collect::<Vec<_>>())
        .find(|f| f.get(2) == Some(&uid.as_str()))
        .map_or_else(|| uid.clone(), |f| f[0].to_owned());
    let subuid = std::fs::read_to_string("/etc/subuid").unwrap_or_default();
    Ok(subuid
        .lines()
        .map(|l| l.split(':').collect::<Vec<_>>())
        .filter(|f| f.len() == 3 && (f[0] == name || f[0] == uid))
        .filter_map(|f| f[2].trim().parse::<u64>().ok())
        .sum())
}

/// Files that the hooks write to, from descriptor 100 on: disk, kernel,
/// modules, GRUB's core, its first sector, its UEFI program, an appliance's
/// modules.
const OUTPUTS: [&str; 7] =
    ["disk.raw", "vmlinuz", "modules.cpio", "core.img", "boot.img", "bootx64.efi", "appliance.cpio"];

/// What a base has besides its distribution's packages.
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

/// mmdebstrap's own shell lines know descriptors of one digit only, so ours
/// must leave those free.
const FIRST_FD: i32 = 100;

pub(super) async fn bootstrap(
    bootstrap: &Bootstrap,
    size: u64,
    dir: &Path,
    lines: &Lines,
) -> Result<Made, ProviderError> {
    if let Some(missing) = missing() {
        return Err(missing);
    }
    let fail = |e: io::Error| ProviderError::new(format!("the disk can't be made: {e}"));
    for (name, bytes, _) in UPLOADS {
        std::fs::write(dir.join(name), bytes).map_err(fail)?;
    }
    let id = disk_id(bootstrap, size);
    let files = open_outputs(dir, size).map_err(fail)?;
    mmdebstrap(bootstrap, size, id, dir, &files, lines).await?;
    drop(files);
    for name in OUTPUTS {
        std::fs::set_permissions(dir.join(name), Permissions::from_mode(0o600)).map_err(fail)?;
    }
    esp(dir).await?;
    finish(dir, id).map_err(fail)
}

/// The filesystem's and the disk's identity: the same for the same bootstrap,
/// so that nothing in the result depends on chance.
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

/// Makes the outputs, open for everybody while mmdebstrap runs: the root of
/// its namespace is another user than we are. The directory is ours alone.
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
    lines: &Lines,
) -> Result<(), ProviderError> {
    let mode = if rustix::process::geteuid().is_root() { "root" } else { "unshare" };
    let packages: Vec<&str> =
        PACKAGES.iter().copied().chain(bootstrap.packages.iter().map(String::as_str)).collect();
    let root_kib = (gpt::root_end(size) - gpt::ROOT_START) * gpt::SECTOR / 1024;
    // mmdebstrap itself only waits for its children when it is told to end.
    // The shell in front of it leads their group and ends all of them.
    let mut command = Command::new("sh");
    command
        .args(["-c", "trap 'trap - TERM; kill -TERM 0; wait' TERM; mmdebstrap \"$@\" & wait $!", "sh"])
        .arg(format!("--mode={mode}"))
        .args(["--variant=apt", "--format=null"])
        .arg(format!("--include={}", packages.join(",")))
        .args([
            "--aptopt=APT::Sandbox::User \"root\"",
            "--aptopt=Acquire::Languages \"none\"",
            "--aptopt=Acquire::Retries \"3\"",
            "--dpkgopt=force-unsafe-io",
        ])
        .arg(format!("--essential-hook={}", include_str!("debian/essential.sh")))
        .arg("--customize-hook=mkdir -p \"$1/usr/lib/vimg\" \"$1/etc/systemd/system\"")
        .args(
            UPLOADS.map(|(name, _, to)| format!("--customize-hook=upload {} {to}", quoted(&dir.join(name)))),
        )
        .arg(format!("--customize-hook={}", include_str!("debian/customize.sh")))
        .arg(&bootstrap.suite)
        .arg("/dev/null")
        .args(&bootstrap.mirror)
        .env("VIMG_ROOT_UUID", uuid(id))
        .env("VIMG_ROOT_OFFSET", (gpt::ROOT_START * gpt::SECTOR).to_string())
        .env("VIMG_ROOT_KIB", root_kib.to_string())
        .env("VIMG_MKFS", include_str!("debian/mkfs.sh"))
        .env("DEBIAN_FRONTEND", "noninteractive")
        .env("LC_ALL", "C.UTF-8")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .process_group(0);
    // Copies far above the places that they are put at, so that none of them
    // is overwritten on the way.
    let fail = |e: rustix::io::Errno| ProviderError::new(format!("mmdebstrap can't be run: {e}"));
    let copies = files
        .iter()
        .map(|f| rustix::io::fcntl_dupfd_cloexec(f, 2 * FIRST_FD))
        .collect::<Result<Vec<OwnedFd>, _>>()
        .map_err(fail)?;
    let own: Vec<i32> = copies.iter().map(AsRawFd::as_raw_fd).collect();
    let parent = rustix::process::getpid();
    // SAFETY: the closure makes system calls only; the descriptors stay open
    // in the parent until the child has been spawned.
    unsafe {
        command.pre_exec(move || {
            rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::TERM))?;
            if rustix::process::getppid() != Some(parent) {
                return Err(io::ErrorKind::Interrupted.into());
            }
            for (n, fd) in own.iter().enumerate() {
                let fd = BorrowedFd::borrow_raw(*fd);
                let mut to = ManuallyDrop::new(OwnedFd::from_raw_fd(FIRST_FD + n as i32));
                // dup2 leaves the copy open over exec.
                rustix::io::dup2(fd, &mut to)?;
            }
            Ok(())
        });
    }
    let mut child =
        command.spawn().map_err(|e| ProviderError::new(format!("mmdebstrap can't be run: {e}")))?;
    let stop = child.id().map(StopGroup);
    let mut tail: VecDeque<String> = VecDeque::new();
    if let Some(err) = child.stderr.take() {
        let mut reader = BufReader::new(err).split(b'\n');
        while let Ok(Some(line)) = reader.next_segment().await {
            let line = String::from_utf8_lossy(&line).trim_end().to_owned();
            // Its other lines are the hooks, repeated to the letter.
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
    std::mem::forget(stop);
    if status.success() {
        return Ok(());
    }
    let words: Vec<String> = tail.into_iter().collect();
    Err(ProviderError::new(format!("mmdebstrap failed ({status}):\n{}", words.join("\n"))).help(
        "is the mirror reachable? On Ubuntu, Debian's keys are needed: apt-get install debian-archive-keyring",
    ))
}

/// Asks a process group to end when dropped: mmdebstrap then removes what it
/// made under other user ids, which nobody else could.
struct StopGroup(u32);

impl Drop for StopGroup {
    fn drop(&mut self) {
        if let Some(group) = rustix::process::Pid::from_raw(self.0 as i32) {
            let _ = rustix::process::kill_process_group(group, rustix::process::Signal::TERM);
        }
    }
}

/// For mmdebstrap's own commands, which split words as a shell does.
fn quoted(path: &Path) -> String {
    format!("'{}'", path.display().to_string().replace('\'', "'\\''"))
}

/// The EFI system partition with GRUB in it.
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
        let path = find_program(name).unwrap_or_else(|| name.into());
        let output = Command::new(path)
            .args(args)
            .stdin(Stdio::null())
            .output()
            .await
            .map_err(|e| ProviderError::new(format!("{name} can't be run: {e}")))?;
        if !output.status.success() {
            let words = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            return Err(ProviderError::new(format!("{name}: {words}")));
        }
    }
    Ok(())
}

/// Puts the parts together.
fn finish(dir: &Path, id: [u8; 16]) -> io::Result<Made> {
    use std::io::{Seek, SeekFrom};
    let disk = dir.join("disk.raw");
    let mut file = OpenOptions::new().read(true).write(true).open(&disk)?;
    file.seek(SeekFrom::Start(gpt::ESP_START * gpt::SECTOR))?;
    sparse_copy(&mut File::open(dir.join("esp.img"))?, &mut file)?;
    gpt::write(&mut file, id, &std::fs::read(dir.join("boot.img"))?, &std::fs::read(dir.join("core.img"))?)?;
    let initrd = dir.join("initrd");
    // The kernel takes several archives one after the other.
    let mut early = initramfs::with_init(AGENT);
    early.extend(std::fs::read(dir.join("modules.cpio"))?);
    std::fs::write(&initrd, early)?;
    let uploaded = UPLOADS.iter().map(|(name, ..)| name);
    for name in ["esp.img", "modules.cpio", "core.img", "boot.img", "bootx64.efi"].iter().chain(uploaded) {
        std::fs::remove_file(dir.join(name))?;
    }
    Ok(Made { disk, kernel: dir.join("vmlinuz"), initrd, modules: dir.join("appliance.cpio") })
}

/// Copies to where `to` stands and leaves holes where `from` has only zeroes.
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
}

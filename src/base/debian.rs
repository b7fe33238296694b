//! Debian. mmdebstrap installs the packages, and `mke2fs -d` makes the
//! filesystem in its namespaces; this module writes the partition table and the
//! boot code. It needs no loop device and boots no machine.

use std::fs::{File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Stdio;

use futures_util::future::BoxFuture;
use vimg_agent::protocol;
use vimg_lang::model::{Bootstrap, Kernel};

use super::distribution::{Base, Distribution, Wanted};
use super::mmdebstrap::{self, Hooks, Run};
use crate::agent;
use crate::digest::Digest;
use crate::disk::gpt;
use crate::host::{self, HostError};

/// Debian, from the packages of a mirror.
pub(super) struct Debian;

impl Distribution for Debian {
    fn name(&self) -> &'static str {
        "debian"
    }

    fn suites(&self) -> &'static [&'static str] {
        &["bookworm", "trixie"]
    }

    fn behaviour(&self) -> u32 {
        6
    }

    fn missing(&self) -> Option<HostError> {
        mmdebstrap::missing()
    }

    fn make<'a>(&'a self, wanted: Wanted<'a>) -> BoxFuture<'a, Result<Base, HostError>> {
        Box::pin(make(wanted))
    }
}

/// Packages of every base besides its kernel: enough to boot, to use a network, to
/// have the right time and to install more. GRUB is purged again after it has made
/// its images.
const PACKAGES: &[&str] = &[
    "initramfs-tools",
    "zstd",
    "xz-utils",
    "systemd-sysv",
    "systemd-resolved",
    "systemd-timesyncd",
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

/// Lists the packages of a base.
fn packages(bootstrap: &Bootstrap) -> Vec<&str> {
    // Debian 13 split it off from the package `systemd`.
    let repart = (bootstrap.suite != "bookworm").then_some("systemd-repart");
    let own = bootstrap.packages.iter().map(String::as_str);
    std::iter::once(kernel(bootstrap.kernel))
        .chain(PACKAGES.iter().copied())
        .chain(repart)
        .chain(own)
        .collect()
}

/// Files that the hooks write to, from descriptor 100 on: disk, kernel,
/// modules, GRUB's core, its first sector, its UEFI program, an appliance's
/// modules.
const OUTPUTS: [&str; 7] =
    ["disk.raw", "vmlinuz", "modules.cpio", "core.img", "boot.img", "bootx64.efi", "appliance.cpio"];

/// Files that a base has besides the packages of its distribution.
const UPLOADS: [(&str, &[u8], &str); 4] = [
    ("agent", agent::PROGRAM, protocol::AGENT),
    ("update-grub", include_bytes!("debian/update-grub"), "/usr/lib/vimg/update-grub"),
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

/// The package of a kernel. The initrd of Debian has the drivers of all disks that
/// the kernel has.
fn kernel(kernel: Kernel) -> &'static str {
    match kernel {
        Kernel::Cloud => "linux-image-cloud-amd64",
        Kernel::Generic => "linux-image-amd64",
    }
}

async fn make(wanted: Wanted<'_>) -> Result<Base, HostError> {
    let Wanted { bootstrap, size, dir, access, lines } = wanted;
    let fail = |e: io::Error| HostError::io("can't create the disk", &e);
    let id = disk_id(bootstrap, size);
    let root_kib = (gpt::root_end(size) - gpt::ROOT_START) * gpt::SECTOR / 1024;
    let files = open_outputs(dir, size).map_err(fail)?;
    let run = Run {
        suite: &bootstrap.suite,
        packages: packages(bootstrap),
        uploads: &UPLOADS,
        hooks: Hooks {
            setup: include_str!("debian/setup.sh"),
            essential: include_str!("debian/essential.sh"),
            customize: include_str!("debian/customize.sh"),
        },
        variables: vec![
            ("VIMG_ROOT_UUID", uuid(id)),
            ("VIMG_ROOT_OFFSET", (gpt::ROOT_START * gpt::SECTOR).to_string()),
            ("VIMG_ROOT_KIB", root_kib.to_string()),
            ("VIMG_MKFS", include_str!("debian/mkfs.sh").to_owned()),
            ("VIMG_MIRROR", bootstrap.mirror.clone().unwrap_or_default()),
            ("MKE2FS_CONFIG", "/dev/null".to_owned()),
        ],
        outputs: &files,
        dir,
    };
    run.run(access, lines).await?;
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

/// Makes the EFI system partition, with GRUB.
async fn esp(dir: &Path) -> Result<(), HostError> {
    let file = dir.join("esp.img");
    File::create(&file)
        .and_then(|f| f.set_len(gpt::ESP_SECTORS * gpt::SECTOR))
        .map_err(|e| HostError::io(file.display(), &e))?;
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
            .map_err(|e| HostError::io(format_args!("can't run {name}"), &e))?;
        if !output.status.success() {
            return Err(HostError::program(name, String::from_utf8_lossy(&output.stderr).trim()));
        }
    }
    Ok(())
}

/// Assembles the disk from its parts.
fn finish(dir: &Path, id: [u8; 16]) -> io::Result<Base> {
    use std::io::{Seek, SeekFrom};
    let disk = dir.join("disk.raw");
    let mut file = OpenOptions::new().read(true).write(true).open(&disk)?;
    file.seek(SeekFrom::Start(gpt::ESP_START * gpt::SECTOR))?;
    sparse_copy(&mut File::open(dir.join("esp.img"))?, &mut file)?;
    gpt::write(&mut file, id, &std::fs::read(dir.join("boot.img"))?, &std::fs::read(dir.join("core.img"))?)?;
    for name in ["esp.img", "core.img", "boot.img", "bootx64.efi"] {
        std::fs::remove_file(dir.join(name))?;
    }
    let boot = Some((dir.join("vmlinuz"), dir.join("modules.cpio")));
    Ok(Base { disk, boot, modules: Some(dir.join("appliance.cpio")) })
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
            kernel: Kernel::default(),
            packages: vec![],
        };
        let a = disk_id(&bootstrap("bookworm"), 1 << 30);
        assert_eq!(a, disk_id(&bootstrap("bookworm"), 1 << 30));
        assert_ne!(a, disk_id(&bootstrap("trixie"), 1 << 30));
        let text = uuid(a);
        assert_eq!(text.len(), 36);
        assert_eq!(&text[14..15], "8");
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

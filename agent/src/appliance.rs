//! Works on the disk of another machine: mounts it, makes it the root of the agent, and
//! provides the filesystems and devices that programs expect.

use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use rustix::fs::{CWD, FileType, Mode, makedev};
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_bind, mount_remount, unmount};

use crate::filesystem;
use crate::protocol::Prepare;
use crate::{modules, network, offline, resolver, resume, system};

/// The kernel's name of the disk, which is the only virtio-blk disk.
const DISK: &str = "vda";
/// The mount point of the EFI system partition, if the image has this directory.
const ESP: &str = "/boot/efi";
/// The mounted disk of a machine.
pub(crate) struct Attached {
    /// Whether a filesystem is mounted at [`ESP`].
    esp: bool,
}

/// Makes the root filesystem of the disk the root of this process.
pub(crate) fn prepare(prepare: &Prepare) -> io::Result<Attached> {
    resume::resume(&prepare.resume)?;
    modules::load("disk")?;
    let found = filesystem::find(DISK)?;
    filesystem::mount_root(&found, "/root")?;
    network::loopback()?;
    if let Some(network) = &prepare.network {
        network::up()?;
        resolver::set(&network.resolv_conf);
    }
    let esp = filesystem::esp(&found).filter(|_| Path::new("/root").join(&ESP[1..]).is_dir());
    if let Some(esp) = esp {
        filesystem::attach(esp, &format!("/root{ESP}"), "")?;
    }
    outfit("/root")?;
    // The old mounts would stay reachable below the new root.
    for name in ["/sys", "/proc", "/dev"] {
        unmount(name, UnmountFlags::DETACH)?;
    }
    modules::leave();
    system::switch_root("/root")?;
    if let Ok(name) = fs::read_to_string("/etc/hostname") {
        // Package scripts write the host name into files that they create.
        rustix::system::sethostname(name.trim().as_bytes())?;
    }
    offline::confine();
    Ok(Attached { esp: esp.is_some() })
}

/// Mounts, below `root`, the filesystems that programs expect of a running system. They
/// give no access to the disk device or to the appliance's kernel.
fn outfit(root: &str) -> io::Result<()> {
    let at = |name: &str| format!("{root}{name}");
    let quiet = MountFlags::NOSUID | MountFlags::NODEV;
    for name in ["/proc", "/sys", "/dev", "/run"] {
        if !Path::new(&at(name)).is_dir() {
            return Err(io::Error::other(format!("the image has no directory {name}")));
        }
    }
    mount("proc", at("/proc"), "proc", quiet | MountFlags::NOEXEC, None)?;
    for name in ["/proc/sys", "/proc/sysrq-trigger", "/proc/irq", "/proc/bus"] {
        mount_bind(at(name), at(name))?;
        mount_remount(at(name), MountFlags::BIND | MountFlags::RDONLY | quiet, c"")?;
    }
    mount("sysfs", at("/sys"), "sysfs", quiet | MountFlags::NOEXEC | MountFlags::RDONLY, None)?;
    mount("tmpfs", at("/run"), "tmpfs", quiet, c"mode=0755")?;
    mount("tmpfs", at("/dev"), "tmpfs", MountFlags::NOSUID, c"mode=0755")?;
    for (name, major, minor) in
        [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)]
    {
        let path = at(&format!("/dev/{name}"));
        rustix::fs::mknodat(
            CWD,
            &path,
            FileType::CharacterDevice,
            Mode::from_raw_mode(0o666),
            makedev(major, minor),
        )?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o666))?;
    }
    for (name, target) in [
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
        ("ptmx", "pts/ptmx"),
    ] {
        symlink(target, at(&format!("/dev/{name}")))?;
    }
    for name in ["/dev/pts", "/dev/shm"] {
        fs::create_dir(at(name))?;
    }
    mount("tmpfs", at("/dev/shm"), "tmpfs", quiet, c"mode=1777")?;
    // The kernel may lack pseudo-terminals.
    let _ =
        mount("devpts", at("/dev/pts"), "devpts", MountFlags::NOSUID, c"newinstance,ptmxmode=0666,mode=0620");
    Ok(())
}

impl Attached {
    /// Blocks all writes.
    pub(crate) fn hold(&self) -> io::Result<()> {
        self.esp(true)?;
        system::freeze(true)
    }

    /// Allows writes again.
    pub(crate) fn thaw(&self) -> io::Result<()> {
        system::freeze(false)?;
        self.esp(false)
    }

    /// Makes the EFI system partition read-only, or writable again. A FAT filesystem
    /// can't be frozen.
    fn esp(&self, hold: bool) -> io::Result<()> {
        if self.esp {
            let flags = if hold { MountFlags::RDONLY } else { MountFlags::empty() };
            mount_remount(ESP, flags, c"")?;
        }
        Ok(())
    }
}

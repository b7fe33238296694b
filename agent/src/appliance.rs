//! Works on the disk of another machine from outside of it: mounts it, makes
//! its root the agent's own, and gives it what programs expect of a system.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use rustix::fs::{CWD, FileType, Mode, makedev};
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_bind, mount_remount, unmount};
use rustix::time::{ClockId, Timespec, clock_settime};

use crate::filesystem::{self, Found};
use crate::protocol::Prepare;
use crate::{modules, network, offline, system};

/// The disk's name in the kernel: the only virtio-blk disk there is.
const DISK: &str = "vda";
/// Where an EFI system partition belongs.
const ESP: &str = "/boot/efi";
/// linux/random.h: RNDRESEEDCRNG is _IO('R', 7).
const RNDRESEEDCRNG: rustix::ioctl::Opcode = 0x5207;

/// A machine's disk, mounted.
pub(crate) struct Attached {
    /// Mounted at [`ESP`] while writes are not held.
    esp: Option<Found>,
}

/// Makes the disk's root filesystem this process's own.
pub(crate) fn prepare(prepare: &Prepare) -> io::Result<Attached> {
    wake(prepare)?;
    modules::load("disk")?;
    let found = filesystem::find(DISK)?;
    filesystem::mount_root(&found, "/root")?;
    if let Some(network) = &prepare.network {
        network::up()?;
        offline::resolve_by(&network.resolv_conf);
    }
    let esp = filesystem::esp(&found).filter(|_| Path::new("/root").join(&ESP[1..]).is_dir());
    if esp.is_some() {
        // Where the modules are can't be reached any more from the new root.
        modules::load("vfat")?;
    }
    outfit("/root")?;
    system::switch_root("/root")?;
    offline::confine();
    let mut attached = Attached { esp: esp.cloned() };
    attached.release()?;
    Ok(attached)
}

/// What two forks of one memory must not share: the time at which they were
/// made, and what their kernels take for random.
fn wake(prepare: &Prepare) -> io::Result<()> {
    let now = Timespec { tv_sec: prepare.seconds as i64, tv_nsec: 0 };
    clock_settime(ClockId::Realtime, now)?;
    let mut random = OpenOptions::new().write(true).open("/dev/urandom")?;
    random.write_all(&prepare.seed)?;
    // SAFETY: the call takes no argument, and `random` is open.
    unsafe { rustix::ioctl::ioctl(random.as_fd(), rustix::ioctl::NoArg::<RNDRESEEDCRNG>::new()) }?;
    Ok(())
}

/// Mounts what programs expect of a running system below `root`, and nothing
/// by which they could reach the disk or the kernel beneath their root.
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
    // A kernel without pseudo-terminals is no obstacle.
    let _ =
        mount("devpts", at("/dev/pts"), "devpts", MountFlags::NOSUID, c"newinstance,ptmxmode=0666,mode=0620");
    Ok(())
}

impl Attached {
    /// Holds all writes.
    pub(crate) fn hold(&mut self) -> io::Result<()> {
        if self.esp.is_some() {
            // A FAT filesystem can't hold writes; one that is not there can.
            unmount(ESP, UnmountFlags::empty())?;
        }
        system::freeze(Path::new("/"), true)
    }

    /// Lets writes go on.
    pub(crate) fn thaw(&mut self) -> io::Result<()> {
        system::freeze(Path::new("/"), false)?;
        self.release()
    }

    fn release(&mut self) -> io::Result<()> {
        match &self.esp {
            // The device's name is gone with /dev, its number is not.
            Some(esp) => {
                let name = esp.device.trim_start_matches("/dev/");
                let number = fs::read_to_string(format!("/sys/class/block/{name}/dev"))?;
                let (major, minor) = number.trim().split_once(':').unwrap_or_default();
                let number = makedev(major.parse().unwrap_or(0), minor.parse().unwrap_or(0));
                let device = format!("/run/{name}");
                rustix::fs::mknodat(CWD, &device, FileType::BlockDevice, Mode::RUSR, number)?;
                let mounted = filesystem::attach(&esp.at(&device), ESP, "");
                fs::remove_file(&device)?;
                mounted
            }
            None => Ok(()),
        }
    }
}

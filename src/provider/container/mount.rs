//! Mounts the root filesystem of a disk file, invisible to other processes:
//! neither the loop device nor the mount has a name that outlives its
//! descriptor.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use rustix::ioctl::{Opcode, Setter, ioctl};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string,
    fsmount, fsopen,
};
use rustix::pipe::{PipeFlags, pipe_with};
use vimg_agent::fsctl;

// linux/loop.h
const LOOP_CTL_GET_FREE: libc::c_ulong = 0x4C82;
const LOOP_CONFIGURE: Opcode = 0x4C0A;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
/// How long killed processes may hold a mount.
const RELEASE: Duration = Duration::from_secs(5);

/// `struct loop_config` of linux/loop.h.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo,
    reserved: [u64; 8],
}

/// `struct loop_info64`.
#[repr(C)]
struct LoopInfo {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// A mounted filesystem.
pub(super) struct Mounted {
    /// The detached mount.
    pub(super) mount: OwnedFd,
    root: File,
    /// The loop device's name.
    device: String,
}

impl Mounted {
    /// Mounts the ext4 filesystem at `offset` in `disk`, both in bytes. With a
    /// user namespace, the ids on disk are those inside it.
    ///
    /// # Errors
    ///
    /// `Unsupported` if the kernel can't map the ids; otherwise errors of the
    /// system.
    pub(super) fn new(
        disk: &File,
        offset: u64,
        size: u64,
        users: Option<BorrowedFd<'_>>,
    ) -> io::Result<Self> {
        let (path, device) = attach(disk, offset, size)?;
        let context = fsopen("ext4", FsOpenFlags::FSOPEN_CLOEXEC)?;
        fsconfig_set_string(context.as_fd(), "source", format!("/dev/{path}"))?;
        // Deleted blocks become holes in the disk.
        fsconfig_set_flag(context.as_fd(), "discard")?;
        // An error must not panic the host, whatever the superblock says.
        fsconfig_set_string(context.as_fd(), "errors", "remount-ro")?;
        fsconfig_create(context.as_fd())?;
        // The filesystem holds the device now; the device goes when it is
        // unmounted.
        drop(device);
        let flags = MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOATIME;
        let mount = fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, flags)?;
        if let Some(users) = users {
            map_ids(&mount, users).map_err(|e| match e.raw_os_error() {
                Some(libc::EINVAL | libc::ENOSYS | libc::EOPNOTSUPP | libc::EPERM) => {
                    io::Error::new(io::ErrorKind::Unsupported, e)
                }
                _ => e,
            })?;
        }
        let root = rustix::fs::openat(
            &mount,
            ".",
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        Ok(Self { mount, root: root.into(), device: path })
    }

    /// Unmounts, and waits until the filesystem is written and its disk is
    /// released. Killed processes may still hold the mount for a moment.
    pub(super) fn release(self) {
        let bound = format!("/sys/block/{}/loop", self.device);
        drop(self);
        let start = Instant::now();
        while Path::new(&bound).exists() && start.elapsed() < RELEASE {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Writes all data to the disk. Reports errors of earlier writes.
    pub(super) fn sync(&self) -> io::Result<()> {
        Ok(rustix::fs::syncfs(&self.root)?)
    }

    /// Freezes the filesystem until the returned value is dropped or this
    /// process is killed.
    pub(super) fn hold(&self) -> io::Result<Held<'_>> {
        let thaw = Thaw::start(&self.root)?;
        fsctl::freeze(&self.root, true)?;
        Ok(Held { mounted: self, _thaw: thaw })
    }

    /// Discards unused blocks. A failure only makes the disk larger.
    pub(super) fn trim(&self) {
        fsctl::trim(&self.root);
    }

    /// Whether `path` exists.
    pub(super) fn has(&self, path: &str) -> bool {
        rustix::fs::statat(&self.root, path, rustix::fs::AtFlags::SYMLINK_NOFOLLOW).is_ok()
    }

    /// Reads a small file of the filesystem. Does not follow links, because the
    /// image controls them.
    pub(super) fn read(&self, path: &str) -> Option<String> {
        use std::io::Read;
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let resolve = rustix::fs::ResolveFlags::IN_ROOT | rustix::fs::ResolveFlags::NO_SYMLINKS;
        let file = rustix::fs::openat2(&self.root, path, flags, Mode::empty(), resolve).ok()?;
        let mut text = String::new();
        File::from(file).take(4096).read_to_string(&mut text).ok()?;
        Some(text)
    }
}

/// `struct mount_attr` of linux/mount.h.
#[repr(C)]
struct MountAttr {
    set: u64,
    clear: u64,
    propagation: u64,
    users: u64,
}

/// linux/mount.h
const MOUNT_ATTR_IDMAP: u64 = 0x0010_0000;

/// Maps the ids of a detached mount to those of a user namespace
/// (mount_setattr(2); ext4 can since Linux 5.12).
fn map_ids(mount: &OwnedFd, users: BorrowedFd<'_>) -> io::Result<()> {
    let attr = MountAttr { set: MOUNT_ATTR_IDMAP, clear: 0, propagation: 0, users: users.as_raw_fd() as u64 };
    // SAFETY: the call reads an empty path and the structure, and both outlive
    // it.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attr,
            std::mem::size_of::<MountAttr>(),
        )
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Keeps the filesystem frozen until it is dropped.
pub(super) struct Held<'a> {
    mounted: &'a Mounted,
    _thaw: Thaw,
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let _ = fsctl::freeze(&self.mounted.root, false);
    }
}

/// A process that thaws a filesystem when this one ends, even by kill -9. A
/// frozen filesystem without a mount would keep its loop device until the host
/// reboots.
struct Thaw {
    process: libc::pid_t,
    /// The other process reads end-of-file when this is closed.
    life: Option<OwnedFd>,
}

impl Thaw {
    fn start(root: &File) -> io::Result<Self> {
        let (end, life) = pipe_with(PipeFlags::CLOEXEC)?;
        // SAFETY: the child has one thread, makes system calls only, and never
        // returns.
        match unsafe { libc::fork() } {
            -1 => Err(io::Error::last_os_error()),
            0 => unsafe {
                // Signals from a terminal are for vimg.
                libc::setsid();
                libc::dup2(end.as_raw_fd(), 0);
                libc::dup2(root.as_raw_fd(), 1);
                // This also closes the write end of the pipe.
                libc::close_range(2, libc::c_uint::MAX, 0);
                let mut byte = 0_u8;
                while libc::read(0, (&raw mut byte).cast(), 1) == -1
                    && *libc::__errno_location() == libc::EINTR
                {}
                let _ = fsctl::freeze(BorrowedFd::borrow_raw(1), false);
                libc::_exit(0)
            },
            process => Ok(Self { process, life: Some(life) }),
        }
    }
}

impl Drop for Thaw {
    fn drop(&mut self) {
        self.life = None;
        // SAFETY: the process is this one's child, and nothing else waits for
        // it.
        while unsafe { libc::waitpid(self.process, std::ptr::null_mut(), 0) } == -1
            && io::Error::last_os_error().kind() == io::ErrorKind::Interrupted
        {}
    }
}

/// Attaches a range of a file to a loop device, which is released with its last
/// user.
fn attach(disk: &File, offset: u64, size: u64) -> io::Result<(String, File)> {
    let control = OpenOptions::new().read(true).write(true).open("/dev/loop-control")?;
    loop {
        // SAFETY: the call takes no argument and answers with a number.
        let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
        if number < 0 {
            return Err(io::Error::last_os_error());
        }
        let name = format!("loop{number}");
        let device = OpenOptions::new().read(true).write(true).open(Path::new("/dev").join(&name))?;
        let config = LoopConfig {
            fd: disk.as_raw_fd() as u32,
            block_size: 4096,
            info: LoopInfo {
                device: 0,
                inode: 0,
                rdevice: 0,
                offset,
                size_limit: size,
                number: 0,
                encrypt_type: 0,
                encrypt_key_size: 0,
                flags: LO_FLAGS_AUTOCLEAR,
                file_name: [0; 64],
                crypt_name: [0; 64],
                encrypt_key: [0; 32],
                init: [0; 2],
            },
            reserved: [0; 8],
        };
        // SAFETY: the opcode takes a `struct loop_config`, which this is.
        match unsafe { ioctl(device.as_fd(), Setter::<LOOP_CONFIGURE, LoopConfig>::new(config)) } {
            Ok(()) => return Ok((name, device)),
            // Another process took this number first.
            Err(rustix::io::Errno::BUSY) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::process::{Command, Stdio};

    use super::*;

    /// Environment variable for the test's own child process: the disk to
    /// freeze.
    const DISK: &str = "VIMG_TEST_FROZEN_DISK";

    #[test]
    fn what_is_killed_leaves_no_frozen_filesystem() {
        const SIZE: u64 = 32 << 20;
        if let Some(disk) = std::env::var_os(DISK) {
            let disk = File::options().read(true).write(true).open(disk).unwrap();
            let mounted = Mounted::new(&disk, 0, SIZE, None).unwrap();
            let _held = mounted.hold().unwrap();
            println!("\nfrozen {}", mounted.device);
            std::thread::sleep(Duration::from_secs(600));
            return;
        }
        if !rustix::process::geteuid().is_root() {
            // Only root can mount, so only root has containers.
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("disk");
        File::create(&disk).unwrap().set_len(SIZE).unwrap();
        assert!(
            Command::new("mke2fs")
                .args(["-q", "-t", "ext4", "-b", "4096"])
                .arg(&disk)
                .status()
                .unwrap()
                .success()
        );
        let module = module_path!().split_once("::").unwrap().1;
        let mut frozen = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "--nocapture"])
            .arg(format!("{module}::what_is_killed_leaves_no_frozen_filesystem"))
            .env(DISK, &disk)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(frozen.stdout.take().unwrap()).lines().map_while(Result::ok);
        let device = lines.into_iter().find_map(|line| Some(line.strip_prefix("frozen ")?.to_owned()));
        let device = device.unwrap();
        let bound = Path::new("/sys/block").join(&device).join("loop/backing_file");
        assert!(bound.exists());
        frozen.kill().unwrap();
        frozen.wait().unwrap();
        let start = Instant::now();
        while bound.exists() {
            assert!(start.elapsed() < Duration::from_secs(20), "{device} is still there");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

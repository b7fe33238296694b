//! Makes a fork of a machine's memory a machine of its own: the time at which
//! it was made, and what its kernel takes for random.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use rustix::ioctl::{NoArg, Opcode, Setter};
use rustix::mount::{UnmountFlags, mount_bind, unmount};
use rustix::time::{ClockId, Timespec, clock_settime};

use crate::protocol::Wake;

/// linux/random.h: RNDADDENTROPY is _IOW('R', 3, int[2]), RNDRESEEDCRNG is
/// _IO('R', 7).
const RNDADDENTROPY: Opcode = 0x4008_5203;
const RNDRESEEDCRNG: Opcode = 0x5207;
/// How many bytes of the host's randomness are taken.
const SEED: usize = 64;

/// The kernel's name for this boot, and what stands in for it in a fork.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
const OWN_BOOT_ID: &str = "/run/vimg-boot-id";

/// `struct rand_pool_info`.
#[repr(C)]
struct Entropy {
    bits: i32,
    size: i32,
    bytes: [u8; SEED],
}

/// Steps the clock and reseeds the kernel.
pub(crate) fn wake(wake: &Wake) -> io::Result<()> {
    let now =
        Timespec { tv_sec: (wake.time / 1_000_000_000) as i64, tv_nsec: (wake.time % 1_000_000_000) as i64 };
    clock_settime(ClockId::Realtime, now)?;
    let random = OpenOptions::new().write(true).open("/dev/urandom")?;
    let mut seed = Entropy { bits: 8 * SEED as i32, size: SEED as i32, bytes: [0; SEED] };
    let given = wake.seed.get(..SEED).ok_or_else(|| io::Error::other("the seed is too short"))?;
    seed.bytes.copy_from_slice(given);
    // SAFETY: the first call takes a `struct rand_pool_info`, which `Entropy`
    // is, the second nothing, and `random` is open.
    unsafe {
        rustix::ioctl::ioctl(random.as_fd(), Setter::<RNDADDENTROPY, Entropy>::new(seed))?;
        rustix::ioctl::ioctl(random.as_fd(), NoArg::<RNDRESEEDCRNG>::new())?;
    }
    Ok(())
}

/// Gives a machine that was booted once a name of its own for its boot, in
/// the place where programs look for it.
pub(crate) fn rename_boot() -> io::Result<()> {
    let own = fs::read_to_string("/proc/sys/kernel/random/uuid")?;
    // A fork of a fork has one already.
    if Path::new(OWN_BOOT_ID).exists() {
        let _ = unmount(BOOT_ID, UnmountFlags::DETACH);
    }
    fs::write(OWN_BOOT_ID, own)?;
    Ok(mount_bind(OWN_BOOT_ID, BOOT_ID)?)
}

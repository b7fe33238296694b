//! Resumes a fork: sets its clock, and gives its kernel new randomness.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::AsFd;

use rustix::ioctl::{NoArg, Opcode, Setter};
use rustix::time::{ClockId, Timespec, clock_settime};

use crate::protocol::Resume;

/// linux/random.h: RNDADDENTROPY is `_IOW('R', 3, int[2])`, RNDRESEEDCRNG is
/// _IO('R', 7).
const RNDADDENTROPY: Opcode = 0x4008_5203;
const RNDRESEEDCRNG: Opcode = 0x5207;
/// How many bytes of the seed are used.
const SEED: usize = 64;

/// `struct rand_pool_info`.
#[repr(C)]
struct Entropy {
    bits: i32,
    size: i32,
    bytes: [u8; SEED],
}

/// Gives a fork its own randomness and time.
pub(crate) fn resume(resume: &Resume) -> io::Result<()> {
    reseed(resume)?;
    step(resume)
}

/// Sets the clock. This may trigger timers.
pub(crate) fn step(resume: &Resume) -> io::Result<()> {
    let now = Timespec {
        tv_sec: (resume.time / 1_000_000_000) as i64,
        tv_nsec: (resume.time % 1_000_000_000) as i64,
    };
    clock_settime(ClockId::Realtime, now).map_err(Into::into)
}

/// Gives the kernel randomness from the host.
pub(crate) fn reseed(resume: &Resume) -> io::Result<()> {
    let random = OpenOptions::new().write(true).open("/dev/urandom")?;
    let mut seed = Entropy { bits: 8 * SEED as i32, size: SEED as i32, bytes: [0; SEED] };
    let given = resume.seed.get(..SEED).ok_or_else(|| io::Error::other("the seed is too short"))?;
    seed.bytes.copy_from_slice(given);
    // SAFETY: the first call takes a `struct rand_pool_info`, which `Entropy` is; the
    // second takes nothing; and `random` is open.
    unsafe {
        rustix::ioctl::ioctl(random.as_fd(), Setter::<RNDADDENTROPY, Entropy>::new(seed))?;
        rustix::ioctl::ioctl(random.as_fd(), NoArg::<RNDRESEEDCRNG>::new())?;
    }
    Ok(())
}

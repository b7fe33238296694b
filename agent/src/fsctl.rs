//! Freezes and trims a mounted filesystem, by a descriptor of its root. The host calls
//! this for containers, in which the agent has no right to do so.

use std::io;
use std::os::fd::AsFd;

use rustix::ioctl::{NoArg, Opcode, Setter, ioctl};

// linux/fs.h: _IOWR('X', 119, int), _IOWR('X', 120, int) and
// _IOWR('X', 121, struct fstrim_range).
const FIFREEZE: Opcode = 0xC004_5877;
const FITHAW: Opcode = 0xC004_5878;
const FITRIM: Opcode = 0xC018_5879;

/// Blocks all writes, or allows them again.
///
/// # Errors
///
/// The filesystem can't be frozen, or the process is not root.
pub fn freeze(root: impl AsFd, hold: bool) -> io::Result<()> {
    // SAFETY: both calls ignore their argument.
    let result = unsafe {
        if hold { ioctl(root, NoArg::<FIFREEZE>::new()) } else { ioctl(root, NoArg::<FITHAW>::new()) }
    };
    result.map_err(io::Error::from)
}

/// Tells the disk which blocks the filesystem does not use. Ignores errors: without trim,
/// the disk is only larger.
pub fn trim(root: impl AsFd) {
    // `struct fstrim_range`: start, length, minimum length of a free extent.
    let range: [u64; 3] = [0, u64::MAX, 0];
    // SAFETY: the opcode takes a `struct fstrim_range`, which `range` is.
    let _ = unsafe { ioctl(root, Setter::<FITRIM, [u64; 3]>::new(range)) };
}

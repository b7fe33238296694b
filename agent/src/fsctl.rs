//! Orders to a mounted filesystem, by a descriptor of its root. The host uses
//! them where the agent may not.

use std::io;
use std::os::fd::AsFd;

use rustix::ioctl::{NoArg, Opcode, Setter, ioctl};

// linux/fs.h: _IOWR('X', 119, int), _IOWR('X', 120, int) and
// _IOWR('X', 121, struct fstrim_range).
const FIFREEZE: Opcode = 0xC004_5877;
const FITHAW: Opcode = 0xC004_5878;
const FITRIM: Opcode = 0xC018_5879;

/// Holds or releases all writes.
///
/// # Errors
///
/// What the system says: not every filesystem can, and it takes root.
pub fn freeze(root: impl AsFd, hold: bool) -> io::Result<()> {
    // SAFETY: both calls ignore their argument.
    let result = unsafe {
        if hold { ioctl(root, NoArg::<FIFREEZE>::new()) } else { ioctl(root, NoArg::<FITHAW>::new()) }
    };
    result.map_err(io::Error::from)
}

/// Tells the disk what the filesystem does not use. One that can't be told so
/// is only larger.
pub fn trim(root: impl AsFd) {
    // `struct fstrim_range`: start, length, the least that is worth it.
    let range: [u64; 3] = [0, u64::MAX, 0];
    // SAFETY: the opcode takes a `struct fstrim_range`, which `range` is.
    let _ = unsafe { ioctl(root, Setter::<FITRIM, [u64; 3]>::new(range)) };
}

//! The room on the host's disks.

use std::io;
use std::path::Path;

/// Free space below which a disk counts as full, in bytes. Programs that need
/// more than is left may fail before the last block is taken, and remove what
/// they have written.
const LITTLE: u64 = 16 << 20;

/// How the system says that a disk is full, in the locale of programs that
/// vimg starts.
const WORDS: &str = "No space left on device";

/// How apt says it, before it writes anything.
const APT: &str = "have enough free space in";

/// Whether a system call failed because a disk is full.
pub fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// Whether a program of the host says that a disk is full. Programs have no
/// other way to tell it.
pub fn says_full(output: &str) -> bool {
    output.contains(WORDS) || output.contains(APT)
}

/// Whether the disk that holds `path` is full, or nearly so.
pub fn is_scarce(path: &Path) -> bool {
    rustix::fs::statvfs(path).is_ok_and(|fs| fs.f_bavail * fs.f_frsize < LITTLE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_told_from_other_errors() {
        let full = io::Error::from_raw_os_error(libc::ENOSPC);
        assert!(is_full(&full) && says_full(&format!("qemu-img: {full}")));
        assert!(says_full("E: You don't have enough free space in /var/cache/apt/archives/."));
        assert!(is_full(&io::Error::from_raw_os_error(libc::EDQUOT)));
        let other = io::Error::from_raw_os_error(libc::EIO);
        assert!(!is_full(&other) && !says_full(&other.to_string()));
        assert!(!is_scarce(Path::new("/nowhere")));
    }
}

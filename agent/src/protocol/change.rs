//! What a machine that has booted is given of another disk.

use serde::{Deserialize, Serialize};

/// The most that changed files may hold together, in bytes.
pub const MAX_RETARGETED: u64 = 8 << 20;

/// A file of a filesystem, or what else has an inode. The number is used
/// again when a file is gone, with another generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Inode {
    /// Its number.
    pub number: u32,
    /// Which of those that had the number.
    pub generation: u32,
}

/// A time in a filesystem.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Time {
    /// Since 1970.
    pub seconds: i64,
    /// Less than a thousand million.
    pub nanoseconds: u32,
}

/// A file or a directory that is otherwise on another disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// Which, on the machine's own disk.
    pub inode: Inode,
    /// How many bytes it has on the disk that the machine booted from.
    pub size: u64,
    /// When it was changed last, there.
    pub modified: Time,
    /// When it was changed last, on the other disk.
    pub to: Time,
    /// The time is none at which it just happened to be made: who can't set it
    /// is not to go on without.
    pub chosen: bool,
    /// How many bytes it is to hold, which follow as data; none if they are
    /// the same.
    pub content: Option<u64>,
    /// Its path, for people.
    pub path: Option<String>,
}

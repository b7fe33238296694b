//! Changes of files that retarget a memory snapshot to another disk.

use serde::{Deserialize, Serialize};

/// The largest total size of changed files, in bytes.
pub const MAX_RETARGETED: u64 = 8 << 20;

/// An inode. When a file is deleted, its number is used again, with another generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Inode {
    /// Its number.
    pub number: u32,
    /// Tells inodes of the same number apart.
    pub generation: u32,
}

/// A time in a filesystem.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Time {
    /// Seconds since 1970.
    pub seconds: i64,
    /// Nanoseconds, less than 1,000,000,000.
    pub nanoseconds: u32,
}

/// A file or directory that differs between two disks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// Its inode on the disk that the machine booted from.
    pub inode: Inode,
    /// Its size in bytes on that disk.
    pub size: u64,
    /// Its modification time on that disk.
    pub modified: Time,
    /// Its modification time on the other disk.
    pub to: Time,
    /// Whether the modification time was set on purpose, and is not just the time at which
    /// the file was written. If it can't be set, the change fails.
    pub chosen: bool,
    /// The size of its new content in bytes, which follows as data; `None` if the content
    /// is the same.
    pub content: Option<u64>,
    /// Its path, for messages.
    pub path: Option<String>,
}

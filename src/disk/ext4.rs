//! Reads ext4 filesystems: compares two with a common origin, and lists and
//! reads the files of one. Format: the kernel's `Documentation/filesystems/ext4/`.
//!
//! Nothing is trusted: an invalid number is an error, and the caller does
//! without the answer.

mod tables;
mod tree;
mod differ;

pub use differ::{Altered, Difference, Special, differ};
pub use tables::Source;
pub use tree::{Entry, EntryKind, Head, Tree};

//! Reads ext4 filesystems, as far as needed to compare two with a common
//! origin. Format: the kernel's `Documentation/filesystems/ext4/`.
//!
//! Nothing is trusted: an invalid number is an error, and the caller does
//! without the answer.

mod tables;
mod differ;

pub use differ::{Altered, Difference, Special, differ};
pub use tables::Source;

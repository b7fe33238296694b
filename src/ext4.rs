//! Reads as much of an ext4 filesystem as it takes to tell how two that come
//! of one differ. Format: the kernel's `Documentation/filesystems/ext4/`.
//!
//! Nothing is believed: a number that makes no sense is an error, and whoever
//! asks does without the answer.

mod tables;
mod differ;

pub use differ::{Altered, Difference, Special, differ};
pub use tables::Source;

//! Where a base disk comes from: the packages of a distribution, or a disk that
//! exists. A new distribution is a file here, and a line in [`BUILT_IN`].

mod distribution;
mod mmdebstrap;
mod debian;
pub mod import;

pub use distribution::{Base, Distribution, Wanted, find, known};

/// The distributions of this program.
pub static BUILT_IN: &[&dyn Distribution] = &[&debian::Debian];

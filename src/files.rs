//! The project's files: read without leaving the project, hashed once.
//!
//! Knows nothing of recipes or nodes. Every path is opened below the project's
//! root with `RESOLVE_BENEATH`, so the kernel refuses links that lead out.

mod embedded;
mod stamps;
mod look;
mod place;
mod project;
mod witness;

pub use place::{Place, Places};
pub use project::{FileError, Project};
pub use stamps::{Stamp, Stamps, stamp};
pub use witness::Witness;

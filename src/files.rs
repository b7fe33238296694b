//! The project's files: read without leaving the project, hashed once.
//!
//! Knows nothing of recipes or nodes. Every path is opened below the project's
//! root with `RESOLVE_BENEATH`, so the kernel refuses links that lead out.

mod stamps;
mod dependency;
mod embedded;
mod project;
mod dependencies;
mod place;

pub use dependencies::DependencyRecord;
pub use place::{Place, Places};
pub use project::{FileError, Project};
pub use stamps::{Stamp, Stamps, stamp};

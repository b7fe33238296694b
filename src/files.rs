//! The project's files, read without leaving the project, and hashed once.
//!
//! This module knows nothing of recipes or nodes. It opens every path below the
//! project's root with `RESOLVE_BENEATH`, so the kernel refuses links that lead
//! out.

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

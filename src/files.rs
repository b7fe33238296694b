//! The project's files, read without leaving the project, and hashed once.
//!
//! This module knows nothing of recipes or nodes. It opens every path below the
//! project's root with `RESOLVE_BENEATH`, so the kernel refuses links that lead
//! out.

mod error;
mod stamps;
mod dependency;
mod embedded;
mod project;
mod tree;
mod script;
mod dependencies;
mod place;

pub use dependencies::DependencyRecord;
pub use error::FileError;
pub use place::{Place, Places};
pub use project::Project;
pub use stamps::{Stamp, Stamps, stamp};

//! One access to a path of the project, and what was found.

use rustix::fs::Stat;
use serde::{Deserialize, Serialize};

use super::stamps::{self, Stamp};

/// One access to a path.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Dependency {
    pub(super) path: String,
    /// Whether a link was followed. In a listing it is not.
    pub(super) follow: bool,
    /// The stamp of what was found; `None` if nothing was.
    pub(super) stamp: Option<Stamp>,
}

impl Dependency {
    pub(super) fn followed(path: &str, stat: Option<&Stat>) -> Self {
        Self { path: path.to_owned(), follow: true, stamp: stat.map(stamps::stamp) }
    }

    pub(super) fn entry(path: &str, stat: &Stat) -> Self {
        Self { path: path.to_owned(), follow: false, stamp: Some(stamps::stamp(stat)) }
    }
}

//! One look at a path of the project, and what was there.

use rustix::fs::Stat;
use serde::{Deserialize, Serialize};

use super::stamps::{self, Stamp};

/// One look at a path.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Dependency {
    pub(super) path: String,
    /// Whether a link is followed, or is itself what was found in a listing.
    pub(super) follow: bool,
    /// What was there, if anything.
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

//! Shared caches: signed states outside this machine. A state is used only if a
//! trusted key signed it.
//!
//! ```text
//! v4/records/<domain>/<key>     signed entries of a state and of the disks below
//! v4/packs/<sha256>             chunks of files, and lists of chunks
//! v4/builds/<domain>/<name>     the signed keys of a project's last build
//! v4/tombstones                 packs that no record needed at
//!                               the last garbage collection
//! v4/aside/<name>               temporary copies of packs, to refresh their age
//! ```
//!
//! An upload writes packs before the records that need them, so an interrupted
//! upload is invisible. Each read compares chunks with their digests. A cache
//! may fail in any way: the build makes what it can't fetch. This module knows
//! the store, and nothing of graphs.

pub mod sign;
mod kind;
pub mod spec;
pub mod wire;
pub mod entry;
pub mod object;
mod transport;
mod registry;
mod service;
mod budget;
pub mod remote;
mod caches;
pub mod gc;
mod chunk;
mod pull;
mod push;

pub use caches::{Caches, Hit};
pub use pull::Fetched;
pub use push::{Pushed, State};

//! States that others made, or may use: kept elsewhere, signed, and believed
//! only as far as their writers are.
//!
//! ```text
//! v1.2/records/<domain>/<key>   signed entries of a state and the disks below
//! v1.2/packs/<sha256>           pieces of files, and lists of pieces
//! v1.2/builds/<domain>/<name>   the note of a project's last build: its keys,
//!                               signed
//! v1.2/condemned                packs that nothing needed at the last clean-up
//! ```
//!
//! Packs are written before the records that need them, so that what was
//! interrupted is not seen. Every piece is compared with its digest when it is
//! read. A cache may fail in any way: what it does not give is built.
//! Knows the store, nothing of graphs.

pub mod sign;
pub mod spec;
pub mod entry;
pub mod object;
mod courier;
mod registry;
mod service;
pub mod remote;
mod caches;
pub mod keep;
mod piece;
mod pull;
mod push;

pub use caches::{Caches, Hit};
pub use pull::Fetched;
pub use push::{Pushed, State};

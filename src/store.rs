//! The store: the states of this machine.
//!
//! ```text
//! states/<key>/    disk.qcow2 | disk.raw, record.json, identity, log.zst
//! blobs/<digest>   kernels and initrds
//! staging/<pid>-<n>/                       work in progress
//! locks/<key>      held while a state is built
//! servers/<id>/    a project's servers, with their disks; not disposable
//! projects/<id>/   notes of a project's last build; disposable
//! parsed/ probes/ appliances/ snapshots/   caches; disposable
//! ```
//!
//! There is no index beside the files. A state appears by one rename of a
//! directory whose contents are on disk, or not at all. This module knows
//! nothing of providers and graphs.

mod area;
mod error;
mod lease;
mod record;
mod replace;
mod project;
mod lock;
mod staging;
mod states;
mod commit;
mod server;
pub mod gc;

pub use area::Area;
pub use error::StoreError;
pub use lease::Lease;
pub use lock::{KeyLock, lock, try_lock};
pub use project::{FailedDisk, Last, ProjectFiles, WrittenOutput};
pub use record::{Boot, Disk, DiskKind, Origin, Record, SCHEMA, StateId};
pub use replace::{replace, replace_note};
pub use server::{ServerHome, ServerRecord, read_server};
pub use staging::{Staging, settle};
pub use states::{Store, TrustsOrigin};

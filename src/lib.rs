//! The modules of the program, bottom to top: each imports only from those
//! above it in this list, which `tests/tidy.rs` enforces.
//! `docs/architecture.md` is the map.

pub mod digest;
pub mod event;
pub mod host;
pub mod sparse;
pub mod direct;
pub mod qcow2;
pub mod ext4;
pub mod files;
pub mod store;
pub mod cache;
pub mod provider;
pub mod graph;
pub mod plan;
pub mod execute;
pub mod report;
pub mod cli;

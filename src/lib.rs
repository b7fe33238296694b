//! The modules of the program, bottom to top: each imports only from those
//! above it in this list, which `tests/tidy.rs` enforces.
//! `docs/architecture.md` is the map.

pub mod digest;
pub mod event;
pub mod host;
pub mod agent;
pub mod disk;
pub mod files;
pub mod store;
pub mod cache;
pub mod base;
pub mod provider;
pub mod graph;
pub mod plan;
pub mod execute;
pub mod report;
pub mod cli;

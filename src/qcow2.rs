//! Reads the header of a qcow2 file before any program of QEMU opens it.
//!
//! `qemu-img` follows what a header names: on a hostile image even `check` and
//! `convert` were seen to open and copy host files (CVE-2024-32498). A disk
//! from outside is therefore refused unless its header is plain.
//! Format: QEMU's `docs/interop/qcow2.txt`.

mod header;
mod chain;
mod revision;

pub use chain::{Chain, join};
pub use header::{Header, compressed_clusters, is_qcow2, read};
pub use revision::Revision;

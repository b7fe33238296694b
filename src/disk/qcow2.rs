//! Reads qcow2 files without any program of QEMU, and checks their headers
//! before such a program opens them.
//!
//! `qemu-img` opens the files that a header names: on a hostile image even
//! `check` and `convert` were seen to open and copy host files
//! (CVE-2024-32498). So vimg refuses an imported disk unless its header is
//! plain. Format: QEMU's `docs/interop/qcow2.txt`.

mod header;
mod chain;
mod revision;

pub use chain::{Chain, join};
pub use header::{Header, compressed_clusters, is_qcow2, read};
pub use revision::Revision;

//! What recipes and the agent both say: primitives, scripts and probes, with everything
//! that the rest of vimg needs to know about them.
//!
//! The crate has no input and output. It knows nothing of files, keys and machines. The
//! modules are listed in the order of their layers; a module imports only from modules
//! above it.

mod field;
mod account;
mod script;
mod service;
mod primitive;
mod probe;

pub use account::{Owner, User};
pub use field::{Convert, Fields};
pub use primitive::{Converted, Primitive, Tool, Turn};
pub use probe::Probe;
pub use script::{Around, Run, Script, When};
pub use service::{ServiceState, unit};

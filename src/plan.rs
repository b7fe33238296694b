//! Which nodes are there, which must be built, and why. Reads the store and
//! never writes it.

mod steps;
mod standing;

pub use standing::{Standing, Wanted};
pub use steps::{Change, Plan, Reason, Step, changes};

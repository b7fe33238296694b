//! Decides which nodes exist, which must be built, and why. Reads the store and
//! never writes it.

mod steps;
mod cache;

pub use cache::{PlanCache, Wanted};
pub use steps::{Change, Plan, Reason, Step, changes};

//! Builds the nodes that the plan says are missing. This is the only module
//! that uses both a provider and the store.
//!
//! `batches` cuts the plan into batches: chains of nodes that one instance
//! builds one after the other, each on a new disk file, so that ten layers boot
//! once. Each node becomes a state of its own. Where a chain forks, one branch
//! continues in the instance, and the others start from the stored state.
//! Batches whose first parent exists run in parallel, as far as processors and
//! memory allow. `schedule` starts batches, `dispatch` makes orders for them,
//! `local` is the executor that builds them here, `session` talks to an agent,
//! and `log` stores the output of programs.
//!
//! A rebuilt layer may be identical to the previous one. Then the nodes above
//! it have other keys than the plan assumed, and most of them exist. `cutoff`
//! plans again and continues.

mod session;
mod inputs;
mod node_failure;
mod order;
mod executor;
mod staged;
mod worker;
mod node;
mod batch_context;
mod guest;
mod log;
mod explain;
mod retargeted;
mod make;
mod up;
mod prewarm;
mod checks;
mod export;
mod layer;
mod batch;
mod batches;
pub mod caching;
mod failure;
mod room;
mod states;
mod context;
mod project_inputs;
mod change;
mod compare;
mod dispatch;
mod local;
mod schedule;
mod cutoff;
mod interact;
mod console;
mod output;
pub mod server;

pub use compare::{Change, Comparison, How, compare};
pub use console::watch;
pub use context::{Budget, BuildContext, Secrets};
pub use cutoff::{make, remember};
pub use failure::Failure;
pub use interact::{Door, FailedLayer, interact};
pub use log::read as read_log;
pub use node_failure::FailureKind;
pub use output::write_outputs;
pub use room::Room;
pub use schedule::build;
pub use session::{Ended, Input};
pub use staged::StagedOutputs;
pub use states::Outcome;

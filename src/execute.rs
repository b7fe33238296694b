//! Makes what the plan says is missing: the only module that touches both a
//! provider and the store.
//!
//! Nodes are made in *runs*. A run is a chain of nodes that one machine makes
//! one after the other, its disk switched between them, so that ten layers
//! boot once; each of them is a state of its own. Where a chain forks, one
//! branch goes on in the machine and the others start from the state that was
//! kept. Runs whose first parent is there are made in parallel, as far as
//! processors and memory go. `runs` cuts the plan into runs, `run` makes one,
//! `session` speaks with an agent, `log` keeps what it says.
//!
//! A layer that was made anew may hold what it held before. What is made from
//! it is then known by another key, and is mostly there already: `cutoff` plans
//! again and goes on.

mod batches;
mod staged;
mod failure;
mod states;
mod context;
mod session;
mod guest;
mod log;
mod node;
mod explain;
mod retargeted;
mod make;
mod up;
mod prewarm;
mod checks;
mod layer;
mod batch;
pub mod caching;
mod change;
mod compare;
mod schedule;
mod cutoff;
mod interact;
mod output;
pub mod server;

pub use compare::{Change, Comparison, How, compare};
pub use context::{Budget, BuildContext, Secrets};
pub use cutoff::{make, remember};
pub use failure::{Failure, FailureKind};
pub use interact::{interact, watch};
pub use log::read as read_log;
pub use output::write_outputs;
pub use schedule::build;
pub use session::{Ended, Input};
pub use staged::StagedOutputs;
pub use states::Outcome;

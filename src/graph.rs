//! From a model to nodes with keys: what is to be there, and what each state
//! depends on. Files of the project are hashed here, each once.
//!
//! Knows nothing of the store: whether a state is there is the plan's matter.

mod node;
mod dag;
mod describe;
mod build;
mod server;
mod show;

pub use dag::{Graph, Target};
pub use describe::SECRET;
pub use node::{BlobSource, CheckWork, GraphError, LayerWork, Needs, Node, NodeId, Work};
pub use server::{Difference, ServerPart, ServerPlan, ServerWork};
pub use show::{Format, show};

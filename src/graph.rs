//! Turns a model into nodes with keys: the states to build, and what each
//! depends on. Hashes files of the project, each once.
//!
//! This module knows nothing of the store. The plan decides whether a state
//! exists.

mod parameters;
mod node;
mod dag;
mod describe;
mod build;
mod server;

pub use dag::{Graph, Target};
pub use node::{
    BlobSource, CheckOrder, CheckWork, Edge, Export, GraphError, GraphErrorKind, LayerOrder, LayerWork,
    Needs, Node, NodeId, Role, Work,
};
pub use parameters::KernelParameters;
pub use server::{Difference, ServerPart, ServerPlan, ServerWork};

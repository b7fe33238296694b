//! The plan cache: a plan in which everything exists, valid until an input of
//! it changes. With it, a build with nothing to do only reads the metadata of
//! each file and each state. It does not parse, render or hash anything.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use super::steps::Plan;
use crate::digest::{Digest, Key};
use crate::files::{DependencyRecord, Project};
use crate::graph::{Graph, Target};
use crate::store::Store;

/// An output file of the plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wanted {
    /// Its image.
    pub image: String,
    /// Its path, below the output directory.
    pub path: String,
    /// The key of its state.
    pub key: Key,
}

impl Wanted {
    /// Makes the output file of a target.
    pub fn new(graph: &Graph, target: &Target) -> Self {
        Self {
            image: target.image.clone(),
            path: target.output.path.clone(),
            key: graph.node(target.node).key,
        }
    }
}

/// The plan of a build whose nodes all existed in the end.
#[derive(Debug, Serialize, Deserialize)]
pub struct PlanCache {
    /// Digest of all inputs besides files: the program and its arguments.
    request: Digest,
    dependency_record: DependencyRecord,
    states: Vec<Key>,
    /// The output files to write, if they do not exist.
    pub wanted: Vec<Wanted>,
}

impl PlanCache {
    /// Makes the plan cache of a plan whose nodes all exist now. `None` if
    /// later changes of the project might not show.
    pub fn new(
        request: Digest,
        project: &Project,
        graph: &Graph,
        plan: &Plan,
        wanted: Vec<Wanted>,
    ) -> Option<Self> {
        let dependency_record = project.dependency_record()?;
        let states = plan.steps.keys().map(|id| graph.node(*id).key).collect();
        Some(Self { request, dependency_record, states, wanted })
    }

    /// The up-to-date check: whether the same request would give the same plan
    /// now.
    pub fn holds(&self, request: &Digest, project: &Project, store: &Store) -> bool {
        if self.request != *request {
            return false;
        }
        // Project and states are checked in parallel.
        std::thread::scope(|scope| {
            let states = scope.spawn(|| {
                let mut known = HashMap::with_capacity(self.states.len());
                self.states.iter().all(|key| store.complete(key, &mut known).is_some())
            });
            self.dependency_record.holds(project) && states.join().unwrap_or(false)
        })
    }

    /// Returns the number of nodes.
    pub fn nodes(&self) -> usize {
        self.states.len()
    }
}

//! A plan that had nothing to build, and stands until something that it came
//! from changes. With it a build that does nothing costs a look at each file
//! and each state, and neither parses, renders nor hashes.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use super::steps::Plan;
use crate::digest::{Digest, Key};
use crate::files::{DependencyRecord, Project};
use crate::graph::{Graph, Target};
use crate::store::Store;

/// A file that is wanted besides the states.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wanted {
    /// The image that it is of.
    pub image: String,
    /// Where to write it, below the directory for outputs.
    pub path: String,
    /// The state that it is.
    pub key: Key,
}

impl Wanted {
    /// What a target of the graph wants.
    pub fn new(graph: &Graph, target: &Target) -> Self {
        Self {
            image: target.image.clone(),
            path: target.output.path.clone(),
            key: graph.node(target.node).key,
        }
    }
}

/// What a build found whose nodes were all there in the end.
#[derive(Debug, Serialize, Deserialize)]
pub struct PlanCache {
    /// Everything besides files that the plan came from: the program and
    /// what it was asked.
    request: Digest,
    dependency_record: DependencyRecord,
    states: Vec<Key>,
    /// The files to write, if they are not there.
    pub wanted: Vec<Wanted>,
}

impl PlanCache {
    /// What to remember of a plan whose nodes are all there now. `None` if it
    /// can't be told whether the project changes after this.
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

    /// Whether the same request would find the same today.
    pub fn holds(&self, request: &Digest, project: &Project, store: &Store) -> bool {
        if self.request != *request {
            return false;
        }
        // Two halves of the work that know nothing of each other.
        std::thread::scope(|scope| {
            let states = scope.spawn(|| {
                let mut known = HashMap::with_capacity(self.states.len());
                self.states.iter().all(|key| store.whole(key, &mut known).is_some())
            });
            self.dependency_record.holds(project) && states.join().unwrap_or(false)
        })
    }

    /// How many nodes are there.
    pub fn nodes(&self) -> usize {
        self.states.len()
    }
}

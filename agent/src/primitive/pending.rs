//! What waits while one functionality makes room for another.

use std::collections::{BTreeSet, HashMap};

/// What is known of a switch-over while the steps of one change are made true.
#[derive(Debug, Default)]
pub(crate) struct Switch {
    /// Whether packages of what comes could be installed ahead. Once they
    /// could not, none are.
    pub(super) ahead: Option<bool>,
    /// What packages that came ahead are to start, by the page of their layer.
    pub(super) waiting: HashMap<String, Held>,
    /// The same, once their layer is at the place where it wants them.
    pub(super) due: Vec<Held>,
    /// Units that have to read their files again when all is there.
    pub(super) again: BTreeSet<String>,
}

/// What packages did not start, because they came ahead.
#[derive(Debug)]
pub(super) struct Held {
    /// Packages that were not there.
    pub(super) packages: Vec<String>,
    /// What was asked of the machine's policy, a line each.
    pub(super) asked: String,
}

impl Switch {
    /// Packages of what goes are to be purged when what comes is there.
    pub(super) fn is_on(&self) -> bool {
        self.ahead == Some(true)
    }

    /// A layer's packages have come; what they start waits.
    pub(super) fn hold(&mut self, page: &str, held: Held) {
        self.waiting.insert(page.to_owned(), held);
    }

    /// A layer is where it wants its packages; says whether they came ahead.
    pub(super) fn wants(&mut self, page: &str) -> bool {
        let held = self.waiting.remove(page);
        let came = held.is_some();
        self.due.extend(held);
        came
    }

    /// A unit was started anew.
    pub(super) fn is_new(&mut self, unit: &str) {
        self.again.remove(unit);
    }
}

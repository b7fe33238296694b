//! Pending work while an update replaces layers: services to start and units to restart.

use std::collections::{BTreeSet, HashMap};

use crate::init::Verb;

/// The state of an update that replaces layers, while its steps are applied.
#[derive(Debug, Default)]
pub(crate) struct Switch {
    /// Whether packages of the new layers could be preinstalled. After the first failure,
    /// no more packages are preinstalled.
    pub(super) ahead: Option<bool>,
    /// Actions that preinstalled packages have postponed, by the page of their layer.
    pub(super) waiting: HashMap<String, Held>,
    /// Postponed actions of layers whose `package` step was reached.
    pub(super) due: Vec<Held>,
    /// Units to restart at the end, so that they read their files again.
    pub(super) again: BTreeSet<String>,
}

/// Actions that preinstalled packages have postponed.
#[derive(Debug)]
pub(super) struct Held {
    /// Newly installed packages.
    pub(super) packages: Vec<String>,
    /// Services and what they asked to do with them: see [`crate::packages::Packages`].
    pub(super) asked: Vec<(String, Verb)>,
}

impl Switch {
    /// Whether packages of the old layers are purged after the new layers are applied.
    pub(super) fn is_on(&self) -> bool {
        self.ahead == Some(true)
    }

    /// Postpones the actions of a layer's preinstalled packages.
    pub(super) fn hold(&mut self, page: &str, held: Held) {
        self.waiting.insert(page.to_owned(), held);
    }

    /// Makes the actions of a layer due, because its `package` step was reached. Returns
    /// whether its packages were preinstalled.
    pub(super) fn wants(&mut self, page: &str) -> bool {
        let held = self.waiting.remove(page);
        let came = held.is_some();
        self.due.extend(held);
        came
    }

    /// Takes a unit off the list of restarts, because it was just started.
    pub(super) fn is_new(&mut self, unit: &str) {
        self.again.remove(unit);
    }
}

//! The parts that are in effect in an image, and the capabilities that they provide.

use std::rc::Rc;
use std::sync::Arc;

use super::context::Vars;
use crate::model::Part;
use crate::resolve::{At, Configuration};
use crate::source::Span;

/// The provider of a capability in an image, and its values.
#[derive(Clone)]
pub(super) struct Provider {
    pub(super) configuration: String,
    /// The id of the part.
    pub(super) id: String,
    pub(super) span: Span,
    pub(super) values: Vars,
    /// Whether its layer has a mistake. The values are then unknown.
    pub(super) broken: bool,
}

/// A configuration to apply.
#[derive(Clone)]
pub(super) struct Use<'d> {
    /// The `layer` or `replace` with its inputs.
    pub(super) at: At<'d>,
    pub(super) configuration: &'d Configuration<'d>,
    /// Values of the replaced provider, for inputs that the recipe does not set.
    pub(super) were: Vars,
}

/// An applied configuration.
pub(super) struct Applied<'d> {
    pub(super) wanted: Use<'d>,
    pub(super) part: Arc<Part>,
    pub(super) provides: Vec<(&'d str, Provider)>,
    /// How often the configuration has been applied so far, including this time.
    pub(super) times: u32,
}

/// All parts that are in effect in a machine: a list that shares its tail with other
/// lists, so that each layer has its own list at no cost.
#[derive(Clone, Default)]
pub(super) struct Effect<'d>(Option<Rc<Link<'d>>>);

struct Link<'d> {
    applied: Rc<Applied<'d>>,
    below: Effect<'d>,
}

impl<'d> Effect<'d> {
    /// Lists the applied configurations, the first one first.
    pub(super) fn list(&self) -> Vec<Rc<Applied<'d>>> {
        let mut list: Vec<_> = self.links().map(|link| link.applied.clone()).collect();
        list.reverse();
        list
    }

    /// Adds an applied configuration on top.
    pub(super) fn push(&mut self, applied: Rc<Applied<'d>>) {
        let below = std::mem::take(self);
        self.0 = Some(Rc::new(Link { applied, below }));
    }

    fn links(&self) -> impl Iterator<Item = &Link<'d>> {
        std::iter::successors(self.0.as_deref(), |link| link.below.0.as_deref())
    }
}

impl Drop for Link<'_> {
    fn drop(&mut self) {
        // Drop the links in a loop: recursion over thousands of them would overflow
        // the stack.
        let mut next = self.below.0.take();
        while let Some(link) = next.and_then(Rc::into_inner) {
            let mut link = link;
            next = link.below.0.take();
        }
    }
}

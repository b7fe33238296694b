//! What is in effect in an image: the configurations that are applied to it.

use std::rc::Rc;
use std::sync::Arc;

use super::context::Vars;
use crate::model::Part;
use crate::resolve::{At, Configuration};
use crate::source::Span;

/// Who provides a capability in an image, and with which values.
#[derive(Clone)]
pub(super) struct Provider {
    pub(super) configuration: String,
    /// The part's name in the machine.
    pub(super) id: String,
    pub(super) span: Span,
    pub(super) values: Vars,
    /// Its layer has a mistake: nothing is known of its inputs.
    pub(super) broken: bool,
}

/// A configuration that is to be applied.
#[derive(Clone)]
pub(super) struct Use<'d> {
    /// Where its inputs are given.
    pub(super) at: At<'d>,
    pub(super) configuration: &'d Configuration<'d>,
    /// Inputs that stay as they were unless they are given.
    pub(super) were: Vars,
}

/// A configuration that was applied.
pub(super) struct Applied<'d> {
    pub(super) wanted: Use<'d>,
    pub(super) part: Arc<Part>,
    pub(super) provides: Vec<(&'d str, Provider)>,
    /// How often the configuration had been applied by then.
    pub(super) times: u32,
}

/// All that is applied to a machine: a list that shares what is below with
/// others, so that each layer has its own at no cost.
#[derive(Clone, Default)]
pub(super) struct Effect<'d>(Option<Rc<Link<'d>>>);

struct Link<'d> {
    applied: Rc<Applied<'d>>,
    below: Effect<'d>,
}

impl<'d> Effect<'d> {
    /// What is applied, in its order.
    pub(super) fn list(&self) -> Vec<Rc<Applied<'d>>> {
        let mut list: Vec<_> = self.links().map(|link| link.applied.clone()).collect();
        list.reverse();
        list
    }

    /// Adds what is applied on top.
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
        // One after the other: a list of thousands must not be dropped by
        // recursion.
        let mut next = self.below.0.take();
        while let Some(link) = next.and_then(Rc::into_inner) {
            let mut link = link;
            next = link.below.0.take();
        }
    }
}

//! An image while it is made, and all that stands below it.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::context::Vars;
use super::effect::{Effect, Provider};
use crate::model::{Image, Layer, Machine, Part};
use crate::resolve::Declarations;

/// What an image hands on to those made from it.
#[derive(Clone, Default)]
pub(super) struct Inherited<'d> {
    pub(super) machine: Machine,
    pub(super) providers: BTreeMap<&'d str, Provider>,
    /// What is applied to the machine.
    pub(super) effect: Effect<'d>,
    /// How often a configuration was applied to it.
    pub(super) times: HashMap<&'d str, u32>,
}

/// What is known of an image once it is made.
pub(super) struct Made<'d> {
    pub(super) inherited: Inherited<'d>,
    /// What is applied below its first layer.
    pub(super) below: Effect<'d>,
    /// What is applied after each of its layers.
    pub(super) after: Vec<Effect<'d>>,
}

/// An image that is being made.
pub(super) struct Growing<'d> {
    pub(super) image: Image,
    pub(super) made: Made<'d>,
}

impl Growing<'_> {
    pub(super) fn push(&mut self, layer: Layer) {
        self.image.layers.push(layer);
        self.made.after.push(self.made.inherited.effect.clone());
    }

    /// Adds a layer that is one part.
    pub(super) fn push_plain(&mut self, part: Arc<Part>) {
        self.push(Layer {
            name: part.configuration.clone(),
            span: part.span,
            reverts: Vec::new(),
            booted: part.booted,
            parts: vec![part],
        });
    }
}

/// All that stands below an image.
pub(super) struct Below<'m, 'd> {
    pub(super) images: &'m [Image],
    pub(super) made: &'m [Made<'d>],
    pub(super) declarations: &'d Declarations<'d>,
    pub(super) params: &'m Vars,
}

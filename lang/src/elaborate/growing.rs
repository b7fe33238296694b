//! An image while vimg elaborates it, and the images before it.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::context::Vars;
use super::effect::{Effect, Provider};
use crate::model::{Image, Layer, Machine, Part};
use crate::resolve::Declarations;

/// What an image passes on to images that start from it.
#[derive(Clone, Default)]
pub(super) struct Inherited<'d> {
    pub(super) machine: Machine,
    pub(super) providers: BTreeMap<&'d str, Provider>,
    /// The parts in effect.
    pub(super) effect: Effect<'d>,
    /// How often each configuration was applied.
    pub(super) times: HashMap<&'d str, u32>,
}

/// The results of the elaboration of an image, besides its model.
pub(super) struct Made<'d> {
    pub(super) inherited: Inherited<'d>,
    /// The parts in effect below its first layer.
    pub(super) below: Effect<'d>,
    /// The parts in effect after each of its layers.
    pub(super) after: Vec<Effect<'d>>,
}

/// An image during its elaboration.
pub(super) struct Growing<'d> {
    pub(super) image: Image,
    pub(super) made: Made<'d>,
}

impl Growing<'_> {
    pub(super) fn push(&mut self, layer: Layer) {
        self.image.layers.push(layer);
        self.made.after.push(self.made.inherited.effect.clone());
    }

    /// Adds a layer that applies one part and reverts nothing.
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

/// The images before an image, the declarations and the parameters.
pub(super) struct Below<'m, 'd> {
    pub(super) images: &'m [Image],
    pub(super) made: &'m [Made<'d>],
    pub(super) declarations: &'d Declarations<'d>,
    pub(super) params: &'m Vars,
}

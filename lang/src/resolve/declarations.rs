//! The declarations of all files, by kind and name.

use std::collections::HashMap;

use crate::load::Loaded;
use crate::source::Span;
use crate::syntax::{Arg, Node, Range};
use crate::value::InputType;

/// A node and the file that contains it.
#[derive(Clone, Copy)]
pub(crate) struct At<'a> {
    pub(crate) node: &'a Node,
    pub(crate) loaded: &'a Loaded,
}

impl<'a> At<'a> {
    pub(crate) fn span(&self, range: &Range) -> Span {
        Span { source: self.loaded.source, start: range.start, end: range.end }
    }

    /// The span of the node without its children.
    pub(crate) fn head(&self) -> Span {
        self.span(&self.node.head_range)
    }

    /// The span of the first argument, or of the node's name if it has no argument.
    pub(crate) fn arg_span(&self) -> Span {
        self.node.args.first().map_or_else(|| self.span(&self.node.name_range), |a| self.span(&a.range))
    }

    pub(crate) fn name(&self) -> &'a str {
        self.node.text().unwrap_or("")
    }

    pub(crate) fn children(self) -> impl Iterator<Item = At<'a>> {
        self.node.children().map(move |node| At { node, loaded: self.loaded })
    }

    pub(crate) fn children_named(self, name: &'static str) -> impl Iterator<Item = At<'a>> {
        self.children().filter(move |c| c.node.name == name)
    }

    pub(crate) fn child(self, name: &'static str) -> Option<At<'a>> {
        self.children_named(name).next()
    }
}

/// An `input` or `param`.
#[derive(Clone, Copy)]
pub(crate) struct Input<'a> {
    pub(crate) at: At<'a>,
    pub(crate) ty: InputType,
}

impl<'a> Input<'a> {
    pub(super) fn new(at: At<'a>) -> Self {
        let ty = at.node.prop("type").and_then(|arg| match &arg.value {
            crate::syntax::Scalar::String(name) => InputType::from_name(name),
            _ => None,
        });
        Self { at, ty: ty.unwrap_or(InputType::String) }
    }

    /// The default value: a property, or the arguments of a child.
    pub(crate) fn default(&self) -> Option<&'a [Arg]> {
        match self.at.node.prop("default") {
            Some(arg) => Some(std::slice::from_ref(arg)),
            None => self.at.child("default").map(|c| c.node.args.as_slice()),
        }
    }
}

/// A `capability`.
pub(crate) struct Capability<'a> {
    pub(crate) at: At<'a>,
    pub(crate) inputs: Vec<Input<'a>>,
}

/// A `configuration`.
pub(crate) struct Configuration<'a> {
    pub(crate) at: At<'a>,
    pub(crate) inputs: Vec<Input<'a>>,
    /// Names of capabilities, with the places of these names in the recipe.
    pub(crate) provides: Vec<(&'a str, Span)>,
    pub(crate) requires: Vec<(&'a str, Span)>,
}

/// An `image`.
pub(crate) struct Image<'a> {
    pub(crate) at: At<'a>,
    pub(crate) from: Option<usize>,
}

/// A `server`.
pub(crate) struct Server<'a> {
    pub(crate) at: At<'a>,
    pub(crate) image: usize,
}

/// All declarations.
#[derive(Default)]
pub(crate) struct Declarations<'a> {
    pub(crate) params: Vec<Input<'a>>,
    pub(crate) capabilities: HashMap<&'a str, Capability<'a>>,
    pub(crate) configurations: HashMap<&'a str, Configuration<'a>>,
    pub(crate) images: Vec<Image<'a>>,
    /// Indexes into `images`, parents first.
    pub(crate) order: Vec<usize>,
    pub(crate) servers: Vec<Server<'a>>,
    pub(crate) secrets: Vec<At<'a>>,
}

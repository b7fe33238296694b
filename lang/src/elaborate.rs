//! Turns declarations into the [`Model`]: fills in inputs, renders templates and
//! converts nodes to typed values. [`crate::resolve`] has checked all names.

mod context;
mod check;
mod effect;
mod growing;
mod script;
mod authorized_key;
mod form;
mod kernel_parameter;
mod primitive;
mod steps;
mod image;
mod inputs;
mod part;
mod replace;
mod secret;
mod server;
mod single;

use std::collections::{BTreeMap, HashMap, HashSet};

use crate::diagnostic::{Code, Diagnostic};
use crate::model::Model;
use crate::resolve::Declarations;
use crate::source::{Sources, Span};
use crate::template::Renderer;

use context::Elaborator;
pub use context::{Partial, Request, rebuilt_name};
pub(crate) use primitive::{PACKAGE, PRIMITIVES};
pub(crate) use script::{NEEDS, NETWORK, ON, OPERATION};

/// Converts declarations to the model. Adds mistakes to `out`.
pub(crate) fn elaborate(
    request: &Request,
    partial: &Partial,
    declarations: &Declarations,
    sources: &mut Sources,
    out: &mut Vec<Diagnostic>,
) -> Model {
    let mut elaborator = Elaborator {
        files: request.files,
        distributions: request.distributions,
        sources,
        out: Vec::new(),
        warnings: Vec::new(),
        renderer: Renderer::new(),
        templates: HashMap::new(),
        used: HashSet::new(),
        secrets: BTreeMap::new(),
        open: Vec::new(),
    };
    let mut model = Model::default();
    let (params, open) = elaborator.params(declarations, request, partial.open);
    if elaborator.out.is_empty() {
        let needed = image::needed(declarations, &partial.only);
        model = elaborator.images(declarations, params, request.rebuilt, &needed);
        model.warnings = std::mem::take(&mut elaborator.warnings);
        model.open = open;
    }
    let open = std::mem::take(&mut elaborator.open);
    elaborator.out.retain(|diagnostic| !is_open(diagnostic, &open));
    out.append(&mut elaborator.out);
    model
}

/// Whether a diagnostic is about a value at one of these places, which may be right
/// once its parameter has a value.
fn is_open(diagnostic: &Diagnostic, places: &[Span]) -> bool {
    let Some((at, _)) = diagnostic.primary else { return false };
    places.iter().any(|place| {
        let inside = place.start <= at.start && at.end <= place.end;
        let around = at.start <= place.start && place.end <= at.end;
        place.source == at.source && (inside || around && diagnostic.code == Code::InvalidValue)
    })
}

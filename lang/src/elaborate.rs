//! Turns declarations into the [`Model`]: fills in inputs, renders templates and
//! converts nodes to typed values. [`crate::resolve`] has checked all names.

mod context;
mod check;
mod effect;
mod growing;
mod script;
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

use crate::diagnostic::Diagnostic;
use crate::model::Model;
use crate::resolve::Declarations;
use crate::source::Sources;
use crate::template::Renderer;

use context::Elaborator;
pub use context::{Request, rebuilt_name};
pub(crate) use primitive::{PACKAGE, PRIMITIVES};
pub(crate) use script::{NEEDS, NETWORK, ON, OPERATION};

/// Converts declarations to the model. Adds mistakes to `out`.
pub(crate) fn elaborate(
    request: &Request,
    declarations: &Declarations,
    sources: &mut Sources,
    out: &mut Vec<Diagnostic>,
) -> Model {
    let mut elaborator = Elaborator {
        files: request.files,
        distributions: request.distributions,
        sources,
        out: Vec::new(),
        renderer: Renderer::new(),
        templates: HashMap::new(),
        used: HashSet::new(),
        secrets: BTreeMap::new(),
    };
    let mut model = Model::default();
    let params = elaborator.params(declarations, request);
    if elaborator.out.is_empty() {
        model = elaborator.images(declarations, params, request.rebuilt);
    }
    out.append(&mut elaborator.out);
    model
}

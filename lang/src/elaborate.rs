//! Turns declarations into the [`Model`]: fills in inputs, renders templates and
//! converts nodes to typed values. [`crate::resolve`] has checked all names.

mod context;
mod check;
mod effect;
mod growing;
mod primitive;
mod image;
mod inputs;
mod part;
mod replace;
mod secret;
mod server;
mod single;

use std::collections::{BTreeMap, HashMap, HashSet};

use crate::diagnostic::{Diagnostic, MOST};
use crate::load;
use crate::model::Model;
use crate::resolve::{self, Declarations};
use crate::source::Sources;
use crate::template::Renderer;

use context::Elaborator;
pub use context::{Request, rebuilt_name};

/// Compiles a recipe. Adds each file that it reads to `sources`, so that diagnostics
/// can show their places.
///
/// # Errors
///
/// All mistakes of the first phase that finds any.
pub fn compile(request: &Request, sources: &mut Sources) -> Result<Model, Vec<Diagnostic>> {
    let mut out = Vec::new();
    let loaded = load::load(request.files, &request.entry, request.distributions, sources, &mut out);
    let declarations =
        if out.is_empty() { resolve::resolve(&loaded, &mut out) } else { Declarations::default() };
    let mut elaborator = Elaborator {
        files: request.files,
        distributions: request.distributions,
        sources,
        out,
        renderer: Renderer::new(),
        templates: HashMap::new(),
        used: HashSet::new(),
        secrets: BTreeMap::new(),
    };
    let mut model = Model::default();
    if elaborator.out.is_empty() {
        let params = elaborator.params(&declarations, request);
        if elaborator.out.is_empty() {
            model = elaborator.images(&declarations, params, request.rebuilt);
        }
    }
    let mut out = elaborator.out;
    if out.is_empty() {
        return Ok(model);
    }
    // A configuration that two layers apply reports its mistakes twice.
    let mut seen = HashSet::new();
    out.retain(|d| seen.insert((d.code, d.primary.as_ref().map(|(span, _)| *span), d.message.clone())));
    out.truncate(MOST);
    Err(out)
}

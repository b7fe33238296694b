//! Compiles a recipe, phase after phase.

use std::collections::HashSet;

use crate::diagnostic::{Diagnostic, MOST};
use crate::elaborate::{self, Partial, Request};
use crate::kind::Grammar;
use crate::library;
use crate::load;
use crate::model::Model;
use crate::resolve::{self, Declarations};
use crate::schema;
use crate::source::Sources;

/// Compiles a recipe. Adds each file that it reads to `sources`, so that diagnostics
/// can show their places.
///
/// # Errors
///
/// All mistakes of the first phase that finds any.
pub fn compile(request: &Request, sources: &mut Sources) -> Result<Model, Vec<Diagnostic>> {
    compile_part(request, &Partial::default(), sources)
}

/// Compiles a recipe of which only a part must be complete; see [`compile`].
///
/// # Errors
///
/// All mistakes of the first phase that finds any, except those that `partial`
/// leaves to others.
pub fn compile_part(
    request: &Request,
    partial: &Partial,
    sources: &mut Sources,
) -> Result<Model, Vec<Diagnostic>> {
    let mut out = Vec::new();
    let grammar = Grammar { nodes: schema::RECIPE, distributions: request.distributions };
    let loaded = load::load(request.files, &request.entry, grammar, sources, &mut out);
    let declarations =
        if out.is_empty() { resolve::resolve(&loaded, &mut out) } else { Declarations::default() };
    let mut model = Model::default();
    if out.is_empty() {
        model = elaborate::elaborate(request, partial, &declarations, sources, &mut out);
    }
    if out.is_empty() {
        tidy(&mut model.warnings);
        return Ok(model);
    }
    library::hint(request.files, sources, &mut out);
    tidy(&mut out);
    Err(out)
}

/// Removes repetitions: a configuration that two layers apply reports its mistakes twice.
fn tidy(diagnostics: &mut Vec<Diagnostic>) {
    let mut seen = HashSet::new();
    diagnostics
        .retain(|d| seen.insert((d.code, d.primary.as_ref().map(|(span, _)| *span), d.message.clone())));
    diagnostics.truncate(MOST);
}

//! Names that a recipe lacks, and the standard library has: says which file to
//! `use`.

use crate::diagnostic::{Code, Diagnostic, nearest};
use crate::prescan::MAX_RECIPE;
use crate::source::{FileRef, Files, Root, Sources};
use crate::syntax;

/// A declaration of the library: its kind, its name and its file.
type Declared = (String, String, FileRef);

/// Adds to diagnostics of unknown names what the library has.
pub(crate) fn hint(files: &dyn Files, sources: &Sources, out: &mut [Diagnostic]) {
    let mut library: Option<Vec<Declared>> = None;
    for diagnostic in out {
        let kind = match diagnostic.code {
            Code::UnknownImage => "image",
            Code::UnknownConfiguration => "configuration",
            Code::UnknownCapability => "capability",
            _ => continue,
        };
        let Some((span, _)) = diagnostic.primary else { continue };
        let text = sources.get(span.source).text.get(span.start as usize..span.end as usize);
        let name = text.unwrap_or_default().trim_matches(['"', '#']);
        let library = library.get_or_insert_with(|| declared(files));
        let of_kind = || library.iter().filter(|(declared, _, _)| declared == kind);
        let names: Vec<&str> = of_kind().map(|(_, name, _)| name.as_str()).collect();
        let exact = names.contains(&name);
        let is_near = diagnostic.help.as_ref().is_some_and(|help| help.starts_with("did you mean"));
        let Some(found) = nearest(name, &names).filter(|_| exact || !is_near) else { continue };
        let Some((_, _, file)) = of_kind().find(|(_, name, _)| name == found) else { continue };
        diagnostic.help = Some(match exact {
            true => format!("the library has it: add `use \"{file}\"`"),
            false => format!("did you mean `{found}` of the library? Add `use \"{file}\"`"),
        });
    }
}

/// Lists what the recipes of the library declare.
fn declared(files: &dyn Files) -> Vec<Declared> {
    let file = |path: String| FileRef { root: Root::Std, path };
    let recipes = files.siblings(&file(String::new())).into_iter().filter(|name| name.ends_with(".vimg"));
    let mut all = Vec::new();
    for recipe in recipes.map(file) {
        let Ok(bytes) = files.read(&recipe, MAX_RECIPE) else { continue };
        let text = String::from_utf8_lossy(&bytes);
        let source = Sources::default().add_new(recipe.to_string(), text.as_ref());
        let Ok(document) = syntax::parse(source, &text) else { continue };
        for node in &document.nodes {
            all.extend(node.text().map(|name| (node.name.clone(), name.to_owned(), recipe.clone())));
        }
    }
    all
}

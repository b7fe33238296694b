//! The names that a recipe declares, for the completion of command lines.

use std::collections::HashMap;

use crate::kind::Grammar;
use crate::load;
use crate::schema::{self, KnownDistribution};
use crate::source::{FileRef, Files, Root, Sources};
use crate::syntax::{Node, Scalar};

/// The names that a recipe declares, in its order.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Names {
    /// Images.
    pub images: Vec<ImageNames>,
    /// Servers.
    pub servers: Vec<String>,
    /// Parameters.
    pub params: Vec<String>,
    /// Secrets.
    pub secrets: Vec<String>,
}

/// An image.
#[derive(Debug, PartialEq, Eq)]
pub struct ImageNames {
    /// Its name.
    pub name: String,
    /// Its own layers, without those that `by="rebuild"` repeats; the second one of
    /// a name has `#2`, and so on.
    pub layers: Vec<String>,
    /// Whether the library declares it.
    pub library: bool,
}

/// Lists the names of a recipe, as far as its files can be read: a recipe with
/// mistakes, or without values for its parameters, has names as well.
pub fn names(files: &dyn Files, entry: &FileRef, distributions: &[KnownDistribution]) -> Names {
    let (mut sources, mut mistakes) = (Sources::default(), Vec::new());
    let grammar = Grammar { nodes: schema::RECIPE, distributions };
    let mut names = Names::default();
    for loaded in load::load(files, entry, grammar, &mut sources, &mut mistakes) {
        for node in &loaded.document.nodes {
            let Some(name) = node.text().map(str::to_owned) else { continue };
            match node.name.as_str() {
                "image" => names.images.push(ImageNames {
                    name,
                    layers: layers(node),
                    library: loaded.file.root == Root::Std,
                }),
                "server" => names.servers.push(name),
                "param" => names.params.push(name),
                "secret" => names.secrets.push(name),
                _ => {}
            }
        }
    }
    names
}

/// Lists the layers of an image.
fn layers(image: &Node) -> Vec<String> {
    let mut times: HashMap<String, usize> = HashMap::new();
    let names = image.children().filter_map(|node| match node.name.as_str() {
        "layer" => node.text().map(str::to_owned),
        // The layer has the name of the new provider.
        "replace" => match &node.prop("with")?.value {
            Scalar::String(name) => Some(name.clone()),
            _ => None,
        },
        "remove" => Some(format!("remove-{}", node.text()?)),
        _ => None,
    });
    let numbered = names.map(|name| {
        let count = times.entry(name.clone()).or_default();
        *count += 1;
        if *count == 1 { name } else { format!("{name}#{count}") }
    });
    numbered.collect()
}

//! A file of settings: a node with a word for each.

use std::collections::BTreeMap;

use crate::diagnostic::{Code, Diagnostic};
use crate::source::{Sources, Span};
use crate::syntax::{self, Scalar};

/// A setting and the words that it may have.
pub type Setting = (&'static str, &'static [&'static str]);

/// Reads a file of settings. The text is added to `sources` under `name`.
///
/// # Errors
///
/// All mistakes, as of a recipe.
pub fn settings(
    name: &str,
    text: &str,
    known: &[Setting],
    sources: &mut Sources,
) -> Result<BTreeMap<String, String>, Vec<Diagnostic>> {
    let source = sources.add_new(name.to_owned(), text);
    let document = syntax::parse(source, text)?;
    let (mut found, mut out) = (BTreeMap::new(), Vec::new());
    for node in &document.nodes {
        let span = |r: &syntax::Range| Span { source, start: r.start, end: r.end };
        let Some((_, words)) = known.iter().find(|(name, _)| *name == node.name) else {
            out.push(
                Diagnostic::error(
                    Code::UnknownNode,
                    span(&node.name_range),
                    format!("there is no setting `{}`", node.name),
                )
                .suggest(&node.name, known.iter().map(|(name, _)| *name)),
            );
            continue;
        };
        let word = match node.args.as_slice() {
            [arg] => match &arg.value {
                Scalar::String(text) if words.contains(&text.as_str()) => Some(text.clone()),
                _ => None,
            },
            _ => None,
        };
        match word {
            Some(word) => {
                found.insert(node.name.clone(), word);
            }
            None => out.push(
                Diagnostic::error(
                    Code::InvalidValue,
                    span(&node.head_range),
                    format!("`{}` takes one word", node.name),
                )
                .help(format!("one of: {}", words.join(", "))),
            ),
        }
    }
    if out.is_empty() { Ok(found) } else { Err(out) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KNOWN: &[Setting] = &[("provider", &["auto", "qemu"])];

    #[test]
    fn words_are_read_and_mistakes_reported_together() {
        let mut sources = Sources::default();
        let found = settings("c", "provider \"qemu\"\n", KNOWN, &mut sources).unwrap();
        assert_eq!(found["provider"], "qemu");
        let errors = settings("c", "provide \"qemu\"\nprovider 3\n", KNOWN, &mut sources).unwrap_err();
        assert_eq!(errors.len(), 2);
        assert!(errors[0].help.as_deref().unwrap().contains("provider"));
    }
}

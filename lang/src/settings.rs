//! Reads settings files: one node with one or more strings for each setting.

use std::collections::BTreeMap;

use crate::diagnostic::{Code, Diagnostic};
use crate::source::{Sources, Span};
use crate::syntax::{self, Scalar};

/// The name of a setting and the arguments that it takes.
pub type Setting = (&'static str, Takes);

/// The arguments that a setting takes.
#[derive(Debug, Clone, Copy)]
pub enum Takes {
    /// One of these words. The last node of this name counts.
    Word(&'static [&'static str]),
    /// This many strings. Each node of this name counts.
    Texts(usize),
}

/// The arguments of each setting: one list of strings for each node, in order.
pub type Settings = BTreeMap<String, Vec<Vec<String>>>;

/// Reads a settings file, and adds its text to `sources` as `name`.
///
/// # Errors
///
/// All mistakes in the file.
pub fn settings(
    name: &str,
    text: &str,
    known: &[Setting],
    sources: &mut Sources,
) -> Result<Settings, Vec<Diagnostic>> {
    let source = sources.add_new(name.to_owned(), text);
    let document = syntax::parse(source, text)?;
    let (mut found, mut out) = (Settings::new(), Vec::new());
    for node in &document.nodes {
        let span = |r: &syntax::Range| Span { source, start: r.start, end: r.end };
        let Some((_, takes)) = known.iter().find(|(name, _)| *name == node.name) else {
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
        let texts = node.args.iter().map(|arg| match &arg.value {
            Scalar::String(text) => Some(text.clone()),
            _ => None,
        });
        let texts = texts.collect::<Option<Vec<String>>>().filter(|texts| match takes {
            Takes::Word(words) => texts.len() == 1 && words.contains(&texts[0].as_str()),
            Takes::Texts(count) => texts.len() == *count,
        });
        match texts {
            Some(texts) if matches!(takes, Takes::Word(_)) => {
                found.insert(node.name.clone(), vec![texts]);
            }
            Some(texts) => found.entry(node.name.clone()).or_default().push(texts),
            None => {
                let (what, help) = match takes {
                    Takes::Word(words) => {
                        ("one word".to_owned(), Some(format!("expected one of: {}", words.join(", "))))
                    }
                    Takes::Texts(1) => ("one string".to_owned(), None),
                    Takes::Texts(count) => (format!("{count} strings"), None),
                };
                let head = span(&node.head_range);
                let error =
                    Diagnostic::error(Code::InvalidValue, head, format!("`{}` takes {what}", node.name));
                out.push(match help {
                    Some(help) => error.help(help),
                    None => error,
                });
            }
        }
    }
    if out.is_empty() { Ok(found) } else { Err(out) }
}

/// Writes a text as a quoted KDL string on one line. Escapes newlines and the
/// characters that KDL forbids (KDL 2.0, "Disallowed Literal Code Points").
pub fn quoted(text: &str) -> String {
    let forbidden = |c: char| {
        c.is_control()
            || matches!(c, '\u{200e}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
    };
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            c if forbidden(c) => out.push_str(&format!("\\u{{{:x}}}", u32::from(c))),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const KNOWN: &[Setting] = &[("provider", Takes::Word(&["auto", "qemu"])), ("trust", Takes::Texts(2))];

    #[test]
    fn what_is_quoted_is_read_as_it_was() {
        let odd = ["\u{200e}", "\u{2028}", "\u{202e}x", "\u{2066}", "\u{feff}", "\u{7f}", "\u{85}", "\u{0}"];
        for text in ["plain", "a \"b\" \\ c", "line\nand\ttab\u{1b}[0m"].into_iter().chain(odd) {
            let mut sources = Sources::default();
            let line = format!("trust {} {}\n", quoted(text), quoted("k"));
            let found = settings("c", &line, KNOWN, &mut sources).unwrap();
            assert_eq!(found["trust"], [[text, "k"]]);
        }
    }

    #[test]
    fn settings_are_read_and_mistakes_reported_together() {
        let mut sources = Sources::default();
        let text = "provider \"qemu\"\ntrust \"a\" \"b\"\ntrust \"c\" \"d\"\n";
        let found = settings("c", text, KNOWN, &mut sources).unwrap();
        assert_eq!(found["provider"], [["qemu"]]);
        assert_eq!(found["trust"], [["a", "b"], ["c", "d"]]);
        let text = "provide \"qemu\"\nprovider 3\ntrust \"a\"\n";
        let errors = settings("c", text, KNOWN, &mut sources).unwrap_err();
        assert_eq!(errors.len(), 3);
        assert!(errors[0].help.as_deref().unwrap().contains("provider"));
        assert!(errors[2].message.contains("2 strings"));
    }
}

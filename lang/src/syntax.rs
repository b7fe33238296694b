//! Parses text to a plain tree of nodes with spans. Types of the kdl crate do not leave
//! this module.

use serde::{Deserialize, Serialize};

use crate::diagnostic::{Code, Diagnostic};
use crate::prescan;
use crate::source::{SourceId, Span};

/// A value as the recipe has it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) enum Scalar {
    String(String),
    Int(i128),
    Float(f64),
    Bool(bool),
    Null,
}

impl Scalar {
    /// Names the type for people.
    pub(crate) fn type_name(&self) -> &'static str {
        match self {
            Scalar::String(_) => "a string",
            Scalar::Int(_) => "an integer",
            Scalar::Float(_) => "a floating-point number",
            Scalar::Bool(_) => "a boolean",
            Scalar::Null => "#null",
        }
    }

    /// The value as text, without quotes and `#`.
    pub(crate) fn shown(&self) -> String {
        match self {
            Scalar::String(text) => text.clone(),
            Scalar::Int(n) => n.to_string(),
            Scalar::Float(n) => n.to_string(),
            Scalar::Bool(b) => b.to_string(),
            Scalar::Null => "null".into(),
        }
    }
}

/// A range of bytes in the current file.
pub(crate) type Range = std::ops::Range<u32>;

/// An argument, or the value of a property.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Arg {
    pub(crate) value: Scalar,
    pub(crate) range: Range,
    /// Whether it is marked `(raw)`: a string that is not a template.
    pub(crate) raw: bool,
    /// Where the text of a string starts, if it has no escapes. Only then do places
    /// in the value correspond to places in the file.
    pub(crate) text_at: Option<u32>,
}

/// A property.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Prop {
    pub(crate) name: String,
    pub(crate) name_range: Range,
    pub(crate) arg: Arg,
}

/// A node.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Node {
    pub(crate) name: String,
    pub(crate) name_range: Range,
    /// The range of the node without its children.
    pub(crate) head_range: Range,
    pub(crate) args: Vec<Arg>,
    pub(crate) props: Vec<Prop>,
    pub(crate) children: Option<Vec<Node>>,
}

impl Node {
    pub(crate) fn prop(&self, name: &str) -> Option<&Arg> {
        self.props.iter().find(|p| p.name == name).map(|p| &p.arg)
    }

    /// The value of the first argument, if it is a string.
    pub(crate) fn text(&self) -> Option<&str> {
        match self.args.first()?.value {
            Scalar::String(ref text) => Some(text),
            _ => None,
        }
    }

    pub(crate) fn children(&self) -> impl Iterator<Item = &Node> {
        self.children.iter().flatten()
    }
}

/// A parsed file. A program can store it by the digest of its text, to avoid parsing
/// the text again.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Document {
    pub(crate) nodes: Vec<Node>,
}

/// Parses one file.
///
/// # Errors
///
/// All errors of the parser.
pub(crate) fn parse(source: SourceId, text: &str) -> Result<Document, Vec<Diagnostic>> {
    prescan::check(source, text).map_err(|d| vec![d])?;
    match kdl::KdlDocument::parse_v2(text) {
        Ok(document) => {
            let mut out = Vec::new();
            escapes(source, &document, &mut out);
            if out.is_empty() {
                Ok(Document { nodes: document.nodes().iter().map(node).collect() })
            } else {
                Err(out)
            }
        }
        Err(error) => Err(error
            .diagnostics
            .into_iter()
            .map(|d| {
                // The parser's span of an error at the end may exceed the text.
                let end = (d.span.offset() + d.span.len()).min(text.len());
                let start = d.span.offset().min(end.saturating_sub(1));
                let span = Span { source, start: start as u32, end: end as u32 };
                let message = d.message.unwrap_or_else(|| "this is not valid KDL".into());
                let mut diagnostic = Diagnostic::error(Code::Syntax, span, lower_first(&message));
                if let Some(label) = d.label {
                    diagnostic = diagnostic.label(label);
                }
                diagnostic.help = d.help.or_else(|| {
                    Some("recipes are KDL 2: one node per line, `#true` and `#false`, quoted strings".into())
                });
                diagnostic
            })
            .collect()),
    }
}

/// Reports `\\s` and `\\b` in quoted strings. In a regular expression of a script they
/// would silently mean something else: KDL replaces them with a space and a backspace.
fn escapes(source: SourceId, document: &kdl::KdlDocument, out: &mut Vec<Diagnostic>) {
    for node in document.nodes() {
        for entry in node.entries().iter().filter(|entry| entry.value().is_string()) {
            let repr = entry.format().map_or("", |format| format.value_repr.as_str());
            if repr.starts_with('#') {
                continue;
            }
            let start = entry.span().offset() + entry.span().len() - repr.len();
            let mut chars = repr.char_indices();
            while let Some((at, c)) = chars.next() {
                let (kind, what) = match (c, if c == '\\' { chars.next() } else { None }) {
                    ('\\', Some((_, 's'))) => ("s", "a space"),
                    ('\\', Some((_, 'b'))) => ("b", "a backspace"),
                    _ => continue,
                };
                let span = Span { source, start: (start + at) as u32, end: (start + at + 2) as u32 };
                let message = format!("`\\{kind}` in a quoted string means {what} in KDL");
                out.push(
                    Diagnostic::error(Code::Syntax, span, message)
                        .help(format!("write `\\\\{kind}`, or use a raw string without escapes: #\"...\"#")),
                );
            }
        }
        if let Some(children) = node.children() {
            escapes(source, children, out);
        }
    }
}

fn lower_first(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or_else(String::new, |c| c.to_lowercase().chain(chars).collect())
}

fn range(offset: usize, len: usize) -> Range {
    offset as u32..(offset + len) as u32
}

fn node(node: &kdl::KdlNode) -> Node {
    let name = node.name();
    let name_range = range(name.span().offset(), name.span().len());
    let mut head_range = name_range.clone();
    let mut args = Vec::new();
    let mut props = Vec::new();
    for entry in node.entries() {
        let arg = arg(entry);
        head_range.end = head_range.end.max(arg.range.end);
        match entry.name() {
            None => args.push(arg),
            Some(name) => props.push(Prop {
                name: name.value().to_owned(),
                name_range: range(name.span().offset(), name.span().len()),
                arg,
            }),
        }
    }
    Node {
        name: name.value().to_owned(),
        name_range,
        head_range,
        args,
        props,
        children: node.children().map(|c| c.nodes().iter().map(self::node).collect()),
    }
}

fn arg(entry: &kdl::KdlEntry) -> Arg {
    let repr = entry.format().map_or("", |f| f.value_repr.as_str());
    let end = entry.span().offset() + entry.span().len();
    let start = end.saturating_sub(repr.len());
    let value = match entry.value() {
        kdl::KdlValue::String(text) => Scalar::String(text.clone()),
        kdl::KdlValue::Integer(n) => Scalar::Int(*n),
        kdl::KdlValue::Float(n) => Scalar::Float(*n),
        kdl::KdlValue::Bool(b) => Scalar::Bool(*b),
        kdl::KdlValue::Null => Scalar::Null,
    };
    let text_at = match &value {
        Scalar::String(text) if repr.trim_matches(['"', '#']) == text => {
            Some((start + repr.find(text.as_str()).unwrap_or(0)) as u32)
        }
        _ => None,
    };
    Arg {
        value,
        range: range(start, end - start),
        raw: entry.ty().is_some_and(|t| t.value() == "raw"),
        text_at,
    }
}

//! Checks a parsed file against the table in the table of the language. Afterwards, all nodes
//! are known and in valid places, and all literals have the right types.

use std::collections::HashMap;

use crate::diagnostic::{Code, Diagnostic};
use crate::kind::{Args, Children, Field, Grammar, Kind, KnownDistribution, Ty, alternatives};
use crate::source::{SourceId, Span};
use crate::syntax::{Arg, Node, Range, Scalar};
use crate::value;

/// Reports everything in `nodes` that `kinds` does not allow.
pub(crate) fn check(source: SourceId, nodes: &[Node], grammar: Grammar<'_>, out: &mut Vec<Diagnostic>) {
    Checker { source, known: grammar.distributions, out }.nodes(nodes, grammar.nodes, None);
}

struct Checker<'a> {
    source: SourceId,
    known: &'a [KnownDistribution],
    out: &'a mut Vec<Diagnostic>,
}

impl Checker<'_> {
    fn span(&self, range: &Range) -> Span {
        Span { source: self.source, start: range.start, end: range.end }
    }

    fn nodes(&mut self, nodes: &[Node], kinds: &[Kind], within: Option<&str>) {
        let mut seen: HashMap<&str, &Node> = HashMap::new();
        for node in nodes {
            if self.out.len() >= crate::diagnostic::MOST {
                return;
            }
            let Some(kind) = kinds.iter().find(|k| k.name == node.name) else {
                let place = within.map_or("here".to_owned(), |w| format!("in `{w}`"));
                self.out.push(
                    Diagnostic::error(
                        Code::UnknownNode,
                        self.span(&node.name_range),
                        format!("there is no node `{}` {place}", node.name),
                    )
                    .suggest(&node.name, kinds.iter().map(|k| k.name)),
                );
                continue;
            };
            if !kind.many
                && let Some(first) = seen.insert(kind.name, node)
            {
                self.out.push(
                    Diagnostic::error(
                        Code::Duplicate,
                        self.span(&node.head_range),
                        format!("`{}` is allowed only once", kind.name),
                    )
                    .related(self.span(&first.head_range), "first one here")
                    .help("remove one of them"),
                );
            }
            self.node(node, kind);
        }
    }

    fn node(&mut self, node: &Node, kind: &Kind) {
        self.args(node, kind);
        self.props(node, kind);
        match (kind.children, &node.children) {
            (Children::Of(kinds), Some(children)) => self.nodes(children, kinds, Some(kind.name)),
            (Children::None, Some(children)) if !children.is_empty() => {
                let span = self.span(&children[0].head_range);
                self.out.push(
                    Diagnostic::error(
                        Code::UnexpectedChildren,
                        span,
                        format!("`{}` takes no children", kind.name),
                    )
                    .help("remove the braces and everything between them"),
                );
            }
            _ => {}
        }
    }

    fn args(&mut self, node: &Node, kind: &Kind) {
        let (field, most) = match kind.args {
            Args::None => (None, 0),
            Args::One(field) => (Some(field), 1),
            Args::Many(field) => (Some(field), usize::MAX),
        };
        if let Some(extra) = node.args.get(most) {
            let help = if most == 0 { "it takes no arguments" } else { "it takes only one argument" };
            self.out.push(
                Diagnostic::error(
                    Code::UnexpectedArgument,
                    self.span(&extra.range),
                    format!("unexpected argument of `{}`", kind.name),
                )
                .help(help),
            );
        }
        let Some(field) = field else { return };
        if field.required && node.args.is_empty() {
            let help = format!("write `{} {}`: {}", kind.name, self.example(&field), field.doc);
            self.out.push(
                Diagnostic::error(
                    Code::Missing,
                    self.span(&node.name_range),
                    format!("`{}` needs {}", kind.name, self.expected(field.ty)),
                )
                .help(help),
            );
        }
        for arg in node.args.iter().take(most) {
            self.value(arg, &field, kind.name, ' ');
        }
    }

    fn props(&mut self, node: &Node, kind: &Kind) {
        let mut seen: HashMap<&str, &Range> = HashMap::new();
        for prop in &node.props {
            if let Some(first) = seen.insert(&prop.name, &prop.name_range) {
                self.out.push(
                    Diagnostic::error(
                        Code::Duplicate,
                        self.span(&prop.name_range),
                        format!("`{}` is given twice", prop.name),
                    )
                    .related(self.span(first), "first one here")
                    .help("remove one of them"),
                );
            }
            if let Some(field) = kind.props.iter().find(|f| f.name == prop.name) {
                self.value(&prop.arg, field, &prop.name, '=');
            } else if !kind.open_props {
                self.out.push(
                    Diagnostic::error(
                        Code::UnknownProperty,
                        self.span(&prop.name_range),
                        format!("`{}` has no property `{}`", kind.name, prop.name),
                    )
                    .suggest(&prop.name, kind.props.iter().map(|f| f.name)),
                );
            }
        }
        for field in kind.props.iter().filter(|f| f.required) {
            if node.prop(field.name).is_none() {
                self.out.push(
                    Diagnostic::error(
                        Code::Missing,
                        self.span(&node.head_range),
                        format!("`{}` needs `{}=`", kind.name, field.name),
                    )
                    .help(format!(
                        "add `{}={}`: {}",
                        field.name,
                        self.example(field),
                        field.doc
                    )),
                );
            }
        }
    }

    /// Checks the value of `what`; `joint` stands between the two in a recipe.
    fn value(&mut self, arg: &Arg, field: &Field, what: &str, joint: char) {
        match literal(arg, field, self.known) {
            Ok(()) => {}
            Err(Wrong::Type) => self.out.push(
                Diagnostic::error(
                    Code::WrongType,
                    self.span(&arg.range),
                    format!("`{what}` takes {}, not {}", self.expected(field.ty), arg.value.type_name()),
                )
                .help(format!("write `{what}{joint}{}`", self.corrected(arg, field))),
            ),
            Err(Wrong::Value(help)) => {
                let mut diagnostic = Diagnostic::error(
                    Code::InvalidValue,
                    self.span(&arg.range),
                    format!("invalid value for `{what}`: expected {}", self.expected(field.ty)),
                );
                if let (Some(words), Scalar::String(text)) = (field.ty.words(self.known), &arg.value) {
                    diagnostic = diagnostic.suggest(text, words);
                }
                if diagnostic.help.is_none() {
                    diagnostic = diagnostic.help(help);
                }
                self.out.push(diagnostic);
            }
        }
    }

    fn expected(&self, ty: Ty) -> String {
        ty.words(self.known).map_or_else(|| ty.describe(), |words| alternatives(&words))
    }

    /// Returns a value of the right type: the given one in another spelling, if
    /// that is possible, or else an example.
    fn corrected(&self, arg: &Arg, field: &Field) -> String {
        let is_word = field.ty.words(self.known).is_some();
        let spelled = match (field.ty, &arg.value) {
            (Ty::Int, Scalar::String(text)) => text.trim().parse::<i64>().ok().map(|n| n.to_string()),
            (Ty::Bool, value) => value::boolean(&value.shown()).map(|is_true| format!("#{is_true}")),
            (Ty::Mode, Scalar::Int(n)) => {
                let text = format!("{n:04}");
                value::mode(&text).ok().map(|_| format!("\"{text}\""))
            }
            (Ty::Name | Ty::Str | Ty::HostPath, Scalar::Int(_) | Scalar::Float(_) | Scalar::Bool(_)) => {
                Some(format!("\"{}\"", arg.value.shown()))
            }
            _ => None,
        };
        spelled.filter(|_| !is_word).unwrap_or_else(|| self.example(field))
    }

    /// Returns a value for a message.
    fn example(&self, field: &Field) -> String {
        if let Some(words) = field.ty.words(self.known) {
            return format!("\"{}\"", words.first().copied().unwrap_or("..."));
        }
        match field.ty {
            Ty::Int | Ty::Scalar => "1".into(),
            Ty::Bool => "#true".into(),
            Ty::Size => "\"512MiB\"".into(),
            Ty::Duration => "\"90s\"".into(),
            Ty::Mode => "\"0644\"".into(),
            Ty::GuestPath => "\"/...\"".into(),
            Ty::Name | Ty::Str | Ty::HostPath | Ty::Word(_) | Ty::Distribution | Ty::Suite => {
                "\"...\"".into()
            }
        }
    }
}

enum Wrong {
    Type,
    Value(String),
}

/// Checks a value that is not a template.
fn literal(arg: &Arg, field: &Field, known: &[KnownDistribution]) -> Result<(), Wrong> {
    let ty = field.ty;
    let text = match &arg.value {
        Scalar::String(text) => text,
        Scalar::Int(n) => {
            return match ty {
                Ty::Int if i64::try_from(*n).is_ok() => Ok(()),
                Ty::Int => Err(Wrong::Value("the number is out of range".into())),
                Ty::Size if u64::try_from(*n).is_ok() => Ok(()),
                Ty::Size => Err(Wrong::Value("a size can't be negative".into())),
                Ty::Scalar => Ok(()),
                _ => Err(Wrong::Type),
            };
        }
        Scalar::Bool(_) if matches!(ty, Ty::Bool | Ty::Scalar) => return Ok(()),
        _ => return Err(Wrong::Type),
    };
    if ty == Ty::Name {
        return if value::is_name(text) {
            Ok(())
        } else {
            Err(Wrong::Value(
                "use 1 to 64 letters, digits, `-`, `_` and `.`; begin with a letter, digit or `_`".into(),
            ))
        };
    }
    // Words can't be templates. The state of a service is an exception: `elaborate`
    // checks it after rendering.
    let words = ty.words(known);
    let fixed = words.is_some() && field.name != "state";
    if !arg.raw && !fixed && value::is_template(text) {
        return Ok(());
    }
    if let Some(words) = words
        && !words.contains(&text.as_str())
    {
        return Err(Wrong::Value(format!("expected {}", alternatives(&words))));
    }
    match ty {
        Ty::Int | Ty::Bool => Err(Wrong::Type),
        Ty::Size => value::size(text).map(|_| ()).map_err(Wrong::Value),
        Ty::Duration => value::duration(text).map(|_| ()).map_err(Wrong::Value),
        Ty::Mode => value::mode(text).map(|_| ()).map_err(Wrong::Value),
        Ty::GuestPath => value::guest_path(text).map(|_| ()).map_err(Wrong::Value),
        _ => Ok(()),
    }
}

//! Renders templates on the host, and notes which names they read.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Object;
use minijinja::{AutoEscape, Environment, ErrorKind, UndefinedBehavior};

use crate::diagnostic::{Code, Diagnostic};
use crate::source::Span;
use crate::value::Value;

/// Steps that one template may take; a page of HTML needs some hundreds.
const FUEL: u64 = 5_000_000;

/// The names that a template can read.
#[derive(Debug, Clone, Default)]
pub(crate) struct Scope {
    pub(crate) vars: Arc<BTreeMap<String, Value>>,
    reads: Arc<Mutex<BTreeSet<String>>>,
}

impl Scope {
    /// Templates write `_` where a name has `-` or `.`, which would be
    /// operators there.
    pub(crate) fn new(vars: BTreeMap<String, Value>) -> Self {
        let vars = vars.into_iter().map(|(name, value)| (name.replace(['-', '.'], "_"), value)).collect();
        Self { vars: Arc::new(vars), reads: Arc::default() }
    }

    /// The values that have been read so far.
    pub(crate) fn reads(&self) -> BTreeMap<String, Value> {
        let reads = self.reads.lock().unwrap_or_else(PoisonError::into_inner);
        reads.iter().filter_map(|name| Some((name.clone(), self.vars.get(name)?.clone()))).collect()
    }
}

/// Where a template stands.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place {
    /// The whole of it.
    pub(crate) span: Span,
    /// Where its text starts, if places in the text are places in the source.
    pub(crate) text_at: Option<u32>,
}

impl Place {
    fn of(&self, range: Option<std::ops::Range<usize>>) -> Span {
        match (self.text_at, range) {
            (Some(at), Some(range)) if !range.is_empty() => Span {
                source: self.span.source,
                start: (at + range.start as u32).min(self.span.end),
                end: (at + range.end as u32).min(self.span.end),
            },
            _ => self.span,
        }
    }
}

/// The engine, set up once for strings in recipes and once for files.
pub(crate) struct Renderer {
    strings: Environment<'static>,
    files: Environment<'static>,
}

impl Renderer {
    pub(crate) fn new() -> Self {
        // `${#list[@]}` is everyday shell; a string in a recipe has KDL's own
        // comments around it and needs no others.
        Self { strings: environment(("{\0", "\0}")), files: environment(("{#", "#}")) }
    }

    /// Renders a string of a recipe.
    pub(crate) fn string(&self, text: &str, place: Place, scope: &Scope) -> Result<String, Diagnostic> {
        render(&self.strings, text, place, scope)
    }

    /// Renders a template file, whose text `place` covers from its start.
    pub(crate) fn file(&self, text: &str, place: Place, scope: &Scope) -> Result<String, Diagnostic> {
        render(&self.files, text, place, scope)
    }
}

fn environment(comments: (&'static str, &'static str)) -> Environment<'static> {
    let mut env = Environment::new();
    let mut syntax = SyntaxConfig::builder();
    syntax.comment_delimiters(comments.0, comments.1).keep_trailing_newline(true);
    env.set_syntax(syntax.build().expect("the delimiters differ from each other"));
    env.set_undefined_behavior(UndefinedBehavior::Strict);
    env.set_auto_escape_callback(|_| AutoEscape::None);
    env.set_fuel(Some(FUEL));
    env.set_recursion_limit(64);
    env.set_debug(true);
    env
}

/// Gives a template its names and notes what it asked for.
#[derive(Debug)]
struct Tracker {
    scope: Scope,
    missed: Arc<Mutex<Option<String>>>,
}

impl Object for Tracker {
    fn get_value_by_str(self: &Arc<Self>, key: &str) -> Option<minijinja::Value> {
        let Some(value) = self.scope.vars.get(key) else {
            *self.missed.lock().unwrap_or_else(PoisonError::into_inner) = Some(key.to_owned());
            return None;
        };
        self.scope.reads.lock().unwrap_or_else(PoisonError::into_inner).insert(key.to_owned());
        Some(match value {
            Value::String(s) => s.clone().into(),
            Value::Int(n) => (*n).into(),
            Value::Bool(b) => (*b).into(),
            Value::Size(n) | Value::Duration(n) => (*n).into(),
            Value::Path(file) => path_text(file).into(),
            Value::List(items) => items.clone().into(),
        })
    }

    fn get_value(self: &Arc<Self>, key: &minijinja::Value) -> Option<minijinja::Value> {
        self.get_value_by_str(key.as_str()?)
    }
}

/// A path as a template yields it and as a recipe takes it again.
pub(crate) fn path_text(file: &crate::source::FileRef) -> String {
    match file.root {
        crate::source::Root::Project => format!("//{}", file.path),
        crate::source::Root::Std => format!("std/{}", file.path),
    }
}

fn render(env: &Environment<'static>, text: &str, place: Place, scope: &Scope) -> Result<String, Diagnostic> {
    let missed = Arc::new(Mutex::new(None));
    let tracker = Tracker { scope: scope.clone(), missed: missed.clone() };
    let context = minijinja::Value::from_object(tracker);
    env.render_str(text, context).map_err(|error| {
        let span = place.of(error.range());
        let detail = error.detail().unwrap_or("").to_owned();
        match error.kind() {
            ErrorKind::SyntaxError => Diagnostic::error(
                Code::TemplateSyntax,
                span,
                "this template can't be parsed".to_owned(),
            )
            .label(detail)
            .help("`{{ name }}` inserts a value; mark a string `(raw)\"...\"` to keep braces as they are"),
            ErrorKind::UndefinedError => {
                let missed = missed.lock().unwrap_or_else(PoisonError::into_inner).take();
                let name = missed.unwrap_or_default();
                Diagnostic::error(Code::UndefinedName, span, format!("`{name}` is not defined here"))
                    .suggest(&name, scope.vars.keys().map(String::as_str))
                    .help_if_none("declare it with `param`, or as an `input` of the configuration")
            }
            ErrorKind::OutOfFuel => {
                Diagnostic::error(Code::TemplateFailed, span, "this template does not come to an end")
                    .help(format!("it was stopped after {FUEL} steps"))
            }
            kind => {
                let detail = if detail.is_empty() { kind.to_string() } else { detail };
                Diagnostic::error(Code::TemplateFailed, span, format!("this template fails: {detail}"))
                    .help("filters and functions are those of minijinja")
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::Sources;

    fn scope() -> Scope {
        Scope::new(BTreeMap::from([
            ("port".to_owned(), Value::Int(80)),
            ("name".to_owned(), Value::String("x<y".into())),
            ("unread".to_owned(), Value::Bool(true)),
        ]))
    }

    fn render(text: &str) -> Result<String, Code> {
        let source = Sources::default().add("t", text);
        let place = Place { span: Span { source, start: 0, end: text.len() as u32 }, text_at: Some(0) };
        Renderer::new().string(text, place, &scope()).map_err(|d| d.code)
    }

    #[test]
    fn strings_keep_shell_and_are_not_escaped() {
        assert_eq!(render("${#list[@]} {{ name }}:{{ port + 1 }}\n"), Ok("${#list[@]} x<y:81\n".into()));
    }

    #[test]
    fn only_what_is_read_is_noted() {
        let scope = scope();
        let source = Sources::default().add("t", "");
        let place = Place { span: Span { source, start: 0, end: 0 }, text_at: None };
        Renderer::new().string("{{ port }}", place, &scope).unwrap();
        assert_eq!(scope.reads().keys().collect::<Vec<_>>(), ["port"]);
    }

    #[test]
    fn failures_have_codes() {
        assert_eq!(render("{{ prot }}"), Err(Code::UndefinedName));
        assert_eq!(render("{{ port "), Err(Code::TemplateSyntax));
        assert_eq!(render("{{ name | nofilter }}"), Err(Code::TemplateFailed));
        let forever = "{% for a in range(9999) %}{% for b in range(9999) %}{{ b }}{% endfor %}{% endfor %}";
        assert_eq!(render(forever), Err(Code::TemplateFailed));
    }
}

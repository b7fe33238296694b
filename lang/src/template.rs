//! Renders templates on the host, and records which names they read.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Object;
use minijinja::{AutoEscape, Environment, ErrorKind, UndefinedBehavior};

use crate::diagnostic::{Code, Diagnostic};
use crate::source::Span;
use crate::value::Value;

/// The most instructions of the template engine that one template may take; an HTML
/// page needs a few hundred.
const FUEL: u64 = 5_000_000;

/// Longest `{{ ... }}` or `{% ... %}` in bytes: the engine's parser recurses once for
/// each operator, and could overflow the stack.
const MAX_TAG: usize = 4096;
/// Largest output of one template in bytes.
const MAX_OUTPUT: usize = 16 << 20;

/// The names that a template can read.
#[derive(Debug, Clone, Default)]
pub(crate) struct Scope {
    pub(crate) vars: Arc<BTreeMap<String, Value>>,
    reads: Arc<Mutex<BTreeSet<String>>>,
}

impl Scope {
    /// Creates a scope. The names of `vars` come from
    /// [`value::template_name`](crate::value::template_name).
    pub(crate) fn new(vars: BTreeMap<String, Value>) -> Self {
        Self { vars: Arc::new(vars), reads: Arc::default() }
    }

    /// Returns the values that templates have read so far.
    pub(crate) fn reads(&self) -> BTreeMap<String, Value> {
        let reads = self.reads.lock().unwrap_or_else(PoisonError::into_inner);
        reads.iter().filter_map(|name| Some((name.clone(), self.vars.get(name)?.clone()))).collect()
    }
}

/// The result of a template.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Rendered {
    pub(crate) text: String,
    /// Whether it has read a value that is open, so that the text is none to check.
    pub(crate) open: bool,
}

/// The place of a template.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place {
    /// The span of the whole template.
    pub(crate) span: Span,
    /// Where its text starts, if offsets in the text correspond to offsets in the source.
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

/// The template engine, configured once for strings in recipes and once for files.
pub(crate) struct Renderer {
    strings: Environment<'static>,
    files: Environment<'static>,
}

impl Renderer {
    pub(crate) fn new() -> Self {
        // In strings of recipes, `{#` starts no comment: `${#list[@]}` is common in
        // shell scripts, and KDL has its own comments.
        Self { strings: environment(("{\0", "\0}")), files: environment(("{#", "#}")) }
    }

    /// Renders a string of a recipe.
    pub(crate) fn string(&self, text: &str, place: Place, scope: &Scope) -> Result<Rendered, Diagnostic> {
        if let Some(rendered) = plain(text, scope) {
            return Ok(rendered);
        }
        render(&self.strings, false, text, place, scope)
    }

    /// Renders a template file. `place` covers its whole text.
    pub(crate) fn file(&self, text: &str, place: Place, scope: &Scope) -> Result<Rendered, Diagnostic> {
        render(&self.files, true, text, place, scope)
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

/// Passes values to a template, and records which names it reads.
#[derive(Debug)]
struct Tracker {
    scope: Scope,
    missed: Arc<Mutex<Option<String>>>,
    /// The last open value that was read.
    open: Arc<Mutex<Option<String>>>,
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
            Value::Open(text) => {
                *self.open.lock().unwrap_or_else(PoisonError::into_inner) = Some(text.clone());
                text.clone().into()
            }
        })
    }

    fn get_value(self: &Arc<Self>, key: &minijinja::Value) -> Option<minijinja::Value> {
        self.get_value_by_str(key.as_str()?)
    }
}

/// Writes a path so that recipes can read it again.
pub(crate) fn path_text(file: &crate::source::FileRef) -> String {
    match file.root {
        crate::source::Root::Project => format!("//{}", file.path),
        crate::source::Root::Std => format!("std/{}", file.path),
    }
}

fn render(
    env: &Environment<'static>,
    is_file: bool,
    text: &str,
    place: Place,
    scope: &Scope,
) -> Result<Rendered, Diagnostic> {
    if let Some(range) = long_tag(text) {
        let span = place.of(Some(range));
        let message = "this expression of a template is too long";
        return Err(Diagnostic::error(Code::TemplateSyntax, span, message)
            .help(format!("the limit is {MAX_TAG} bytes; split the expression with `{{% set %}}`")));
    }
    let missed = Arc::new(Mutex::new(None));
    let open = Arc::new(Mutex::new(None));
    let tracker = Tracker { scope: scope.clone(), missed: missed.clone(), open: open.clone() };
    let context = minijinja::Value::from_object(tracker);
    let mut out = Bounded(Vec::new());
    let rendered =
        env.template_from_str(text).and_then(|t| t.render_captured_to(context, &mut out).map(|_| ()));
    let full = out.0.len() >= MAX_OUTPUT;
    let open = open.lock().unwrap_or_else(PoisonError::into_inner).take();
    let rendered = match (rendered, open) {
        (Ok(()), open) => {
            Ok(Rendered { text: String::from_utf8_lossy(&out.0).into_owned(), open: open.is_some() })
        }
        // A text is no number: what fails here may work with the real value.
        (Err(_), Some(text)) => Ok(Rendered { text, open: true }),
        (Err(error), None) => Err(error),
    };
    rendered.map_err(|error| {
        if full {
            let message = "the output of this template is too large";
            return Diagnostic::error(Code::TemplateFailed, place.span, message)
                .help(format!("the limit is {} MiB; copy large files with `from=`", MAX_OUTPUT >> 20));
        }
        let span = place.of(error.range());
        let detail = error.detail().unwrap_or("").to_owned();
        match error.kind() {
            ErrorKind::SyntaxError => unparsed(text, is_file, place, span, detail),
            ErrorKind::UndefinedError => {
                // The error may be about another value than the last missing name.
                let at = error.range().and_then(|r| text.get(r)).unwrap_or("").trim().to_owned();
                let missed = missed.lock().unwrap_or_else(PoisonError::into_inner).take();
                let Some(name) = missed.filter(|m| *m == at || at.is_empty()) else {
                    return Diagnostic::error(Code::UndefinedName, span, format!("`{at}` is not defined"))
                        .help("the value before the dot has no such attribute");
                };
                Diagnostic::error(Code::UndefinedName, span, format!("`{name}` is not defined here"))
                    .suggest(&name, scope.vars.keys().map(String::as_str))
                    .help_if_none("declare it with `param`, or as an `input` of the configuration")
            }
            ErrorKind::OutOfFuel => {
                Diagnostic::error(Code::TemplateFailed, span, "this template takes too long")
                    .help(format!("vimg stopped it after {FUEL} instructions; does a loop not end?"))
            }
            kind => {
                let detail = if detail.is_empty() { kind.to_string() } else { detail };
                Diagnostic::error(Code::TemplateFailed, span, format!("this template failed: {detail}"))
                    .help("templates have the filters and functions of minijinja")
            }
        }
    })
}

/// The diagnostic for a template that the engine can't parse.
fn unparsed(text: &str, is_file: bool, place: Place, span: Span, detail: String) -> Diagnostic {
    if let Some(at) = open_comment(text).filter(|_| is_file) {
        let message = "unterminated comment: `{#` begins a template comment";
        return Diagnostic::error(Code::TemplateSyntax, place.of(Some(at..at + 2)), message)
            .help("for shell syntax, put {% raw %} before the text and {% endraw %} after it");
    }
    Diagnostic::error(Code::TemplateSyntax, span, "this template can't be parsed").label(detail).help(
        match is_file {
            true => "`{{ name }}` inserts a value; {% raw %} ... {% endraw %} disables templates",
            false => "`{{ name }}` inserts a value; mark a string `(raw)\"...\"` to keep braces as they are",
        },
    )
}

/// Renders a text that only inserts values, as most strings of a recipe do: the engine
/// would compile a template for each. Returns `None` for everything else, including
/// mistakes; the engine then renders the text.
fn plain(text: &str, scope: &Scope) -> Option<Rendered> {
    let mut out = String::with_capacity(text.len());
    let mut open = false;
    let mut read = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find('{') {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        let Some(tag) = rest.strip_prefix("{{") else {
            if rest.starts_with("{%") {
                return None;
            }
            out.push('{');
            rest = &rest[1..];
            continue;
        };
        let (inner, after) = tag.split_once("}}")?;
        let name = inner.trim_matches(' ');
        match scope.vars.get(name)? {
            Value::String(s) => out.push_str(s),
            Value::Int(n) => out.push_str(&n.to_string()),
            Value::Size(n) | Value::Duration(n) => out.push_str(&n.to_string()),
            Value::Path(file) => out.push_str(&path_text(file)),
            Value::Open(s) => {
                out.push_str(s);
                open = true;
            }
            Value::Bool(_) | Value::List(_) => return None,
        }
        read.push(name);
        rest = after;
    }
    out.push_str(rest);
    let mut reads = scope.reads.lock().unwrap_or_else(PoisonError::into_inner);
    for name in read {
        if !reads.contains(name) {
            reads.insert(name.to_owned());
        }
    }
    Some(Rendered { text: out, open })
}

/// Finds the start of an unterminated template comment.
fn open_comment(text: &str) -> Option<usize> {
    let at = text.rfind("{#")?;
    (!text[at + 2..].contains("#}")).then_some(at)
}

/// A buffer of at most [`MAX_OUTPUT`] bytes.
struct Bounded(Vec<u8>);

impl std::io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_OUTPUT {
            self.0.resize(MAX_OUTPUT, b' ');
            return Err(std::io::ErrorKind::FileTooLarge.into());
        }
        self.0.extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Finds an expression longer than [`MAX_TAG`].
fn long_tag(text: &str) -> Option<std::ops::Range<usize>> {
    let mut at = 0;
    while let Some(start) = text[at..].find('{').map(|n| at + n) {
        let rest = &text[start..];
        let close = if rest.starts_with("{{") {
            "}}"
        } else if rest.starts_with("{%") {
            "%}"
        } else {
            at = start + 1;
            continue;
        };
        let length = rest.find(close).unwrap_or(rest.len());
        if length > MAX_TAG {
            return Some(start..start + 2);
        }
        at = start + 2;
    }
    None
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

    fn rendered(text: &str) -> Result<String, Code> {
        let source = Sources::default().add("t", text);
        let place = Place { span: Span { source, start: 0, end: text.len() as u32 }, text_at: Some(0) };
        Renderer::new().string(text, place, &scope()).map(|rendered| rendered.text).map_err(|d| d.code)
    }

    #[test]
    fn strings_keep_shell_and_are_not_escaped() {
        assert_eq!(rendered("${#list[@]} {{ name }}:{{ port + 1 }}\n"), Ok("${#list[@]} x<y:81\n".into()));
    }

    /// `plain` and the engine give the same text.
    #[test]
    fn plain_texts_are_rendered_as_the_engine_does() {
        let vars = || {
            BTreeMap::from([
                ("port".to_owned(), Value::Int(-80)),
                ("name".to_owned(), Value::String("{{ port }} <&\n".into())),
                ("size".to_owned(), Value::Size(1 << 40)),
                ("path".to_owned(), Value::Path(crate::FileRef::project("a/b"))),
                ("flag".to_owned(), Value::Bool(true)),
                ("if".to_owned(), Value::Int(1)),
                ("open".to_owned(), Value::open("size")),
            ])
        };
        let source = Sources::default().add("t", "");
        let place = Place { span: Span { source, start: 0, end: 0 }, text_at: None };
        let renderer = Renderer::new();
        for text in [
            "{{ port }}",
            "a {{port}}{{ name }} ${x} {#c#} { {{  size }}\n",
            "{{ path }}/x}}",
            "{{ flag }}",
            "{{ port -}} x",
            "{{ missing }}",
            "{{ port",
            "{% if port %}{{ port }}{% endif %}",
            "{ {{ port }}",
            "{{{ port }}}",
            "{{ open }}/{{ port }}",
        ] {
            let (short, long) = (Scope::new(vars()), Scope::new(vars()));
            let engine = render(&renderer.strings, false, text, place, &long).map_err(|d| d.code);
            assert_eq!(renderer.string(text, place, &short).map_err(|d| d.code), engine, "{text}");
            if plain(text, &short).is_some() {
                assert_eq!(short.reads(), long.reads(), "{text}");
            }
        }
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
    fn what_depends_on_an_open_value_is_open() {
        let vars =
            BTreeMap::from([("free".to_owned(), Value::open("free")), ("port".to_owned(), Value::Int(80))]);
        let source = Sources::default().add("t", "");
        let place = Place { span: Span { source, start: 0, end: 0 }, text_at: None };
        for (text, expected, open) in [
            ("{{ port }}", "80", false),
            ("/srv/{{ free }}", "/srv/‹free›", true),
            ("{{ free + 1 }}", "‹free›", true),
            ("{% if free %}{{ port }}{% endif %}", "80", true),
            ("{{ free[9].x }}", "‹free›", true),
        ] {
            let rendered = Renderer::new().string(text, place, &Scope::new(vars.clone())).unwrap();
            assert_eq!((rendered.text.as_str(), rendered.open), (expected, open), "{text}");
        }
    }

    #[test]
    fn failures_have_codes() {
        assert_eq!(rendered("{{ prot }}"), Err(Code::UndefinedName));
        assert_eq!(rendered("{{ port "), Err(Code::TemplateSyntax));
        assert_eq!(rendered("{{ name | nofilter }}"), Err(Code::TemplateFailed));
        assert_eq!(rendered(&format!("{{{{ 1{} }}}}", "+1".repeat(100_000))), Err(Code::TemplateSyntax));
        assert_eq!(
            rendered("{% for a in range(9000) %}{{ 'x' * 9000 }}{% endfor %}"),
            Err(Code::TemplateFailed)
        );
        assert_eq!(rendered("{{ port.foo }}"), Err(Code::UndefinedName));
        let forever = "{% for a in range(9999) %}{% for b in range(9999) %}{{ b }}{% endfor %}{% endfor %}";
        assert_eq!(rendered(forever), Err(Code::TemplateFailed));
    }
}

//! Single values: rendered text, numbers, sizes, existing paths of the project.

use super::context::Elaborator;
use crate::diagnostic::{Code, Diagnostic};
use crate::load;
use crate::model::Content;
use crate::prescan::MAX_RECIPE;
use crate::resolve::At;
use crate::source::{FileKind, FileRef, ReadError, SourceId, Span};
use crate::syntax::{Arg, Scalar};
use crate::template::{Place, Rendered, Scope};
use crate::value;

impl Elaborator<'_> {
    /// Renders a string argument.
    pub(super) fn render(&mut self, arg: &Arg, source: SourceId, scope: &Scope) -> Option<Rendered> {
        let Scalar::String(text) = &arg.value else { return None };
        if arg.raw || !value::is_template(text) {
            return Some(Rendered { text: text.clone(), open: false });
        }
        let span = Span { source, start: arg.range.start, end: arg.range.end };
        match self.renderer.string(text, Place { span, text_at: arg.text_at }, scope) {
            Ok(rendered) => {
                if rendered.open {
                    self.open.push(span);
                }
                Some(rendered)
            }
            Err(diagnostic) => {
                self.out.push(diagnostic);
                None
            }
        }
    }

    pub(super) fn text(&mut self, arg: &Arg, at: At, scope: &Scope) -> Option<String> {
        self.render(arg, at.loaded.source, scope).map(|rendered| rendered.text)
    }

    /// Renders a string and parses it; reports an invalid value.
    pub(super) fn parsed<T>(
        &mut self,
        arg: &Arg,
        at: At,
        scope: &Scope,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Option<T> {
        let text = self.text(arg, at, scope)?;
        match parse(&text) {
            Ok(value) => Some(value),
            Err(help) => {
                self.out.push(
                    Diagnostic::error(
                        Code::InvalidValue,
                        at.span(&arg.range),
                        format!("invalid value `{text}`"),
                    )
                    .help(help),
                );
                None
            }
        }
    }

    /// Reports that the first argument of a node is none of `words`.
    pub(super) fn unknown(&mut self, at: At, words: &[&str]) {
        let message = format!("invalid value `{}`", at.name());
        self.out.push(
            Diagnostic::error(Code::InvalidValue, at.arg_span(), message)
                .suggest(at.name(), words.iter().copied()),
        );
    }

    pub(super) fn int(&mut self, arg: &Arg, at: At, scope: &Scope) -> Option<i64> {
        match arg.value {
            Scalar::Int(n) => i64::try_from(n).ok(),
            _ => self.parsed(arg, at, scope, |t| t.trim().parse().map_err(|_| "expected an integer".into())),
        }
    }

    pub(super) fn ranged(&mut self, arg: &Arg, at: At, scope: &Scope, low: i64, high: i64) -> Option<i64> {
        let n = self.int(arg, at, scope)?;
        if (low..=high).contains(&n) {
            return Some(n);
        }
        self.out.push(
            Diagnostic::error(Code::InvalidValue, at.span(&arg.range), format!("invalid value `{n}`"))
                .help(format!("expected a number from {low} to {high}")),
        );
        None
    }

    pub(super) fn boolean(&mut self, arg: &Arg, at: At, scope: &Scope) -> Option<bool> {
        match arg.value {
            Scalar::Bool(b) => Some(b),
            _ => self.parsed(arg, at, scope, |t| {
                t.trim().parse().map_err(|_| "expected `true` or `false`".into())
            }),
        }
    }

    pub(super) fn prop_text(&mut self, at: At, name: &str, scope: &Scope) -> Option<String> {
        self.text(at.node.prop(name)?, at, scope)
    }

    pub(super) fn prop_bool(&mut self, at: At, name: &str, scope: &Scope) -> Option<bool> {
        self.boolean(at.node.prop(name)?, at, scope)
    }

    pub(super) fn prop_id(&mut self, at: At, name: &str, scope: &Scope) -> Option<u32> {
        self.ranged(at.node.prop(name)?, at, scope, 0, 4_294_967_294).map(|n| n as u32)
    }

    pub(super) fn size(&mut self, arg: &Arg, at: At, scope: &Scope) -> Option<u64> {
        match arg.value {
            Scalar::Int(n) => u64::try_from(n).ok(),
            _ => self.parsed(arg, at, scope, value::size),
        }
    }

    pub(super) fn duration(&mut self, arg: &Arg, at: At, scope: &Scope) -> Option<u64> {
        self.parsed(arg, at, scope, value::duration)
    }

    pub(super) fn guest_path(&mut self, arg: &Arg, at: At, scope: &Scope) -> Option<String> {
        self.parsed(arg, at, scope, value::guest_path)
    }

    /// Reads the path of a file or directory of the project; reports a missing one.
    pub(super) fn host_path(&mut self, arg: &Arg, at: At, scope: &Scope, kind: FileKind) -> Option<FileRef> {
        let text = self.text(arg, at, scope)?;
        let span = at.span(&arg.range);
        let Some(file) = at.loaded.file.join(&text) else {
            self.out.push(load::outside(&text, span));
            return None;
        };
        let error = match self.files.kind(&file) {
            Ok(found) if found == kind => {
                self.used.insert(file.clone());
                return Some(file);
            }
            Ok(FileKind::File) => {
                let message = format!("`{file}` is a file, not a directory");
                self.out.push(
                    Diagnostic::error(Code::NotAFile, span, message).help("name a directory, or use `file`"),
                );
                return None;
            }
            Ok(FileKind::Directory) => ReadError::NotAFile("a directory"),
            Err(error) => error,
        };
        self.out.push(load::unreadable(self.files, &file, &error, Some(span)));
        None
    }

    /// Renders a template file of the project.
    pub(super) fn rendered(&mut self, arg: &Arg, at: At, scope: &Scope) -> Option<Content> {
        let file = self.host_path(arg, at, scope, FileKind::File)?;
        let text = self.template_file(&file, arg, at, scope)?;
        Some(Content::Rendered(text, file))
    }

    fn template_file(&mut self, file: &FileRef, arg: &Arg, at: At, scope: &Scope) -> Option<String> {
        let file = file.clone();
        let span = at.span(&arg.range);
        let source = match self.templates.get(&file) {
            Some(source) => (*source)?,
            None => {
                let text = match self.files.read(&file, MAX_RECIPE) {
                    Ok(bytes) => String::from_utf8(bytes)
                        .map_err(|e| load::not_utf8(&file, e.utf8_error().valid_up_to(), Some(span))),
                    Err(error) => Err(load::unreadable(self.files, &file, &error, Some(span))),
                };
                let source = match text {
                    Ok(text) => Some(self.sources.add(file.to_string(), text)),
                    Err(diagnostic) => {
                        self.out.push(diagnostic);
                        None
                    }
                };
                self.templates.insert(file, source);
                source?
            }
        };
        let text = self.sources.get(source).text.clone();
        let whole = Span { source, start: 0, end: text.len() as u32 };
        match self.renderer.file(&text, Place { span: whole, text_at: Some(0) }, scope) {
            Ok(rendered) => Some(rendered.text),
            Err(diagnostic) => {
                self.out.push(diagnostic.related(span, "used here"));
                None
            }
        }
    }
}

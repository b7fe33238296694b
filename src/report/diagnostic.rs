//! Diagnostics of the language and failures of builds, as text (drawn by miette)
//! or as JSON.

use std::fmt;

use miette::{GraphicalReportHandler, GraphicalTheme, LabeledSpan, NamedSource, Severity};
use serde_json::{Value, json};
use vimg_lang::{Diagnostic, Sources, Span};

use super::style::Style;

/// A diagnostic with the texts that it points into. miette draws one source per
/// diagnostic, so places in other files are related diagnostics.
#[derive(Debug)]
pub struct Shown {
    code: Option<String>,
    severity: Severity,
    message: String,
    help: Option<String>,
    source: Option<NamedSource<String>>,
    labels: Vec<LabeledSpan>,
    related: Vec<Shown>,
}

impl Shown {
    /// Creates it from a diagnostic of the language.
    pub fn new(sources: &Sources, diagnostic: &Diagnostic) -> Self {
        let severity = match diagnostic.severity {
            vimg_lang::Severity::Error => Severity::Error,
            vimg_lang::Severity::Warning => Severity::Warning,
        };
        let mut shown = Self::plain(&diagnostic.message);
        shown.code = Some(diagnostic.code.as_str().to_owned());
        shown.severity = severity;
        shown.help.clone_from(&diagnostic.help);
        if let Some((span, label)) = &diagnostic.primary {
            shown.place(sources, *span, label);
        }
        for (span, text) in &diagnostic.related {
            shown.also(sources, *span, text);
        }
        shown
    }

    /// Creates a message without a place.
    pub fn plain(message: &str) -> Self {
        Self {
            code: None,
            severity: Severity::Error,
            message: message.to_owned(),
            help: None,
            source: None,
            labels: Vec::new(),
            related: Vec::new(),
        }
    }

    /// Sets the place.
    pub fn place(&mut self, sources: &Sources, span: Span, label: &str) {
        let source = sources.get(span.source);
        let label = (!label.is_empty()).then(|| label.to_owned());
        if let Some((text, start, length)) = excerpt(span, &source.text) {
            // The name has the position in the file, because miette would show
            // that in the excerpt.
            let (line, column) = sources.position(span);
            let name = format!("{}, line {line}, column {column}, excerpt", source.name);
            self.source = Some(NamedSource::new(name, text));
            self.labels.push(LabeledSpan::new(label, start, length));
            return;
        }
        self.source = Some(NamedSource::new(source.name.clone(), source.text.to_string()));
        self.labels.push(labelled(span, &source.text, label));
    }

    /// Sets the help text.
    pub fn help(mut self, help: Option<String>) -> Self {
        self.help = help;
        self
    }

    /// Adds another place.
    pub fn also(&mut self, sources: &Sources, span: Span, text: &str) {
        let source = sources.get(span.source);
        let same = self.source.as_ref().is_some_and(|s| s.name() == source.name);
        if same && excerpt(span, &source.text).is_none() {
            self.labels.push(labelled(span, &source.text, Some(text.to_owned())));
        } else {
            let mut other = Self::plain(text);
            other.severity = Severity::Advice;
            other.place(sources, span, "");
            self.related.push(other);
        }
    }
}

/// Creates a label for a span, clamped to the text and to whole characters.
fn labelled(span: Span, text: &str, label: Option<String>) -> LabeledSpan {
    let floor = |mut at: usize| {
        at = at.min(text.len());
        while !text.is_char_boundary(at) {
            at -= 1;
        }
        at
    };
    let start = floor(span.start as usize);
    let end = floor(span.end as usize).max(start);
    // Marks only the first line of a span, because its end may be far away.
    let line_end = text[start..end].find('\n').map_or(end, |n| start + n);
    LabeledSpan::new(label, start, line_end - start)
}

/// Cuts a piece out of a line that is too long to show; `None` if no line near the
/// span is. Returns the piece, and the start and length of the span in it, in
/// bytes.
fn excerpt(span: Span, text: &str) -> Option<(String, usize, usize)> {
    const LONGEST: usize = 200;
    const BEFORE: usize = 30;
    const AFTER: usize = 40;
    let at = (span.start as usize).min(text.len());
    let near = |line: &str| line.len() > LONGEST;
    let lines = text.split_inclusive('\n').scan(0, |start, line| {
        *start += line.len();
        Some((*start - line.len(), line))
    });
    // The span's line and the lines beside it, which miette shows as context.
    let around = lines.filter(|(start, line)| start + line.len() + LONGEST >= at && *start <= at + LONGEST);
    around.into_iter().find(|(_, line)| near(line))?;
    let line_start = text.get(..at)?.rfind('\n').map_or(0, |n| n + 1);
    let line = text[line_start..].split('\n').next().unwrap_or("");
    let (own, length) = (text[line_start..at].chars().count(), span.len());
    let skipped = own.saturating_sub(BEFORE);
    let shown: String = line.chars().skip(skipped).take(BEFORE + AFTER).collect();
    let lead: String = shown.chars().take(own - skipped).collect();
    let room = shown.len().saturating_sub(lead.len());
    let mut end = lead.len() + length.min(room);
    while !shown.is_char_boundary(end) {
        end -= 1;
    }
    Some((shown, lead.len(), end - lead.len()))
}

impl fmt::Display for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Shown {}

impl miette::Diagnostic for Shown {
    fn code(&self) -> Option<Box<dyn fmt::Display + '_>> {
        self.code.as_ref().map(|c| Box::new(c) as Box<dyn fmt::Display>)
    }

    fn severity(&self) -> Option<Severity> {
        Some(self.severity)
    }

    fn help(&self) -> Option<Box<dyn fmt::Display + '_>> {
        self.help.as_ref().map(|h| Box::new(h) as Box<dyn fmt::Display>)
    }

    fn source_code(&self) -> Option<&dyn miette::SourceCode> {
        self.source.as_ref().map(|s| s as &dyn miette::SourceCode)
    }

    fn labels(&self) -> Option<Box<dyn Iterator<Item = LabeledSpan> + '_>> {
        Some(Box::new(self.labels.iter().cloned()))
    }

    fn related(&self) -> Option<Box<dyn Iterator<Item = &dyn miette::Diagnostic> + '_>> {
        if self.related.is_empty() {
            return None;
        }
        Some(Box::new(self.related.iter().map(|r| r as &dyn miette::Diagnostic)))
    }
}

/// Draws a diagnostic as text, 80 columns wide.
pub fn render(shown: &Shown, style: Style) -> String {
    let theme = if style.colour { GraphicalTheme::unicode() } else { GraphicalTheme::unicode_nocolor() };
    let handler = GraphicalReportHandler::new_themed(theme)
        .with_width(80)
        .with_links(false)
        .with_context_lines(1)
        // A path that is cut in two can't be copied: `rm -r /` is another command.
        .with_break_words(false)
        .with_word_separator(textwrap::WordSeparator::AsciiSpace)
        .with_word_splitter(textwrap::WordSplitter::NoHyphenation);
    let mut out = String::new();
    if handler.render_report(&mut out, shown).is_err() {
        out.clone_from(&shown.message);
    }
    out
}

/// Converts diagnostics to one JSON value.
pub fn diagnostics_json(sources: &Sources, diagnostics: &[Diagnostic]) -> Value {
    let place = |span: Span| {
        let (line, column) = sources.position(span);
        json!({
            "file": sources.get(span.source).name,
            "line": line,
            "column": column,
            "start": span.start,
            "end": span.end,
        })
    };
    let list: Vec<Value> = diagnostics
        .iter()
        .map(|d| {
            json!({
                "code": d.code.as_str(),
                "severity": match d.severity {
                    vimg_lang::Severity::Error => "error",
                    vimg_lang::Severity::Warning => "warning",
                },
                "message": d.message,
                "place": d.primary.as_ref().map(|(span, _)| place(*span)),
                "label": d.primary.as_ref().map(|(_, label)| label.clone()).filter(|l| !l.is_empty()),
                "related": d.related.iter().map(|(span, text)| json!({ "place": place(*span), "text": text })).collect::<Vec<_>>(),
                "help": d.help,
            })
        })
        .collect();
    json!({ "diagnostics": list })
}

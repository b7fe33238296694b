//! Diagnostics: a mistake in a recipe, its place, and what to do about it. This module
//! does not know how a diagnostic is shown.

use crate::source::Span;

/// The severity of a diagnostic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Severity {
    /// vimg can't use the recipe.
    Error,
    /// vimg can use the recipe, but it is probably wrong.
    Warning,
}

macro_rules! codes {
    ($($(#[doc = $doc:literal])+ $variant:ident = $text:literal,)+) => {
        /// The kinds of mistakes. The name of a code is stable.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Code {
            $($(#[doc = $doc])+ $variant,)+
        }

        impl Code {
            /// Every code, in the order of the phases that report them.
            pub const ALL: &'static [Code] = &[$(Code::$variant,)+];

            /// Returns the name of the code in messages and JSON.
            pub fn as_str(self) -> &'static str {
                match self { $(Code::$variant => $text,)+ }
            }

            /// Returns the meaning of the code: a sentence for the reference.
            pub fn meaning(self) -> &'static str {
                match self { $(Code::$variant => concat!($($doc),+),)+ }
            }
        }
    };
}

codes! {
    /// A file that the recipe names does not exist, or vimg cannot use it.
    UnreadableFile = "unreadable-file",
    /// A path names the wrong kind of file: a directory, FIFO, device or socket instead
    /// of a file, or a file instead of a directory.
    NotAFile = "not-a-file",
    /// A path leaves the project: through `..`, as an absolute path, or through a symbolic link.
    OutsideProject = "outside-project",
    /// A recipe or template is larger than the limit of 768 KiB.
    TooLarge = "too-large",
    /// A recipe or template is not valid UTF-8.
    NotUtf8 = "not-utf8",
    /// Braces, comments or `/-` blocks are nested too deeply.
    TooDeep = "too-deep",
    /// The text is not valid KDL 2.
    Syntax = "syntax",
    /// Files `use` each other in a cycle.
    UseCycle = "use-cycle",
    /// The recipe uses more than 1,024 files.
    TooManyFiles = "too-many-files",
    /// The node does not exist, or is not allowed in this place.
    UnknownNode = "unknown-node",
    /// The node has no property with this name.
    UnknownProperty = "unknown-property",
    /// The node has more arguments than it takes.
    UnexpectedArgument = "unexpected-argument",
    /// The node has children but takes none.
    UnexpectedChildren = "unexpected-children",
    /// A required argument, property or child is missing.
    Missing = "missing",
    /// A value has the wrong type.
    WrongType = "wrong-type",
    /// A value has the right type, but is not valid here.
    InvalidValue = "invalid-value",
    /// A property or node occurs twice, but is allowed once.
    Duplicate = "duplicate",
    /// Two settings contradict each other.
    Conflict = "conflict",
    /// Two declarations of the same kind have the same name.
    DuplicateName = "duplicate-name",
    /// No image has this name.
    UnknownImage = "unknown-image",
    /// No configuration has this name.
    UnknownConfiguration = "unknown-configuration",
    /// No capability has this name.
    UnknownCapability = "unknown-capability",
    /// No secret has this name.
    UnknownSecret = "unknown-secret",
    /// Images start from each other in a cycle.
    ImageCycle = "image-cycle",
    /// The command line or the values file sets a parameter that no recipe declares.
    UnknownParam = "unknown-param",
    /// A parameter has no value and no default.
    MissingParam = "missing-param",
    /// A layer sets an input that its configuration does not have.
    UnknownInput = "unknown-input",
    /// A layer does not set an input that has no default.
    MissingInput = "missing-input",
    /// A configuration provides a capability, but lacks one of its inputs.
    CapabilityInput = "capability-input",
    /// A capability that is needed has no provider, or would lose its provider.
    UnmetRequirement = "unmet-requirement",
    /// Two configurations in one image provide the same capability.
    TwoProviders = "two-providers",
    /// A layer cannot be reverted, because one of its scripts has no `undo`.
    NoUndo = "no-undo",
    /// Two required capabilities have an input of the same name.
    AmbiguousInput = "ambiguous-input",
    /// A template has a syntax error.
    TemplateSyntax = "template-syntax",
    /// A template reads an undefined name.
    UndefinedName = "undefined-name",
    /// A template fails while vimg renders it.
    TemplateFailed = "template-failed",
    /// A warning: a program in the machine ignores the file without a word, because of its
    /// name, mode, owner or last line.
    IgnoredFile = "ignored-file",
    /// A warning: an SSH server ignores the public key without a word, because it is not
    /// complete.
    IgnoredKey = "ignored-key",
}

/// The most mistakes that vimg reports at once: more are likely repetitions.
pub const MOST: usize = 200;
/// The most names that `suggest` compares.
const MOST_NAMES: usize = 2000;

/// A mistake in a recipe, its place, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Diagnostic {
    /// The kind of mistake.
    pub code: Code,
    /// The severity.
    pub severity: Severity,
    /// One sentence, without a full stop.
    pub message: String,
    /// The place and a label, which may be empty. `None` for mistakes on the command
    /// line.
    pub primary: Option<(Span, String)>,
    /// Other places that belong to the mistake, with labels.
    pub related: Vec<(Span, String)>,
    /// What to do about it.
    pub help: Option<String>,
}

impl Diagnostic {
    /// Creates an error at a place.
    pub fn error(code: Code, span: Span, message: impl Into<String>) -> Self {
        Self {
            code,
            severity: Severity::Error,
            message: message.into(),
            primary: Some((span, String::new())),
            related: Vec::new(),
            help: None,
        }
    }

    /// Creates a warning at a place.
    pub fn warning(code: Code, span: Span, message: impl Into<String>) -> Self {
        Self { severity: Severity::Warning, ..Self::error(code, span, message) }
    }

    /// Creates an error without a place.
    pub fn global(code: Code, message: impl Into<String>) -> Self {
        Self {
            code,
            severity: Severity::Error,
            message: message.into(),
            primary: None,
            related: Vec::new(),
            help: None,
        }
    }

    /// Sets the label of the place.
    pub fn label(mut self, text: impl Into<String>) -> Self {
        if let Some((_, label)) = &mut self.primary {
            *label = text.into();
        }
        self
    }

    /// Adds another place with a label.
    pub fn related(mut self, span: Span, text: impl Into<String>) -> Self {
        self.related.push((span, text.into()));
        self
    }

    /// Sets the help text: what to do.
    pub fn help(mut self, text: impl Into<String>) -> Self {
        self.help = Some(text.into());
        self
    }

    /// Sets the help text if there is none yet.
    pub(crate) fn help_if_none(self, text: &str) -> Self {
        if self.help.is_some() { self } else { self.help(text) }
    }

    /// Suggests the one of `names` that is nearest to `wanted`, if one is near.
    pub fn suggest_near<'a>(self, wanted: &str, names: impl IntoIterator<Item = &'a str>) -> Self {
        let names: Vec<&str> = names.into_iter().take(MOST_NAMES).collect();
        match nearest(wanted, &names) {
            Some(near) => self.help(format!("did you mean `{near}`?")),
            None => self,
        }
    }

    /// Suggests the one of `names` that is nearest to `wanted`. If none is near, lists
    /// all `names`, up to 20.
    pub fn suggest<'a>(self, wanted: &str, names: impl IntoIterator<Item = &'a str>) -> Self {
        let mut names: Vec<&str> = names.into_iter().take(MOST_NAMES).collect();
        names.sort_unstable();
        names.dedup();
        if let Some(near) = nearest(wanted, &names) {
            return self.help(format!("did you mean `{near}`?"));
        }
        if names.is_empty() || names.len() > 20 || self.help.is_some() {
            return self;
        }
        let list: Vec<String> = names.iter().map(|n| format!("`{n}`")).collect();
        self.help(format!("available: {}", list.join(", ")))
    }
}

/// Finds the name nearest to `wanted`, if one is near.
pub(crate) fn nearest<'a>(wanted: &str, names: &[&'a str]) -> Option<&'a str> {
    names
        .iter()
        .map(|name| (strsim::osa_distance(wanted, name), *name))
        .filter(|(distance, name)| *distance <= wanted.len().max(name.len()).div_ceil(3))
        .min()
        .map(|(_, name)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suggestions_are_near() {
        let names = ["image", "configuration", "param"];
        assert_eq!(nearest("imgae", &names), Some("image"));
        assert_eq!(nearest("server", &names), None);
    }

    #[test]
    fn code_names_are_unique() {
        let mut names: Vec<_> = Code::ALL.iter().map(|c| c.as_str()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), Code::ALL.len());
    }
}

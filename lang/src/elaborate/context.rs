//! Types that all modules of the elaboration share.

use std::collections::{BTreeMap, HashMap, HashSet};

use crate::diagnostic::Diagnostic;
use crate::kind::KnownDistribution;
use crate::source::{FileRef, Files, SourceId, Sources, Span};
use crate::template::Renderer;
use crate::value::Value;

/// What to compile, and with which parameters.
pub struct Request<'a> {
    /// Reads the project.
    pub files: &'a dyn Files,
    /// The main recipe.
    pub entry: FileRef,
    /// Parameters from the command line: names and values.
    pub set: &'a [(String, String)],
    /// A values file: its name and its text.
    pub values: Option<(String, String)>,
    /// The name of an image for which the model also gets a clean rebuild, named
    /// [`rebuilt_name`].
    pub rebuilt: Option<&'a str>,
    /// The distributions that `bootstrap` can name.
    pub distributions: &'a [KnownDistribution],
}

/// The name of the clean rebuild of an image.
pub fn rebuilt_name(image: &str) -> String {
    format!("{image}:rebuilt")
}

/// A part of a recipe to compile.
#[derive(Debug, Clone, Default)]
pub struct Partial {
    /// Names of images and servers. They and the images that they start from must
    /// have all their files; other images may lack some. Empty means all.
    pub only: Vec<String>,
    /// Whether parameters without a value are left open, instead of reported.
    /// Values that depend on them are not checked.
    pub open: bool,
}

/// Values by name.
pub(super) type Vars = BTreeMap<String, Value>;

/// Converts declarations to the model.
pub(super) struct Elaborator<'a> {
    pub(super) files: &'a dyn Files,
    pub(super) distributions: &'a [KnownDistribution],
    pub(super) sources: &'a mut Sources,
    pub(super) out: Vec<Diagnostic>,
    /// Probable mistakes, which do not make the recipe useless.
    pub(super) warnings: Vec<Diagnostic>,
    pub(super) renderer: Renderer,
    pub(super) templates: HashMap<FileRef, Option<SourceId>>,
    /// Files and directories of the project that the recipe names.
    pub(super) used: HashSet<FileRef>,
    /// Versions of secrets, by name.
    pub(super) secrets: BTreeMap<String, String>,
    /// The places of values that depend on a parameter without a value.
    pub(super) open: Vec<Span>,
}

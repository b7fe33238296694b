//! What all parts of the elaboration share.

use std::collections::{BTreeMap, HashMap, HashSet};

use crate::diagnostic::Diagnostic;
use crate::source::{FileRef, Files, SourceId, Sources};
use crate::template::Renderer;
use crate::value::Value;

/// What to compile.
pub struct Request<'a> {
    /// Reads the project.
    pub files: &'a dyn Files,
    /// The main recipe.
    pub entry: FileRef,
    /// Parameters from the command line, as `name` and text.
    pub set: &'a [(String, String)],
    /// A values file: its name and its text.
    pub values: Option<(String, String)>,
    /// An image that is wanted a second time, made without taking anything
    /// back; its name is then [`rebuilt_name`].
    pub rebuilt: Option<&'a str>,
}

/// What an image is called that is made a second time.
pub fn rebuilt_name(image: &str) -> String {
    format!("{image}:rebuilt")
}

/// Values by name.
pub(super) type Vars = BTreeMap<String, Value>;

/// Turns declarations into the model.
pub(super) struct Elaborator<'a> {
    pub(super) files: &'a dyn Files,
    pub(super) sources: &'a mut Sources,
    pub(super) out: Vec<Diagnostic>,
    pub(super) renderer: Renderer,
    pub(super) templates: HashMap<FileRef, Option<SourceId>>,
    /// Files and directories of the project that the recipe names.
    pub(super) used: HashSet<FileRef>,
    /// Versions of secrets, by name.
    pub(super) secrets: BTreeMap<String, String>,
}

//! `vimg check`

use super::global::Global;
use super::output::{Outcome, print_json, warn};
use super::project;
use crate::report::{self, Style};

/// Check the recipe for mistakes; needs neither QEMU nor a network
///
/// Parameters without a value need none here. What depends on them is not
/// checked then.
#[derive(Debug, clap::Args)]
pub(super) struct Args {}

pub(super) fn run(global: &Global, style: Style) -> Outcome {
    let mut loaded = project::load(global, &project::structure(&[]))?;
    project::graph(&mut loaded)?;
    loaded.tell_open(style);
    project::keep_stamps(&loaded.notes, loaded.project);
    let warnings = &loaded.model.warnings;
    if style.json {
        let mut json = report::diagnostics_json(&loaded.sources, warnings);
        json["open"] = loaded.model.open.clone().into();
        return print_json(&json);
    }
    warn(&loaded.sources, warnings, style);
    if style.quiet {
        return Ok(());
    }
    // The library is no work of the user.
    let is_own = |name: &str| !name.starts_with("std/");
    let files = loaded.sources.iter().filter(|source| is_own(&source.name)).count();
    let images = loaded.model.images.iter();
    let images = images.filter(|image| is_own(&loaded.sources.get(image.span.source).name)).count();
    let s = |n: usize| if n == 1 { "" } else { "s" };
    let found = match warnings.len() {
        0 => "no mistakes".to_owned(),
        n => format!("no mistakes and {n} warning{}", s(n)),
    };
    super::output::print(&format!("{found} in {files} file{}, {images} image{}\n", s(files), s(images)))
}

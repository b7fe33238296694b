//! The standard library of recipes, embedded in the program.

use include_dir::{Dir, include_dir};

static STDLIB: Dir = include_dir!("$CARGO_MANIFEST_DIR/stdlib");

/// Returns a file of the library.
pub(super) fn read(path: &str) -> Option<&'static [u8]> {
    STDLIB.get_file(path).map(include_dir::File::contents)
}

/// Returns the names of its recipes.
pub(super) fn names() -> Vec<String> {
    STDLIB.files().map(|f| f.path().display().to_string()).collect()
}

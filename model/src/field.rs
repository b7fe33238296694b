//! The fields of primitives and probes, for what describes or converts them.

use std::fmt::Display;

/// Receives the fields that decide what a primitive or probe does, in a fixed order.
pub trait Fields {
    /// A readable value. `name` is unique unless a layer says the same twice.
    fn value(&mut self, name: &str, value: &dyn Display);

    /// A long text, such as a script.
    fn text(&mut self, name: &str, text: &str);
}

/// Converts a primitive to another form while it receives the fields of it. A form has
/// its own types for contents of files, for trees of files, and for secrets.
pub trait Convert<C, T, S>: Fields {
    /// The content of a file in the other form.
    type Content;
    /// A tree of files in the other form.
    type Tree;
    /// A secret in the other form.
    type Secret;
    /// Why something can't be converted.
    type Error;

    /// Converts the content of `name`. Also returns the permission bits that a file with
    /// this content has by default.
    ///
    /// # Errors
    ///
    /// The content can't be had.
    fn content(&mut self, name: &str, content: &C) -> Result<(Self::Content, u32), Self::Error>;

    /// Converts the script of the step `name`.
    ///
    /// # Errors
    ///
    /// The script can't be had, or can't run.
    fn script(&mut self, name: &str, script: &C) -> Result<Self::Content, Self::Error>;

    /// Converts a tree of files.
    ///
    /// # Errors
    ///
    /// The tree can't be had.
    fn tree(&mut self, tree: &T) -> Result<Self::Tree, Self::Error>;

    /// Converts a secret.
    fn secret(&mut self, secret: &S) -> Self::Secret;
}

/// Passes a value on if there is one.
pub(crate) fn optional<T: Display>(to: &mut (impl Fields + ?Sized), name: &str, value: Option<&T>) {
    if let Some(value) = value {
        to.value(name, value);
    }
}

//! The vimg recipe language: from texts to a [`Model`], or to diagnostics.
//!
//! Pure: the world is read only through [`Files`], nothing is written, and the
//! same texts and parameters give the same model. The modules stand in the
//! order of their layers; each imports only from those above it.

mod source;
mod diagnostic;
mod lexer;
mod prescan;
mod syntax;
pub mod schema;
pub mod value;
mod shape;
mod load;
mod resolve;
mod template;
pub mod model;
mod elaborate;
mod format;
mod settings;

pub use diagnostic::{Code, Diagnostic, MOST, Severity};
pub use elaborate::{Request, compile, rebuilt_name};
pub use format::format;
pub use model::Model;
pub use prescan::MAX_RECIPE;
pub use settings::{Setting, Settings, Takes, quoted, settings};
pub use source::{FileKind, FileRef, Files, ReadError, Root, Source, SourceId, Sources, Span};
pub use syntax::Document;

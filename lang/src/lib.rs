//! The vimg recipe language: compiles recipe files to a [`Model`], or to diagnostics.
//!
//! The crate is pure: it reads files only through [`Files`] and writes nothing. The
//! same files and parameters give the same model. The modules are listed in the
//! order of their layers; a module imports only from modules above it.

mod source;
mod diagnostic;
mod lexer;
mod prescan;
mod syntax;
mod disk_format;
mod kind;
pub mod value;
mod shape;
mod load;
mod resolve;
mod template;
pub mod model;
mod elaborate;
pub mod schema;
mod library;
mod compile;
mod names;
mod format;
mod settings;

pub use compile::{compile, compile_part};
pub use diagnostic::{Code, Diagnostic, MOST, Severity};
pub use elaborate::{Partial, Request, rebuilt_name};
pub use format::format;
pub use model::Model;
pub use names::{ImageNames, Names, names};
pub use prescan::MAX_RECIPE;
pub use schema::KnownDistribution;
pub use settings::{Setting, Settings, Takes, quoted, settings};
pub use source::{FileKind, FileRef, Files, ReadError, Root, Source, SourceId, Sources, Span};
pub use syntax::Document;

//! Reads the configuration of GRUB, as far as needed to tell what it boots.
//! Format: GRUB's manual, "Shell-like scripting".

mod commands;
mod entry;
mod syntax;
mod menu;

pub use entry::{DefaultEntry, Loaded};
pub use menu::default_entry;
pub use syntax::Trouble;

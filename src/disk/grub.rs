//! Reads the configuration of GRUB, as far as needed to tell what it boots.
//! Format: GRUB's manual, "Shell-like scripting".

mod syntax;
mod menu;

pub use menu::{DefaultEntry, Loaded, Trouble, default_entry};

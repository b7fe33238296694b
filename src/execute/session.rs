//! The host's end of the channel to an agent: handshake, requests, blobs. Every
//! byte from the machine may be hostile.

mod channel;
mod exec;
mod files;
mod follow;
mod handshake;
mod requests;

pub(super) use channel::{Session, SessionError};
pub use exec::{Ended, Input};
pub(super) use follow::{Blobs, Progress, Source};

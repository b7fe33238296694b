//! What a cache holds, by name, and what it says instead.

use std::time::{Duration, SystemTime};

use sha2::{Digest as _, Sha256};

use super::entry::Pack;
use super::spec::is_name;
use crate::digest::Key;

/// Longer than a build takes: a pack that nothing needs is removed when it was
/// found so before, and this long ago. A build that refers to it by then keeps
/// it.
pub const GRACE: Duration = Duration::from_secs(24 * 60 * 60);

/// What a cache holds, by kind. Names have a version before them, so that
/// those who write another one do not meet.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Object {
    /// What is known of a state.
    Record {
        /// The trust domain.
        domain: String,
        /// The state's key.
        key: Key,
    },
    /// Pieces of files.
    Pack(Pack),
    /// The nodes of a project's last build.
    Build {
        /// The trust domain.
        domain: String,
        /// What the project is called.
        name: String,
    },
    /// Packs that nothing needed at the last clean-up.
    Condemned,
    /// A copy that somebody made to touch a pack, and left.
    Aside(String),
}

/// The versions of entries and of the states in them: those of others are not
/// seen, used or cleaned up.
pub(super) fn root() -> String {
    format!("v{}.{}", super::entry::SCHEMA, crate::store::SCHEMA)
}

impl Object {
    /// Its name.
    pub fn path(&self) -> String {
        match self {
            Self::Record { domain, key } => format!("{}/records/{domain}/{key}", root()),
            Self::Pack(pack) => format!("{}/packs/{}", root(), pack.sha256),
            Self::Build { domain, name } => format!("{}/builds/{domain}/{name}", root()),
            Self::Condemned => format!("{}/condemned", root()),
            Self::Aside(name) => format!("{}/aside/{name}", root()),
        }
    }

    pub(super) fn parse(path: &str, size: u64) -> Option<Self> {
        let path = path.strip_prefix(&root())?.strip_prefix('/')?;
        if let Some(sha256) = path.strip_prefix("packs/") {
            let pack = Pack { sha256: sha256.to_owned(), size };
            return pack.is_named().then_some(Self::Pack(pack));
        }
        if let Some(name) = path.strip_prefix("aside/") {
            return is_name(name).then(|| Self::Aside(name.to_owned()));
        }
        if let Some((domain, key)) = path.strip_prefix("records/").and_then(|rest| rest.split_once('/')) {
            if !is_name(domain) {
                return None;
            }
            return Some(Self::Record { domain: domain.to_owned(), key: Key(key.parse().ok()?) });
        }
        let (domain, name) = path.strip_prefix("builds/")?.split_once('/')?;
        (is_name(domain) && is_name(name))
            .then(|| Self::Build { domain: domain.to_owned(), name: name.to_owned() })
    }
}

/// What is known of an object without reading it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Meta {
    /// In bytes.
    pub size: u64,
    /// When it was last written or touched, if that is known.
    pub modified: Option<SystemTime>,
}

impl Meta {
    /// How long ago that was; none for what is to come.
    pub(super) fn age(&self) -> Option<Duration> {
        SystemTime::now().duration_since(self.modified?).ok()
    }
}

/// Why a cache did not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trouble {
    /// A sentence.
    pub why: String,
    /// Whether it was said already: the cache is not used any more.
    pub known: bool,
    /// Whether it answers, with something that can't be used.
    pub content: bool,
}

impl Trouble {
    pub(super) fn new(why: impl Into<String>) -> Self {
        let why: String = why.into();
        let line = why.lines().next().unwrap_or_default();
        let mut why: String = line.chars().take(200).collect();
        if why.len() < line.len() {
            why.push_str("...");
        }
        Self { why: crate::event::plain(&why), known: false, content: false }
    }

    /// It answers, with something that can't be used.
    pub(super) fn content(why: &str) -> Self {
        Self { content: true, ..Self::new(why) }
    }
}

impl std::fmt::Display for Trouble {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.why)
    }
}

pub(super) type Answer<T> = Result<T, Trouble>;

/// A SHA-256 in hexadecimal.
pub(super) fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

//! Names of the objects in a cache, and the errors of a cache.

use std::time::{Duration, SystemTime};

use sha2::{Digest as _, Sha256};

use super::entry::Pack;
use super::spec::is_name;
use crate::digest::Key;

/// Minimum age of a tombstone before garbage collection deletes its pack. It
/// must be longer than a build: a build that refers to the pack in the meantime
/// keeps it.
pub const GRACE: Duration = Duration::from_secs(24 * 60 * 60);

/// An object in a cache. All names begin with the format version, so that
/// different versions of vimg don't touch each other's objects.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Object {
    /// The signed entries of a state.
    Record {
        /// The trust domain.
        domain: String,
        /// The state's key.
        key: Key,
    },
    /// Chunks of files.
    Pack(Pack),
    /// The keys of a project's last build.
    Build {
        /// The trust domain.
        domain: String,
        /// The name of the project.
        name: String,
    },
    /// The tombstones: packs that no record needed at the last garbage
    /// collection.
    Tombstones,
    /// A temporary copy of a pack, left by an interrupted refresh of its age.
    Aside(String),
}

/// The directory of this format version, that of entries. vimg does not see, use
/// or clean up other versions.
pub(super) fn root() -> String {
    format!("v{}", super::entry::SCHEMA)
}

impl Object {
    /// The object's name in the cache.
    pub fn path(&self) -> String {
        match self {
            Self::Record { domain, key } => format!("{}/records/{domain}/{key}", root()),
            Self::Pack(pack) => format!("{}/packs/{}", root(), pack.sha256),
            Self::Build { domain, name } => format!("{}/builds/{domain}/{name}", root()),
            Self::Tombstones => format!("{}/tombstones", root()),
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

/// The metadata of an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Meta {
    /// In bytes.
    pub size: u64,
    /// When it was last written or refreshed, if known.
    pub modified: Option<SystemTime>,
}

impl Meta {
    /// The object's age; `None` if it is unknown or in the future.
    pub(super) fn age(&self) -> Option<Duration> {
        SystemTime::now().duration_since(self.modified?).ok()
    }
}

/// Why a request to a cache failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trouble {
    /// The error message, in one line.
    pub why: String,
    /// Whether the user has been told already, because the cache is no longer
    /// used.
    pub known: bool,
    /// Whether the cache answered with unusable content.
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

    /// Makes an error for unusable content.
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

/// Computes a SHA-256, in hexadecimal.
pub(super) fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `docs/how-to/upgrade.md` says about caches.
    #[test]
    fn objects_of_other_versions_are_not_seen() {
        let pack = Object::Pack(Pack { sha256: sha256(b"x"), size: 1 });
        let path = pack.path();
        assert_eq!(Object::parse(&path, 1), Some(pack));
        let inner = path.strip_prefix(&root()).unwrap();
        for other in [super::super::entry::SCHEMA - 1, super::super::entry::SCHEMA + 1] {
            assert_eq!(Object::parse(&format!("v{other}{inner}"), 1), None);
        }
    }
}

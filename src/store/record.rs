//! The record of a state: a JSON file in its directory.

use serde::{Deserialize, Serialize};
use vimg_lang::model::DiskFormat;

use crate::digest::{Blob, Description, Key};

/// The version of records and of the files beside them. States of other
/// versions are ignored.
pub const SCHEMA: u32 = 5;

/// A state's record.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// [`SCHEMA`] of its writer.
    pub schema: u32,
    /// The state's key.
    pub key: Key,
    /// Tells two builds of the same key apart. Their filesystems differ in some
    /// blocks, so a disk on top of one does not fit the other.
    pub id: StateId,
    /// The kind of its node: `base`, `layer`, `check`, `seal`, `output`.
    pub kind: String,
    /// The node's name when it was built.
    pub name: String,
    /// Everything that entered the key.
    pub description: Description,
    /// Its disk.
    pub disk: Disk,
    /// The kernel and initrd for a direct boot, if known.
    pub boot: Option<Boot>,
    /// The kernel and modules for an appliance: those of the base, even if a
    /// layer installed another kernel.
    pub appliance: Option<Boot>,
    /// Whether the disk's filesystem was made here, and only the host's own
    /// kernel has written to it since: no machine, and no appliance.
    pub trusted_filesystem: bool,
    /// When it was built, in seconds since 1970.
    pub made: u64,
    /// How long the build took, in seconds.
    pub seconds: f64,
    /// Its runner, for instance `qemu 7.2.22 tcg`.
    pub provider: String,
    /// Disk usage of its disk file on this machine, in bytes.
    pub bytes: u64,
    /// Digest and size of its disk, or of the file in its place, when it was
    /// built.
    #[serde(default)]
    pub file: Option<Blob>,
    /// Its origin, if it came from a cache.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<Origin>,
    /// The origins of states that it was made from, if it was built here but is
    /// not on top of them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub inherited: Vec<Origin>,
    /// Of an output: the state that it was exported from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<(Key, StateId)>,
    /// The earlier identical state (early cutoff). Nodes above have the same
    /// key as on that one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub same: Option<(Key, StateId)>,
}

impl Record {
    /// When it was built, in seconds since 1970, as far as the times of its
    /// files can tell: the clock of a machine is nearly that of the host.
    pub fn during(&self) -> std::ops::Range<i64> {
        let end = self.made.cast_signed();
        end - self.seconds.ceil() as i64 - 2..end + 2
    }

    /// Makes a record of something that took no time.
    pub fn new(key: Key, kind: &str, name: &str, description: Description, disk: Disk) -> Self {
        Self {
            schema: SCHEMA,
            key,
            id: StateId::new(),
            kind: kind.to_owned(),
            name: name.to_owned(),
            description,
            disk,
            boot: None,
            appliance: None,
            trusted_filesystem: false,
            made: 0,
            seconds: 0.0,
            provider: String::new(),
            bytes: 0,
            file: None,
            origin: None,
            inherited: Vec::new(),
            source: None,
            same: None,
        }
    }
}

/// The trust domain and the signing key of a state from a cache.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Origin {
    /// The trust domain that it was found in.
    pub domain: String,
    /// The tag of the key that signed it.
    pub key: String,
}

/// The ID of a state: a random number for each build.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct StateId(u64);

impl std::fmt::Display for StateId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:x}", self.0)
    }
}

impl StateId {
    /// Returns the number.
    pub(super) fn number(self) -> u64 {
        self.0
    }

    /// Makes a new, unique ID.
    pub(crate) fn new() -> Self {
        use std::hash::{BuildHasher, Hasher};
        Self(std::collections::hash_map::RandomState::new().build_hasher().finish())
    }
}

/// The identity of a state: what decides whether it is complete. It is the
/// target of a symbolic link beside the record, so that one system call reads
/// it. A build of thousands of states with nothing to do is then fast.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Identity {
    pub(super) id: StateId,
    pub(super) kind: DiskKind,
    /// The size of `record.json`, in bytes.
    pub(super) record: u64,
    /// The size of the disk's file, in bytes.
    pub(super) size: u64,
    /// [`Record::origin`] and [`Record::inherited`].
    pub(super) origins: Vec<Origin>,
    pub(super) backing: Option<(Key, StateId)>,
    /// Of a state that lies on another one: [`Record::same`].
    pub(super) same: Option<(Key, StateId)>,
}

impl Identity {
    /// Makes the identity of a state whose record and disk have these sizes.
    pub(super) fn of(state: &Record, record: u64, size: u64) -> Self {
        let (kind, backing) = (state.disk.kind, state.disk.backing);
        let origins = state.origin.iter().chain(&state.inherited).cloned().collect();
        Self { id: state.id, kind, record, size, origins, backing, same: backing.and(state.same) }
    }

    /// Encodes as `SCHEMA:ID:KIND:RECORD:SIZE:ORIGINS[:BACKING KEY:BACKING
    /// ID[:SAME KEY:SAME ID]]`. ORIGINS is `-`, or a list of `DOMAIN=TAG` with
    /// commas.
    pub(super) fn text(&self) -> String {
        let kind = self.kind.word();
        let Self { record, size, .. } = self;
        let origins: Vec<String> = self.origins.iter().map(|o| format!("{}={}", o.domain, o.key)).collect();
        let origins = if origins.is_empty() { "-".into() } else { origins.join(",") };
        let backing = self.backing.map_or(String::new(), |(key, id)| format!(":{key}:{:x}", id.0));
        let same = self.same.map_or(String::new(), |(key, id)| format!(":{key}:{:x}", id.0));
        format!("{SCHEMA}:{:x}:{kind}:{record}:{size}:{origins}{backing}{same}", self.id.0)
    }

    /// Parses the output of [`Identity::text`] of the same version.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split(':');
        let id = |part: &str| u64::from_str_radix(part, 16).ok().map(StateId);
        if parts.next()? != SCHEMA.to_string() {
            return None;
        }
        let own = id(parts.next()?)?;
        let kind = parts.next()?;
        let kind = DiskKind::ALL.into_iter().find(|known| known.word() == kind)?;
        let (record, size) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
        let origin = |text: &str| {
            let (domain, key) = text.split_once('=')?;
            Some(Origin { domain: domain.to_owned(), key: key.to_owned() })
        };
        let origins = match parts.next()? {
            "-" => Vec::new(),
            text => text.split(',').map(origin).collect::<Option<_>>()?,
        };
        let mut build = || match (parts.next(), parts.next()) {
            (Some(key), Some(number)) => Some(Some((Key(key.parse().ok()?), id(number)?))),
            (None, _) => Some(None),
            _ => None,
        };
        let (backing, same) = (build()?, build()?);
        Some(Self { id: own, kind, record, size, origins, backing, same })
    }
}

/// A state's disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// The kind of the file.
    pub kind: DiskKind,
    /// The state whose disk is below; `None` if it has no disk below. The
    /// header of the file does not name it.
    pub backing: Option<(Key, StateId)>,
    /// The number of disks below.
    pub depth: u32,
}

/// The kind of a disk file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskKind {
    /// qcow2
    Qcow2,
    /// Raw and sparse.
    Raw,
    /// No disk: the result of a check is in its log.
    None,
}

impl From<DiskFormat> for DiskKind {
    fn from(format: DiskFormat) -> Self {
        match format {
            DiskFormat::Qcow2 => Self::Qcow2,
            DiskFormat::Raw => Self::Raw,
        }
    }
}

impl DiskKind {
    /// All kinds.
    pub const ALL: [Self; 3] = [Self::Qcow2, Self::Raw, Self::None];

    fn word(self) -> &'static str {
        match self {
            Self::Qcow2 => "qcow2",
            Self::Raw => "raw",
            Self::None => "none",
        }
    }

    /// The file without which the state does not exist: the disk, or else the
    /// log.
    pub fn file_name(self) -> &'static str {
        match self {
            Self::Qcow2 => "disk.qcow2",
            Self::Raw => "disk.raw",
            Self::None => "log.zst",
        }
    }
}

/// The files of a direct boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Boot {
    /// The kernel.
    pub kernel: Blob,
    /// The initial RAM disk.
    pub initrd: Blob,
}

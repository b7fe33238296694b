//! What is known about a state: a JSON file in its directory.

use serde::{Deserialize, Serialize};

use crate::digest::{Blob, Description, Key};

/// The version of records and of what lies beside them. States of another
/// version are not there, as far as this program is concerned.
pub const SCHEMA: u32 = 3;

/// A state's record.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// [`SCHEMA`] of its writer.
    pub schema: u32,
    /// The state's key.
    pub key: Key,
    /// Tells this state from another one that was made under the same key:
    /// what is in a machine's filesystem is not the same to the last block
    /// when it is made again, so what lies on top of one does not fit the
    /// other.
    pub id: StateId,
    /// What kind of node it came from: `base`, `layer`, `seal`, `output`.
    pub kind: String,
    /// The node's name when it was made.
    pub name: String,
    /// Everything that entered the key.
    pub description: Description,
    /// Its disk.
    pub disk: Disk,
    /// The kernel and initrd for a direct boot, if they are known.
    pub boot: Option<Boot>,
    /// A kernel and its modules, to work on the disk from outside: those of
    /// the base, whatever kernel a layer brought.
    pub appliance: Option<Boot>,
    /// Whether the disk's filesystem was made here, and nothing but the host's
    /// own kernel has written to it since: no machine, and no appliance.
    pub ours: bool,
    /// When it was made, in seconds since 1970.
    pub made: u64,
    /// How long it took, in seconds.
    pub seconds: f64,
    /// What made it, for instance `qemu 7.2.22 tcg`.
    pub provider: String,
    /// What the disk file takes on this machine, in bytes.
    pub bytes: u64,
    /// The disk's file, or what stands in its place, as it was when the state
    /// was made.
    #[serde(default)]
    pub file: Option<Blob>,
    /// Where it came from, if it was not made here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<Origin>,
    /// Of a state that was made here of others, and does not lie on them: where
    /// those came from.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub inherited: Vec<Origin>,
    /// Of an output: the state that it was written from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<(Key, StateId)>,
    /// The state that was there before and holds the same: what is made from
    /// this one has the key that it has when it is made from that one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub same: Option<(Key, StateId)>,
}

impl Record {
    /// When it was made, in seconds since 1970, as far as its files' times may
    /// tell: a machine's clock is the host's, more or less.
    pub fn during(&self) -> std::ops::Range<i64> {
        let end = self.made.cast_signed();
        end - self.seconds.ceil() as i64 - 2..end + 2
    }

    /// A record of something that took no time.
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
            ours: false,
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

/// The cache domain and the signing key of a state from a cache.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Origin {
    /// The trust domain that it was found in.
    pub domain: String,
    /// The tag of the key that it was signed with.
    pub key: String,
}

/// A random number that a state gets when it is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct StateId(u64);

impl std::fmt::Display for StateId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:x}", self.0)
    }
}

impl StateId {
    /// The number.
    pub(super) fn number(self) -> u64 {
        self.0
    }

    /// One that nothing else has.
    pub(crate) fn new() -> Self {
        use std::hash::{BuildHasher, Hasher};
        Self(std::collections::hash_map::RandomState::new().build_hasher().finish())
    }
}

/// What has to be read of a state to know whether it is whole. It is the text
/// of a symbolic link beside the record: one system call reads it, so that a
/// build of thousands of states that does nothing is quick.
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
    /// Of a state whose record and disk have these sizes.
    pub(super) fn of(state: &Record, record: u64, size: u64) -> Self {
        let (kind, backing) = (state.disk.kind, state.disk.backing);
        let origins = state.origin.iter().chain(&state.inherited).cloned().collect();
        Self { id: state.id, kind, record, size, origins, backing, same: backing.and(state.same) }
    }

    /// `SCHEMA:ID:KIND:RECORD:SIZE:ORIGINS[:BACKING KEY:BACKING ID[:SAME KEY:SAME
    /// ID]]`; the origins are `-`, or a list with commas of domains, each with `=`
    /// and a key's tag.
    pub(super) fn text(&self) -> String {
        let kind = match self.kind {
            DiskKind::Qcow2 => "qcow2",
            DiskKind::Raw => "raw",
            DiskKind::None => "none",
        };
        let Self { record, size, .. } = self;
        let origins: Vec<String> = self.origins.iter().map(|o| format!("{}={}", o.domain, o.key)).collect();
        let origins = if origins.is_empty() { "-".into() } else { origins.join(",") };
        let backing = self.backing.map_or(String::new(), |(key, id)| format!(":{key}:{:x}", id.0));
        let same = self.same.map_or(String::new(), |(key, id)| format!(":{key}:{:x}", id.0));
        format!("{SCHEMA}:{:x}:{kind}:{record}:{size}:{origins}{backing}{same}", self.id.0)
    }

    /// Reads what [`Identity::text`] wrote in the same version.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split(':');
        let id = |part: &str| u64::from_str_radix(part, 16).ok().map(StateId);
        if parts.next()? != SCHEMA.to_string() {
            return None;
        }
        let own = id(parts.next()?)?;
        let kind = match parts.next()? {
            "qcow2" => DiskKind::Qcow2,
            "raw" => DiskKind::Raw,
            "none" => DiskKind::None,
            _ => return None,
        };
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
    /// What the file is.
    pub kind: DiskKind,
    /// The state whose disk lies below it, if it does not stand alone. The
    /// header of the file does not name it.
    pub backing: Option<(Key, StateId)>,
    /// How many disks lie below it.
    pub depth: u32,
}

/// What a disk file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskKind {
    /// qcow2
    Qcow2,
    /// Raw and sparse.
    Raw,
    /// None at all: what is known of the state is in its log.
    None,
}

impl DiskKind {
    /// The name of the file in the state's directory without which it is not
    /// there: the disk, if it has one.
    pub fn file_name(self) -> &'static str {
        match self {
            Self::Qcow2 => "disk.qcow2",
            Self::Raw => "disk.raw",
            Self::None => "log.zst",
        }
    }
}

/// What a direct boot needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Boot {
    /// The kernel.
    pub kernel: Blob,
    /// The initial RAM disk.
    pub initrd: Blob,
}

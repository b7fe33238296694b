//! The record of a state in a cache: signed entries of the state and of all
//! disks below it. One request thus tells whether the state can be used.

use std::collections::BTreeSet;
use std::io::Read;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::sign::{Envelope, Signer, Trust, Writer};
use super::spec::is_name;
use super::wire::WireState;
use crate::digest::{Digest, Key};
use crate::store::DiskKind;

/// The version of entries. Entries of other versions are ignored.
pub(super) const SCHEMA: u32 = 4;
/// The DSSE payload type of an entry.
const KIND: &str = "application/vnd.vimg.entry.v1+json";
/// The DSSE payload type of a build.
const BUILD_KIND: &str = "application/vnd.vimg.build.v1+json";
/// Maximum size of an uncompressed record, in bytes.
const MAX_RECORD: u64 = 64 << 20;
/// Maximum size of a compressed record, in bytes.
pub(super) const MAX_STORED: u64 = 16 << 20;
/// Maximum size of a pack, in bytes: a full pack and a list of chunks.
const MAX_PACK: u64 = 512 << 20;
/// Maximum size of a file, in bytes.
const MAX_FILE: u64 = 16 << 40;
/// Maximum number of entries in a record.
const MAX_CHAIN: usize = 64;

/// An object with many chunks, named by the SHA-256 of its bytes, as registries
/// name their blobs.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Pack {
    /// In hexadecimal.
    pub sha256: String,
    /// In bytes.
    pub size: u64,
}

impl Pack {
    /// Whether its name is a SHA-256. Names become paths.
    pub(super) fn is_named(&self) -> bool {
        self.sha256.len() == 64 && self.sha256.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
    }

    /// Removes duplicates.
    pub(super) fn distinct<'a>(all: impl IntoIterator<Item = &'a Self>) -> Vec<Self> {
        let all: BTreeSet<&Self> = all.into_iter().collect();
        all.into_iter().cloned().collect()
    }
}

/// The place of some bytes in a pack.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// Index of the pack in [`Contents::packs`].
    pub pack: u32,
    /// Offset in the pack, in bytes.
    pub from: u64,
    /// Stored length, in bytes.
    pub stored: u32,
    /// Uncompressed length, in bytes. If it is more than `stored`, the bytes
    /// are compressed with zstd.
    pub length: u32,
    /// Digest of the uncompressed bytes.
    pub digest: Digest,
}

/// A file of a state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Contents {
    /// Its name in the state's directory, or [`BLOB`].
    pub name: String,
    /// Its length in bytes, with holes.
    pub size: u64,
    /// Its digest, if the store names it by digest.
    pub digest: Option<Digest>,
    /// The packs that hold its chunks.
    pub packs: Vec<Pack>,
    /// The place of its list of chunks.
    pub list: Place,
}

/// The signed part of a record: a state and its files.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// The version of the format of its writer.
    pub schema: u32,
    /// The trust domain that it is for.
    pub domain: String,
    /// When it was signed, in seconds since 1970.
    pub written: u64,
    /// The program that wrote it.
    pub writer: String,
    /// The state.
    pub state: WireState,
    /// Its files.
    pub files: Vec<Contents>,
    /// The digest of the entry of the disk below.
    pub below: Option<Digest>,
}

/// An entry that a trusted key signed.
#[derive(Debug, Clone)]
pub struct Signed {
    /// The entry.
    pub entry: Entry,
    /// Its own digest.
    pub digest: Digest,
    /// Who signed it.
    pub writer: Writer,
    /// The tag of the key that signed it.
    pub signer: String,
    envelope: Envelope,
}

#[derive(Serialize, Deserialize)]
struct Envelopes {
    entries: Vec<Envelope>,
}

/// The requirements for a record.
pub struct Asked<'a> {
    /// The state's key.
    pub key: Key,
    /// The domain that it was found in.
    pub domain: &'a str,
    /// The domains that entries of disks below may have.
    pub domains: &'a [String],
    /// The trusted keys.
    pub trust: &'a Trust,
    /// The current time, in seconds since 1970.
    pub now: u64,
    /// Maximum age of the record.
    pub max_age: Option<Duration>,
}

impl Entry {
    /// Signs the entry of a state; `below` is the entry of the disk below, if
    /// there is one.
    pub fn sign(
        domain: &str,
        now: u64,
        state: WireState,
        files: Vec<Contents>,
        below: Option<&Signed>,
        signer: &Signer,
    ) -> Result<Signed, String> {
        let entry = Self {
            schema: SCHEMA,
            domain: domain.to_owned(),
            written: now,
            writer: format!("vimg {}", env!("CARGO_PKG_VERSION")),
            state,
            files,
            below: below.map(|b| b.digest),
        };
        let payload = serde_json::to_vec(&entry).map_err(|e| e.to_string())?;
        let envelope = signer.sign(KIND, &payload);
        let tag = signer.public().tag();
        Ok(Signed { entry, digest: Digest::of(&payload), writer: Writer::Own, signer: tag, envelope })
    }

    /// Finds a file by name.
    pub fn file(&self, name: &str) -> Option<&Contents> {
        self.files.iter().find(|f| f.name == name)
    }

    /// Lists the packs of all its files.
    pub fn packs(&self) -> impl Iterator<Item = &Pack> {
        self.files.iter().flat_map(|f| &f.packs)
    }
}

/// Encodes a record: the entry of a state, then those of the disks below, from
/// top to bottom.
pub fn write(chain: &[&Signed]) -> Result<Vec<u8>, String> {
    let entries = chain.iter().map(|signed| signed.envelope.clone()).collect();
    let json = serde_json::to_vec(&Envelopes { entries }).map_err(|e| e.to_string())?;
    if json.len() as u64 > MAX_RECORD {
        return Err("it is larger than a record may be".into());
    }
    let packed = zstd::bulk::compress(&json, 3).map_err(|e| e.to_string())?;
    if packed.len() as u64 > MAX_STORED {
        return Err("it is larger than a record may be".into());
    }
    Ok(packed)
}

fn envelopes(bytes: &[u8]) -> Result<Vec<Envelope>, String> {
    let damaged = |_| "it is damaged".to_owned();
    let decoder = zstd::stream::read::Decoder::new(bytes).map_err(damaged)?;
    let mut json = Vec::new();
    decoder.take(MAX_RECORD + 1).read_to_end(&mut json).map_err(damaged)?;
    if json.len() as u64 > MAX_RECORD {
        return Err("it is larger than a record may be".into());
    }
    let all: Envelopes = serde_json::from_slice(&json).map_err(|_| "it is damaged".to_owned())?;
    if all.entries.is_empty() || all.entries.len() > MAX_CHAIN {
        return Err("it is damaged".into());
    }
    Ok(all.entries)
}

/// Decodes a record without checking its signatures: to list a cache, never to
/// use a state.
pub fn peek(bytes: &[u8]) -> Result<Vec<Entry>, String> {
    let payload = |envelope: &Envelope| envelope.payload().ok_or_else(|| "it is damaged".to_owned());
    envelopes(bytes)?.iter().map(|envelope| parse(&payload(envelope)?)).collect()
}

/// Decodes a record and checks that trusted keys signed all of it. The state's
/// own entry comes first.
///
/// # Errors
///
/// Why the record must not be used.
pub fn read(bytes: &[u8], asked: &Asked) -> Result<Vec<Signed>, String> {
    let mut chain: Vec<Signed> = Vec::new();
    for envelope in envelopes(bytes)? {
        let payload = envelope.payload().ok_or("it is damaged")?;
        // The domain is the writer's claim. The next line checks whether the
        // key may sign for it.
        let entry: Entry = parse(&payload)?;
        let (writer, key) = envelope.writer(KIND, &payload, &entry.domain, asked.trust)?;
        let digest = Digest::of(&payload);
        fits(&entry, &digest, chain.last(), asked)?;
        chain.push(Signed { entry, digest, writer, signer: key.tag(), envelope });
    }
    match chain.last() {
        Some(last) if last.entry.state.disk.backing.is_none() && last.entry.below.is_none() => Ok(chain),
        _ => Err("the entry of a disk below is missing".into()),
    }
}

fn parse(payload: &[u8]) -> Result<Entry, String> {
    #[derive(Deserialize)]
    struct Version {
        schema: u32,
    }
    let version: Version = serde_json::from_slice(payload).map_err(|_| "it is damaged".to_owned())?;
    if version.schema != SCHEMA {
        return Err(format!("its entries have version {}, but this vimg reads {SCHEMA}", version.schema));
    }
    let entry: Entry = serde_json::from_slice(payload).map_err(|_| "it is damaged".to_owned())?;
    // Names become paths, and sizes are added and allocated.
    let good = |pack: &Pack| pack.is_named() && pack.size <= MAX_PACK;
    let sound = |file: &Contents| {
        let list = file.packs.get(file.list.pack as usize);
        let end = file.list.from.checked_add(u64::from(file.list.stored));
        file.packs.iter().all(good)
            && file.size <= MAX_FILE
            && list.is_some_and(|pack| end.is_some_and(|end| end <= pack.size))
    };
    if !is_name(&entry.domain) || entry.files.len() > 16 || !entry.files.iter().all(sound) {
        return Err("it is damaged".into());
    }
    Ok(entry)
}

/// Tolerated difference of the clocks of two machines, in seconds.
const CLOCKS: u64 = 86_400;

/// Checks that an entry is the requested one, or that of the disk below
/// `above`.
fn fits(entry: &Entry, digest: &Digest, above: Option<&Signed>, asked: &Asked) -> Result<(), String> {
    let state = &entry.state;
    if state.description.key() != state.key {
        return Err("its key does not match its description".into());
    }
    if !state.description.is_consistent() {
        return Err("its facts do not match its description".into());
    }
    if entry.written > asked.now.saturating_add(CLOCKS) {
        return Err("it was written in the future".into());
    }
    match above {
        None => {
            if state.key != asked.key {
                return Err(format!("it is the record of another state, {}", state.key.short()));
            }
            if entry.domain != asked.domain {
                return Err(format!("it was signed for the domain `{}`", entry.domain.escape_default()));
            }
            let age = asked.now.saturating_sub(entry.written);
            if asked.max_age.is_some_and(|max| age > max.as_secs()) {
                return Err(format!("it is {} days old, more than `max-age` allows", age / 86_400));
            }
        }
        Some(above) => {
            if !asked.domains.contains(&entry.domain) {
                return Err(format!(
                    "the entry of a disk below has the domain `{}`, which is not read",
                    entry.domain.escape_default()
                ));
            }
            let lies_on = above.entry.state.disk.backing;
            if lies_on != Some((state.key, state.id)) || above.entry.below != Some(*digest) {
                return Err("it does not fit the disk below".into());
            }
        }
    }
    if entry.file(state.disk.kind.file_name()).is_none() {
        return Err("its disk is missing".into());
    }
    // Names become paths, so only known names are allowed.
    let known = DiskKind::ALL.map(DiskKind::file_name);
    if entry.files.iter().any(|f| !known.contains(&f.name.as_str()) && f.name != BLOB) {
        return Err("it has an unknown file".into());
    }
    Ok(())
}

/// The name of files that the store names by digest.
pub const BLOB: &str = "blob";

/// The nodes of a build and their keys, to explain what changed since.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Build {
    /// The trust domain that it is for.
    pub domain: String,
    /// The name of the project.
    pub name: String,
    /// When it was signed, in seconds since 1970.
    pub written: u64,
    /// The keys of its nodes, by their names.
    pub nodes: std::collections::BTreeMap<String, Key>,
}

impl Build {
    /// Signs and encodes the build.
    pub fn write(&self, signer: &Signer) -> Result<Vec<u8>, String> {
        let payload = serde_json::to_vec(self).map_err(|e| e.to_string())?;
        let envelope = signer.sign(BUILD_KIND, &payload);
        let json = serde_json::to_vec(&envelope).map_err(|e| e.to_string())?;
        zstd::bulk::compress(&json, 3).map_err(|e| e.to_string())
    }

    /// Decodes a build that a trusted key signed.
    pub fn read(bytes: &[u8], domain: &str, name: &str, trust: &Trust) -> Result<Self, String> {
        let damaged = |_| "it is damaged".to_owned();
        let decoder = zstd::stream::read::Decoder::new(bytes).map_err(damaged)?;
        let mut json = Vec::new();
        decoder.take(MAX_RECORD).read_to_end(&mut json).map_err(damaged)?;
        let envelope: Envelope = serde_json::from_slice(&json).map_err(|_| "it is damaged".to_owned())?;
        let payload = envelope.payload().ok_or("it is damaged")?;
        let build: Self = serde_json::from_slice(&payload).map_err(|_| "it is damaged".to_owned())?;
        envelope.writer(BUILD_KIND, &payload, &build.domain, trust)?;
        if build.domain != domain || build.name != name {
            return Err("it belongs to another build".into());
        }
        Ok(build)
    }
}

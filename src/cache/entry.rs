//! What a cache knows of a state: a signed record, with those of the disks
//! that it lies on, so that one request tells whether it can be used.

use std::collections::BTreeSet;
use std::io::Read;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::sign::{Envelope, Signer, Trust, Writer};
use super::spec::is_name;
use crate::digest::{Digest, Key};
use crate::store::{self, DiskKind, Record};

/// The version of entries. Those of another one are not there, as far as this
/// program is concerned.
pub(super) const SCHEMA: u32 = 2;
/// What a signed entry is.
const KIND: &str = "application/vnd.vimg.entry.v1+json";
/// What a signed list of a build's nodes is.
const BUILD_KIND: &str = "application/vnd.vimg.build.v1+json";
/// The most that a record may be, unpacked, in bytes.
const MAX_RECORD: u64 = 64 << 20;
/// The most that it may be as it is stored, in bytes.
pub(super) const MAX_STORED: u64 = 16 << 20;
/// The most that a pack may be, in bytes: of a full one and a list.
const MAX_PACK: u64 = 512 << 20;
/// The most that a file may be, in bytes.
const MAX_FILE: u64 = 16 << 40;
/// The most disks that may lie below a state.
const MAX_CHAIN: usize = 64;

/// An object of many pieces, by the SHA-256 of its bytes: registries name
/// their objects so.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Pack {
    /// In hexadecimal.
    pub sha256: String,
    /// In bytes.
    pub size: u64,
}

impl Pack {
    /// Whether its name is one: names become paths.
    pub(super) fn is_named(&self) -> bool {
        self.sha256.len() == 64 && self.sha256.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
    }

    /// Each of them once.
    pub(super) fn distinct<'a>(all: impl IntoIterator<Item = &'a Self>) -> Vec<Self> {
        let all: BTreeSet<&Self> = all.into_iter().collect();
        all.into_iter().cloned().collect()
    }
}

/// Where in a pack something is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// The pack, in the list beside.
    pub pack: u32,
    /// Where it begins, in bytes.
    pub from: u64,
    /// How long it is in the pack, in bytes.
    pub stored: u32,
    /// How long it is, in bytes. If that is more than `stored`, it is
    /// compressed by zstd.
    pub length: u32,
    /// What it is.
    pub digest: Digest,
}

/// A file of a state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Contents {
    /// Its name in the state's directory, or what it is for.
    pub name: String,
    /// Its length in bytes, holes included.
    pub size: u64,
    /// Its digest, of a file that the store knows by it.
    pub digest: Option<Digest>,
    /// The packs that hold its pieces.
    pub packs: Vec<Pack>,
    /// Where the list of its pieces is.
    pub list: Place,
}

/// What is known of a state, as it is signed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// [`SCHEMA`] of its writer.
    pub schema: u32,
    /// The trust domain that it is for.
    pub domain: String,
    /// When it was signed, in seconds since 1970.
    pub written: u64,
    /// The program that wrote it.
    pub writer: String,
    /// What the store of its writer noted.
    pub state: Record,
    /// Its files.
    pub files: Vec<Contents>,
    /// The digest of the entry of the disk that it lies on.
    pub below: Option<Digest>,
}

/// An entry that somebody signed who is believed.
#[derive(Debug, Clone)]
pub struct Signed {
    /// The entry.
    pub entry: Entry,
    /// Its own digest.
    pub digest: Digest,
    /// Who wrote it.
    pub writer: Writer,
    /// By which key, as its tag.
    pub signer: String,
    envelope: Envelope,
}

#[derive(Serialize, Deserialize)]
struct Envelopes {
    entries: Vec<Envelope>,
}

/// What is asked of a record.
pub struct Asked<'a> {
    /// The state's key.
    pub key: Key,
    /// The domain that it was found in.
    pub domain: &'a str,
    /// The domains that the disks below it may be of.
    pub domains: &'a [String],
    /// Who is believed.
    pub trust: &'a Trust,
    /// In seconds since 1970.
    pub now: u64,
    /// How old it may be.
    pub max_age: Option<Duration>,
}

impl Entry {
    /// Signs an entry that lies on another one, if it does.
    pub fn sign(
        domain: &str,
        now: u64,
        state: Record,
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

    /// One of its files.
    pub fn file(&self, name: &str) -> Option<&Contents> {
        self.files.iter().find(|f| f.name == name)
    }

    /// All packs that it needs.
    pub fn packs(&self) -> impl Iterator<Item = &Pack> {
        self.files.iter().flat_map(|f| &f.packs)
    }
}

/// Writes a record: the entry of a state, and those of the disks below it in
/// their order.
pub fn write(chain: &[&Signed]) -> Result<Vec<u8>, String> {
    let entries = chain.iter().map(|signed| signed.envelope.clone()).collect();
    let json = serde_json::to_vec(&Envelopes { entries }).map_err(|e| e.to_string())?;
    if json.len() as u64 > MAX_RECORD {
        return Err("its description is too long".into());
    }
    let packed = zstd::bulk::compress(&json, 3).map_err(|e| e.to_string())?;
    if packed.len() as u64 > MAX_STORED {
        return Err("its description is too long".into());
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

/// What a record says, whoever wrote it: to tell what is in a cache, never
/// to use it.
pub fn peek(bytes: &[u8]) -> Result<Vec<Entry>, String> {
    let payload = |envelope: &Envelope| envelope.payload().ok_or_else(|| "it is damaged".to_owned());
    envelopes(bytes)?.iter().map(|envelope| parse(&payload(envelope)?)).collect()
}

/// Reads a record and believes nothing of it that is not signed by one who is
/// trusted. The state's own entry comes first.
///
/// # Errors
///
/// A sentence that says why it is not used.
pub fn read(bytes: &[u8], asked: &Asked) -> Result<Vec<Signed>, String> {
    let mut chain: Vec<Signed> = Vec::new();
    for envelope in envelopes(bytes)? {
        let payload = envelope.payload().ok_or("it is damaged")?;
        // The domain is what the writer says; whether the writer may say it
        // is asked next.
        let entry: Entry = parse(&payload)?;
        let (writer, key) = envelope.writer(KIND, &payload, &entry.domain, asked.trust)?;
        let digest = Digest::of(&payload);
        fits(&entry, &digest, chain.last(), asked)?;
        chain.push(Signed { entry, digest, writer, signer: key.tag(), envelope });
    }
    match chain.last() {
        Some(last) if last.entry.state.disk.backing.is_none() && last.entry.below.is_none() => Ok(chain),
        _ => Err("a disk below it is missing".into()),
    }
}

fn parse(payload: &[u8]) -> Result<Entry, String> {
    #[derive(Deserialize)]
    struct Version {
        schema: u32,
    }
    let version: Version = serde_json::from_slice(payload).map_err(|_| "it is damaged".to_owned())?;
    if version.schema != SCHEMA {
        return Err(format!("it is of version {}, this program reads {SCHEMA}", version.schema));
    }
    let entry: Entry = serde_json::from_slice(payload).map_err(|_| "it is damaged".to_owned())?;
    if entry.state.schema != store::SCHEMA {
        return Err(format!(
            "its state is of version {}, this program reads {}",
            entry.state.schema,
            store::SCHEMA
        ));
    }
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

/// By how much the clocks of two machines may differ, in seconds.
const CLOCKS: u64 = 86_400;

/// Whether an entry is what was asked for, or what lies below `above`.
fn fits(entry: &Entry, digest: &Digest, above: Option<&Signed>, asked: &Asked) -> Result<(), String> {
    let state = &entry.state;
    if state.description.key() != state.key {
        return Err("its key is not that of what it describes".into());
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
                return Err(format!("it is {} days old, which is more than `max-age` allows", age / 86_400));
            }
        }
        Some(above) => {
            if !asked.domains.contains(&entry.domain) {
                return Err(format!(
                    "a disk below it is of the domain `{}`, which is not read",
                    entry.domain.escape_default()
                ));
            }
            let lies_on = above.entry.state.disk.backing;
            if lies_on != Some((state.key, state.id)) || above.entry.below != Some(*digest) {
                return Err("it does not fit the disk below it".into());
            }
        }
    }
    if entry.file(state.disk.kind.file_name()).is_none() {
        return Err("its disk is missing".into());
    }
    // Names become paths: none but those that are known.
    let known = [DiskKind::Qcow2, DiskKind::Raw, DiskKind::None].map(DiskKind::file_name);
    if entry.files.iter().any(|f| !known.contains(&f.name.as_str()) && f.name != BLOB) {
        return Err("it has a file that no state has".into());
    }
    Ok(())
}

/// What a file is called that the store knows by its digest.
pub const BLOB: &str = "blob";

/// The nodes of a build and their keys: to say what changed since.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Build {
    /// The trust domain that it is for.
    pub domain: String,
    /// What the project is called.
    pub name: String,
    /// When it was, in seconds since 1970.
    pub written: u64,
    /// The keys of its nodes, by their names.
    pub nodes: std::collections::BTreeMap<String, Key>,
}

impl Build {
    /// Signs it and writes it out.
    pub fn write(&self, signer: &Signer) -> Result<Vec<u8>, String> {
        let payload = serde_json::to_vec(self).map_err(|e| e.to_string())?;
        let envelope = signer.sign(BUILD_KIND, &payload);
        let json = serde_json::to_vec(&envelope).map_err(|e| e.to_string())?;
        zstd::bulk::compress(&json, 3).map_err(|e| e.to_string())
    }

    /// Reads what somebody wrote who is believed.
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
            return Err("it is of another build".into());
        }
        Ok(build)
    }
}

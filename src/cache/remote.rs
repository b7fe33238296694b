//! A cache somewhere else: objects by name, read and written with patience
//! that ends.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use futures_util::TryStreamExt;
use opendal::layers::{ConcurrentLimitLayer, RetryLayer, TimeoutLayer};
use opendal::{ErrorKind, Operator, services};

use super::courier::{Courier, Faults, Rest};
use super::entry::Pack;
use super::registry::Registry;
use super::spec::{Kind, Spec, is_name};
use crate::digest::Key;

/// How long a small request may take, before it is tried again.
const SMALL: Duration = Duration::from_secs(10);
/// How long a transfer may go without a byte, before it is tried again.
const STALL: Duration = Duration::from_secs(15);
/// How often a request is tried again.
const RETRIES: usize = 2;
/// How many requests are under way at once.
pub(super) const AT_ONCE: usize = 8;
/// If all that is under way moves slower than this, a cache is not worth its
/// while, in bytes a second.
const SLOWEST: u64 = 1_000_000;
/// The largest pack, in bytes.
const LARGEST: u64 = 17 << 20;
/// How long an answer may take without being counted.
const PROMPT: Duration = Duration::from_secs(2);
/// What a record takes, more often than not, in bytes.
const RECORD: u64 = 250_000;

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
    /// The packs that nothing needed when somebody last cleaned up.
    /// Packs that nothing needed at the last clean-up.
    Condemned,
    /// A copy that somebody made to touch a pack, and left.
    Aside(String),
}

/// The versions of entries and of the states in them: those of others are not
/// seen, used or cleaned up.
fn root() -> String {
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

    fn parse(path: &str, size: u64) -> Option<Self> {
        let path = path.strip_prefix(&root())?.strip_prefix('/')?;
        if let Some(sha256) = path.strip_prefix("packs/") {
            let is_hex = sha256.len() == 64 && sha256.bytes().all(|b| b.is_ascii_hexdigit());
            return is_hex.then(|| Self::Pack(Pack { sha256: sha256.to_owned(), size }));
        }
        if let Some(name) = path.strip_prefix("aside/") {
            return Some(Self::Aside(name.to_owned()));
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

type Answer<T> = Result<T, Trouble>;

enum Backend {
    /// One for what is small or comes in pieces, and one that has the time to
    /// write a pack.
    Objects(Operator, Operator),
    Registry(Registry),
}

/// A cache that is in use.
pub struct Remote {
    /// As it was named.
    pub spec: Spec,
    backend: Backend,
    /// How much longer it may fail.
    left: Mutex<Duration>,
    /// How much is under way, in bytes.
    moving: AtomicU64,
    gone: AtomicBool,
    rest: Arc<Rest>,
    faults: Arc<Faults>,
    down: AtomicU64,
    up: AtomicU64,
    requests: AtomicU64,
}

impl std::fmt::Debug for Remote {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Remote({})", self.spec.label)
    }
}

impl Remote {
    /// A cache, not asked anything yet.
    ///
    /// # Errors
    ///
    /// A sentence that says what is wrong with how it is named.
    pub fn open(spec: Spec) -> Result<Self, String> {
        let (rest, faults) = (Arc::new(Rest::default()), Arc::new(Faults::default()));
        let backend = match spec.kind {
            Kind::Registry => Backend::Registry(Registry::open(&spec, faults.clone())?),
            _ => {
                let (read, write) = operators(&spec, &rest, &faults)?;
                Backend::Objects(read, write)
            }
        };
        Ok(Self {
            left: Mutex::new(spec.timeout),
            moving: AtomicU64::new(0),
            gone: AtomicBool::new(false),
            rest,
            faults,
            spec,
            backend,
            down: AtomicU64::new(0),
            up: AtomicU64::new(0),
            requests: AtomicU64::new(0),
        })
    }

    /// Whether it failed for so long that it is not asked any more.
    pub fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Relaxed)
    }

    /// What went wrong and was tried again since this was last asked, and how
    /// often.
    pub fn faults(&self) -> BTreeMap<String, usize> {
        self.faults.take()
    }

    /// Whether what is written again under the same name is what will be read:
    /// GitHub's cache keeps the first.
    pub(super) fn replaces(&self) -> bool {
        self.spec.kind != Kind::Gha
    }

    /// Tells it and one of its domains from all others, however it is named.
    pub(super) fn place(&self, domain: &str) -> String {
        let option = |name| self.spec.option(name).unwrap_or_default();
        let plain = |name| option(name).trim_matches('/').to_owned();
        let root = match self.spec.kind {
            Kind::Local => std::path::absolute(option("root"))
                .unwrap_or_default()
                .components()
                .collect::<PathBuf>()
                .display()
                .to_string(),
            _ => plain("root"),
        };
        let kind = self.spec.kind.word();
        let words = ["endpoint", "bucket", "container", "ref", "version"].map(plain);
        format!("{kind}\n{root}\n{}\n{domain}", words.join("\n"))
    }

    /// Has something told that is no reason to fail.
    pub(super) fn add_fault(&self, why: String) {
        self.faults.add(why);
    }

    /// Bytes read and written, and how often it was asked.
    pub fn moved(&self) -> (u64, u64, u64) {
        let load = |n: &AtomicU64| n.load(Ordering::Relaxed);
        (load(&self.down), load(&self.up), load(&self.requests))
    }

    /// An object of at most `most` bytes; `None` if it is not there.
    pub async fn get(&self, object: &Object, most: u64) -> Answer<Option<Vec<u8>>> {
        let bytes = self
            .guard(if matches!(object, Object::Pack(_)) { most } else { RECORD }, || async {
                match &self.backend {
                    Backend::Objects(op, _) => stream(op, &object.path(), None, most).await,
                    Backend::Registry(registry) => registry.get(object, most).await,
                }
            })
            .await?;
        self.down.fetch_add(bytes.as_ref().map_or(0, Vec::len) as u64, Ordering::Relaxed);
        Ok(bytes)
    }

    /// A part of a pack; `None` if the pack is not there. What comes may be
    /// shorter, or something else: whoever asks compares it.
    pub async fn range(&self, pack: &Pack, from: u64, length: u64) -> Answer<Option<Vec<u8>>> {
        let bytes = self
            .guard(length, || async {
                match &self.backend {
                    Backend::Objects(op, _) => {
                        let path = Object::Pack(pack.clone()).path();
                        stream(op, &path, Some((from, length)), length).await
                    }
                    Backend::Registry(registry) => registry.range(pack, from, length).await,
                }
            })
            .await?;
        self.down.fetch_add(bytes.as_ref().map_or(0, Vec::len) as u64, Ordering::Relaxed);
        Ok(bytes)
    }

    /// Writes an object. A record says which packs it needs, for those caches
    /// that keep only what is referred to.
    /// `false` if what is there, or what somebody has begun to write, can't be
    /// replaced.
    pub async fn put(&self, object: &Object, bytes: impl Into<Bytes>, needs: &[Pack]) -> Answer<bool> {
        self.write(object, bytes.into(), needs, false).await
    }

    /// Writes an object that is not there; `false` if it is. Caches that can't
    /// write on that condition may not see who does the same at this moment.
    pub async fn put_new(&self, object: &Object, bytes: impl Into<Bytes>, needs: &[Pack]) -> Answer<bool> {
        let tells = match &self.backend {
            Backend::Objects(op, _) => op.info().capability().write_with_if_not_exists,
            Backend::Registry(_) => false,
        };
        // Some that should heed the condition do not.
        if self.stat(object).await?.is_some() {
            return Ok(false);
        }
        self.write(object, bytes.into(), needs, tells).await
    }

    async fn write(&self, object: &Object, bytes: Bytes, needs: &[Pack], new: bool) -> Answer<bool> {
        let length = bytes.len() as u64;
        let written = self.guard(length, || async {
            match &self.backend {
                Backend::Objects(read, write) => {
                    let slow = matches!(object, Object::Pack(_)) || !self.replaces();
                    let op = if slow { write } else { read };
                    let path = object.path();
                    let write = |new: bool| {
                        let mut writing = op.write_with(&path, bytes.clone());
                        if op.info().capability().write_with_content_type {
                            writing = writing.content_type("application/octet-stream");
                        }
                        writing.if_not_exists(new).into_future()
                    };
                    let done = match write(new).await {
                        // Some know no conditions.
                        Err(e) if new && is_not_implemented(&e) => write(false).await,
                        done => done,
                    };
                    match done {
                        Err(e) if is_there(&e) => Ok(false),
                        done => done.map(|_| true).map_err(|e| describe(&e)),
                    }
                }
                Backend::Registry(registry) => {
                    registry.put(object, bytes.clone(), needs).await.map(|()| true)
                }
            }
        });
        let written = written.await?;
        self.up.fetch_add(if written { length } else { 0 }, Ordering::Relaxed);
        Ok(written)
    }

    /// What is known of an object; `None` if it is not there.
    pub async fn stat(&self, object: &Object) -> Answer<Option<Meta>> {
        self.guard(0, || async {
            match &self.backend {
                Backend::Objects(op, _) => match op.stat(&object.path()).await {
                    Ok(found) => Ok(Some(meta(&found))),
                    Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
                    // A cache that can't be asked is read instead.
                    Err(e) if e.kind() == ErrorKind::Unsupported => Ok(None),
                    Err(e) => Err(describe(&e)),
                },
                Backend::Registry(registry) => registry.stat(object).await,
            }
        })
        .await
    }

    /// Everything in the cache.
    pub async fn list(&self) -> Answer<Vec<(Object, Meta)>> {
        // A list of many takes many requests; it is made for people.
        let op = match &self.backend {
            Backend::Objects(op, _) => op,
            Backend::Registry(registry) => return registry.list().await,
        };
        self.requests.fetch_add(1, Ordering::Relaxed);
        let entries = match op.list_with(&format!("{}/", root())).recursive(true).await {
            Ok(entries) => entries,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) if e.kind() == ErrorKind::Unsupported => {
                return Err(Trouble::new("it can't be listed"));
            }
            Err(e) => return Err(describe(&e)),
        };
        let mut all = Vec::new();
        for entry in entries.iter().filter(|e| e.metadata().is_file()) {
            let mut known = meta(entry.metadata());
            if known.modified.is_none() || known.size == 0 {
                match op.stat(entry.path()).await {
                    Ok(found) => known = meta(&found),
                    Err(e) if e.kind() == ErrorKind::NotFound => continue,
                    Err(e) => return Err(describe(&e)),
                }
            }
            if let Some(object) = Object::parse(entry.path(), known.size) {
                all.push((object, known));
            }
        }
        Ok(all)
    }

    /// Removes an object; it need not be there.
    pub async fn delete(&self, object: &Object) -> Answer<()> {
        self.guard(0, || async {
            match &self.backend {
                Backend::Objects(op, _) => match op.delete(&object.path()).await {
                    Err(e) if e.kind() != ErrorKind::NotFound => Err(describe(&e)),
                    _ => Ok(()),
                },
                Backend::Registry(registry) => registry.delete(object).await,
            }
        })
        .await
    }

    /// Makes an object as young as if it were written now; `false` if it is
    /// not there.
    pub async fn touch(&self, object: &Object) -> Answer<bool> {
        let Backend::Objects(op, _) = &self.backend else { return Ok(true) };
        let path = object.path();
        if self.spec.kind == Kind::Local {
            let file = std::path::absolute(self.spec.option("root").unwrap_or_default());
            let file = file.and_then(|root| std::fs::File::options().append(true).open(root.join(&path)));
            return match file.and_then(|file| file.set_modified(SystemTime::now())) {
                Ok(()) => Ok(true),
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(false),
                Err(e) => Err(Trouble::new(e.to_string())),
            };
        }
        if !self.replaces() {
            // It counts from when a thing was last read.
            return Ok(self.stat(object).await?.is_some());
        }
        if !matches!(object, Object::Pack(_)) {
            // Nobody is to find the old one again where there is a new one.
            let bytes = self.get(object, super::entry::MAX_STORED).await?;
            return match bytes {
                Some(bytes) => self.put(object, bytes, &[]).await,
                None => Ok(false),
            };
        }
        let full = op.info().capability();
        if !full.copy || !full.write {
            return Ok(self.stat(object).await?.is_some());
        }
        // No service copies a thing onto itself.
        let unique = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_nanos());
        let aside = Object::Aside(format!("{}-{unique}", std::process::id())).path();
        self.guard(0, || async {
            let done = async {
                op.copy(&path, &aside).await?;
                op.copy(&aside, &path).await?;
                op.delete(&aside).await
            };
            match done.await {
                Err(e) if e.kind() == ErrorKind::NotFound => Ok(false),
                Err(e) => Err(describe(&e)),
                Ok(()) => Ok(true),
            }
        })
        .await
    }

    /// Does something that may take as long as `bytes` take to move, and
    /// counts the time if it fails. It is tried again only when the other
    /// side has said when it wants to be asked again; what else may be worth
    /// another try is tried below this.
    async fn guard<T, F: Future<Output = Answer<T>>>(&self, bytes: u64, work: impl Fn() -> F) -> Answer<T> {
        let gone =
            || Trouble { known: true, ..Trouble::new(format!("{} is not used any more", self.spec.label)) };
        let mut tries = 0;
        loop {
            if self.is_gone() {
                return Err(gone());
            }
            let start = Instant::now();
            // What moves beside it slows it down.
            let beside = Moving::add(&self.moving, bytes);
            let left = *self.left.lock().unwrap_or_else(PoisonError::into_inner);
            let rest = self.rest.left().unwrap_or_default();
            let limit = left + Duration::from_secs(beside.all() / SLOWEST);
            let result = if rest > left {
                tries = RETRIES;
                let (rest, left) = (rest.as_secs(), left.as_secs());
                Err(Trouble::new(format!("it asks to be left alone for {rest} seconds, and has {left} left")))
            } else {
                tokio::time::sleep(rest).await;
                self.requests.fetch_add(1, Ordering::Relaxed);
                let late = |_| Trouble::new(format!("no answer within {} seconds", limit.as_secs()));
                tokio::time::timeout(limit.saturating_sub(rest), work())
                    .await
                    .unwrap_or_else(|e| Err(late(e)))
            };
            // What takes its time is paid for as well, beyond what it may take.
            let fair = PROMPT + Duration::from_secs_f64(beside.all() as f64 / SLOWEST as f64);
            drop(beside);
            if result.is_ok() {
                let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
                *left = left.saturating_sub(start.elapsed().saturating_sub(fair));
                if left.is_zero() && !self.gone.swap(true, Ordering::Relaxed) {
                    self.faults.add("it took too long, and is not used any more".into());
                }
            }
            let Err(trouble) = result else { return result };
            if trouble.content {
                return Err(trouble);
            }
            {
                let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
                *left = left.saturating_sub(start.elapsed());
                if left.is_zero() || rest > *left {
                    // Whoever is first to notice tells why.
                    let first = !self.gone.swap(true, Ordering::Relaxed);
                    return Err(if first { trouble } else { gone() });
                }
            }
            tries += 1;
            if tries > RETRIES || self.rest.left().is_none() {
                return Err(trouble);
            }
            self.faults.add(trouble.why);
        }
    }
}

/// Bytes that are under way as long as this is kept.
struct Moving<'a> {
    all: &'a AtomicU64,
    own: u64,
    /// What was under way when these began, with them.
    begun: u64,
}

impl<'a> Moving<'a> {
    fn add(all: &'a AtomicU64, own: u64) -> Self {
        Self { all, own, begun: all.fetch_add(own, Ordering::Relaxed) + own }
    }

    /// The most that is known to have been under way beside and with them.
    fn all(&self) -> u64 {
        self.begun.max(self.all.load(Ordering::Relaxed))
    }
}

impl Drop for Moving<'_> {
    fn drop(&mut self) {
        self.all.fetch_sub(self.own, Ordering::Relaxed);
    }
}

fn meta(found: &opendal::Metadata) -> Meta {
    Meta { size: found.content_length(), modified: found.last_modified().map(SystemTime::from) }
}

/// Reads an object or a part of it, never more than `most` bytes.
async fn stream(op: &Operator, path: &str, part: Option<(u64, u64)>, most: u64) -> Answer<Option<Vec<u8>>> {
    let read = async {
        let reader = op.reader(path).await?;
        let mut stream = match part {
            Some((from, length)) => reader.into_stream(from..from + length).await?,
            None => reader.into_stream(..).await?,
        };
        let mut bytes = Vec::new();
        while let Some(buffer) = stream.try_next().await? {
            for chunk in buffer {
                bytes.extend_from_slice(&chunk);
            }
            if bytes.len() as u64 > most {
                return Ok(None);
            }
        }
        Ok(Some(bytes))
    };
    match read.await {
        Ok(Some(bytes)) => Ok(Some(bytes)),
        Ok(None) => Err(Trouble::content("it sends more than was asked for")),
        Err(e) => match opendal::Error::kind(&e) {
            ErrorKind::NotFound => Ok(None),
            // A pack that was cut short.
            ErrorKind::RangeNotSatisfied => Ok(Some(Vec::new())),
            _ => Err(describe(&e)),
        },
    }
}

fn is_not_implemented(error: &opendal::Error) -> bool {
    let text = error.to_string();
    error.kind() == ErrorKind::Unsupported || text.contains("501") || text.contains("NotImplemented")
}

/// Whether something was not written because it is there. GitHub's cache says
/// so in two ways, also of what was only begun.
fn is_there(error: &opendal::Error) -> bool {
    matches!(error.kind(), ErrorKind::ConditionNotMatch | ErrorKind::AlreadyExists)
        || error.message() == "create cache entry returns non-ok"
}

/// An error in a few words; its context may hold what nobody should read.
fn describe(error: &opendal::Error) -> Trouble {
    match error.kind() {
        ErrorKind::PermissionDenied => Trouble::new("access is denied"),
        ErrorKind::RateLimited => Trouble::new("it says that there are too many requests"),
        ErrorKind::NotFound => Trouble::new("it is not there"),
        ErrorKind::Unsupported => Trouble::new("it can't do that"),
        kind => {
            let message = error.message();
            // Services put the whole answer into it.
            let short = message.split(['{', '\n']).next().unwrap_or_default().trim();
            match short {
                "send http request" => Trouble::new("it can't be reached, or broke off"),
                "io operation timeout reached" | "operation timeout reached" => {
                    Trouble::new("it does not answer in time")
                }
                answer if answer.starts_with("it answers") => Trouble::new(answer),
                "" => Trouble::new(format!("it failed: {kind}")),
                short => Trouble::new(format!("it failed: {short}")),
            }
        }
    }
}

/// Services that live as long as this process, by their name.
static MEMORY: OnceLock<Mutex<HashMap<String, Operator>>> = OnceLock::new();

/// A service to read from, and the same to write to.
fn operators(spec: &Spec, rest: &Arc<Rest>, faults: &Arc<Faults>) -> Result<(Operator, Operator), String> {
    let mut options = spec.options.clone();
    let fail = |e: opendal::Error| format!("{}: {}", spec.label, e.message());
    let root = options.get("root").cloned();
    let plain = match spec.kind {
        Kind::Local => {
            let root = std::path::absolute(root.unwrap_or_default()).map_err(|e| e.to_string())?;
            let root = root.to_string_lossy().into_owned();
            // What is half written is never seen.
            options.insert("atomic_write_dir".into(), format!("{root}/.unfinished"));
            options.insert("root".into(), root);
            Operator::from_iter::<services::Fs>(options)
        }
        Kind::S3 => {
            if !options.contains_key("region") && options.contains_key("endpoint") {
                // What is no S3 of Amazon's has no regions, and needs one.
                options.insert("region".into(), "us-east-1".into());
            }
            if options.contains_key("skip_signature") {
                options.insert("disable_config_load".into(), "true".into());
            }
            Operator::from_iter::<services::S3>(options)
        }
        Kind::Gcs => Operator::from_iter::<services::Gcs>(options),
        Kind::Azblob => Operator::from_iter::<services::Azblob>(options),
        Kind::Webdav => Operator::from_iter::<services::Webdav>(options),
        Kind::Gha => Operator::from_iter::<services::Ghac>(options),
        Kind::Memory | Kind::Registry => {
            let all = MEMORY.get_or_init(Mutex::default);
            let mut all = all.lock().unwrap_or_else(PoisonError::into_inner);
            let name = root.unwrap_or_default();
            if let Some(op) = all.get(&name) {
                return Ok((op.clone(), op.clone()));
            }
            let op = Operator::from_iter::<services::Memory>([]).map_err(fail)?;
            all.insert(name, op.clone());
            return Ok((op.clone(), op));
        }
    };
    let op = plain.map_err(fail)?;
    let context = op.context().clone();
    let courier = opendal::HttpTransporter::new(Courier::new(rest.clone())?);
    // All tries together take no longer than it may delay a build.
    let each = spec.timeout / (RETRIES as u32 + 1);
    let op = op.with_context(context.with_http_transport(courier));
    let retry = || {
        let faults = faults.clone();
        RetryLayer::new()
            .with_notify(move |event: opendal::layers::RetryEvent<'_>| faults.add(describe(event.err).why))
            .with_max_times(RETRIES)
            .with_min_delay(Duration::from_millis(200))
            .with_max_delay(Duration::from_secs(2))
            .with_jitter()
    };
    let timeout = |stall| TimeoutLayer::new().with_timeout(SMALL.min(each)).with_io_timeout(stall);
    let limit = || ConcurrentLimitLayer::new(AT_ONCE);
    let stall = STALL.min(each);
    // A whole pack is written in one step, which is not interrupted as long
    // as it may take beside others.
    let long = stall + Duration::from_secs(AT_ONCE as u64 * LARGEST / SLOWEST);
    let write = op.clone().layer(timeout(long));
    let write = match spec.kind {
        // What ends a write there begins another one when it is tried again,
        // and what was begun can't be replaced.
        Kind::Gha => write.layer(limit()),
        _ => write.layer(retry()).layer(limit()),
    };
    Ok((op.layer(timeout(stall)).layer(retry()).layer(limit()), write))
}

/// Remotes that are shared by many tasks.
pub type Shared = Arc<Remote>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cache_is_known_however_it_is_named() {
        let place = |text: &str| Remote::open(Spec::parse(text, false).unwrap()).unwrap().place("main");
        let s3 = "type=s3,bucket=b,region=r,access_key_id=a,secret_access_key=s";
        let same = |a: &str, b: &str| assert_eq!(place(a), place(b));
        same(&format!("{s3},prefix=p"), &format!("{s3},prefix=/p/,mode=max,timeout=1s"));
        same("type=local,src=/tmp/./c/", "type=local,src=/tmp/c");
        assert_ne!(place(&format!("{s3},prefix=p")), place(&format!("{s3},prefix=q")));
        assert_ne!(place("type=memory,id=a"), place("type=memory,id=b"));
    }
}

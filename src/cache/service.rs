//! Opens the storage services, with timeouts and retries, and translates their
//! errors.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, SystemTime};

use futures_util::TryStreamExt;
use opendal::layers::{ConcurrentLimitLayer, RetryLayer, TimeoutLayer};
use opendal::{ErrorKind, Operator, services};

use super::object::{Answer, Meta, Trouble};
use super::spec::{Kind, Spec};
use super::transport::{Faults, RateLimit, Transport};

/// Timeout of a small request, before it is retried.
const SMALL: Duration = Duration::from_secs(10);
/// Timeout of a transfer without a byte, before it is retried.
const STALL: Duration = Duration::from_secs(15);
/// Retries of a request.
pub(super) const RETRIES: usize = 2;
/// Parallel requests.
pub(super) const AT_ONCE: usize = 8;
/// Minimum speed of all transfers together, in bytes a second. A slower cache
/// is not worth using.
pub(super) const SLOWEST: u64 = 1_000_000;
/// Size of the largest usual pack, in bytes.
const LARGEST: u64 = 17 << 20;

pub(super) fn is_not_implemented(error: &opendal::Error) -> bool {
    let text = error.to_string();
    error.kind() == ErrorKind::Unsupported || text.contains("status: 501") || text.contains("NotImplemented")
}

/// Whether a write failed because the object exists. GitHub's cache reports
/// this in two ways, also for an object that was never finished.
pub(super) fn is_there(error: &opendal::Error) -> bool {
    matches!(error.kind(), ErrorKind::ConditionNotMatch | ErrorKind::AlreadyExists)
        || error.message() == "create cache entry returns non-ok"
}

/// Describes an error in a few words, without its context, which may contain
/// secrets.
pub(super) fn describe(error: &opendal::Error) -> Trouble {
    match error.kind() {
        ErrorKind::PermissionDenied => Trouble::new("access denied"),
        ErrorKind::RateLimited => Trouble::new("too many requests"),
        ErrorKind::NotFound => Trouble::new("not found"),
        ErrorKind::Unsupported => Trouble::new("not supported by this cache"),
        kind => {
            let message = error.message();
            // Services put the whole response into the message.
            let short = message.split(['{', '\n']).next().unwrap_or_default().trim();
            match short {
                "send http request" => Trouble::new("the server can't be reached, or broke the connection"),
                "io operation timeout reached" | "operation timeout reached" => {
                    Trouble::new("no response in time")
                }
                answer if answer.starts_with("HTTP status") => Trouble::new(answer),
                "" => Trouble::new(format!("request failed: {kind}")),
                short => Trouble::new(format!("request failed: {short}")),
            }
        }
    }
}

/// In-memory services of this process, by name.
static MEMORY: OnceLock<Mutex<HashMap<String, Operator>>> = OnceLock::new();

/// Opens a service, once for small requests and reads, and once for writing
/// packs.
pub(super) fn operators(
    spec: &Spec,
    rate_limit: &Arc<RateLimit>,
    faults: &Arc<Faults>,
) -> Result<(Operator, Operator), String> {
    let mut options = spec.options.clone();
    let fail = |e: opendal::Error| format!("{}: {}", spec.label, e.message());
    let root = options.get("root").cloned();
    let plain = match spec.kind {
        Kind::Local => {
            let root = std::path::absolute(root.unwrap_or_default()).map_err(|e| e.to_string())?;
            let root = root.to_string_lossy().into_owned();
            // Readers never see a partly written object.
            options.insert("atomic_write_dir".into(), format!("{root}/.unfinished"));
            options.insert("root".into(), root);
            Operator::from_iter::<services::Fs>(options)
        }
        Kind::S3 => {
            if !options.contains_key("region") && options.contains_key("endpoint") {
                // Other S3 services have no regions, but the client needs one.
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
    let transport = opendal::HttpTransporter::new(Transport::new(rate_limit.clone())?);
    // All tries together take no longer than the retry budget.
    let each = spec.timeout / (RETRIES as u32 + 1);
    let op = op.with_context(context.with_http_transport(transport));
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
    // A whole pack is written in one step. Its timeout allows for the other
    // transfers beside it.
    let long = stall + Duration::from_secs(AT_ONCE as u64 * LARGEST / SLOWEST);
    let write = op.clone().layer(timeout(long));
    let write = match spec.kind {
        // A retry would begin a second entry, and an entry that was begun can't
        // be replaced.
        Kind::Gha => write.layer(limit()),
        _ => write.layer(retry()).layer(limit()),
    };
    Ok((op.layer(timeout(stall)).layer(retry()).layer(limit()), write))
}

pub(super) fn meta(found: &opendal::Metadata) -> Meta {
    Meta { size: found.content_length(), modified: found.last_modified().map(SystemTime::from) }
}

/// Lists a directory and all directories below it. The library does that by
/// itself, but its own recursion ends without an error where a request fails and
/// is tried again: garbage collection would then delete what is not in the list.
pub(super) async fn walk(op: &Operator, top: String) -> opendal::Result<Vec<opendal::Entry>> {
    let (mut files, mut dirs) = (Vec::new(), vec![top]);
    while let Some(dir) = dirs.pop() {
        for entry in op.list(&dir).await? {
            match entry.metadata().is_dir() {
                // A directory lists itself as well.
                true if entry.path() != dir => dirs.push(entry.path().to_owned()),
                true => {}
                false => files.push(entry),
            }
        }
    }
    Ok(files)
}

/// Reads an object or a range of it, at most `most` bytes.
pub(super) async fn stream(
    op: &Operator,
    path: &str,
    part: Option<(u64, u64)>,
    most: u64,
) -> Answer<Option<Vec<u8>>> {
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
        Ok(None) => Err(Trouble::content("the cache sent more than requested")),
        Err(e) => match opendal::Error::kind(&e) {
            ErrorKind::NotFound => Ok(None),
            // The pack is shorter than expected.
            ErrorKind::RangeNotSatisfied => Ok(Some(Vec::new())),
            _ => Err(describe(&e)),
        },
    }
}

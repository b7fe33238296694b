//! The services below: how each is opened, with what patience, and what its
//! errors mean.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use opendal::layers::{ConcurrentLimitLayer, RetryLayer, TimeoutLayer};
use opendal::{ErrorKind, Operator, services};

use super::courier::{Courier, Faults, Rest};
use super::object::Trouble;
use super::spec::{Kind, Spec};

/// How long a small request may take, before it is tried again.
const SMALL: Duration = Duration::from_secs(10);
/// How long a transfer may go without a byte, before it is tried again.
const STALL: Duration = Duration::from_secs(15);
/// How often a request is tried again.
pub(super) const RETRIES: usize = 2;
/// How many requests are under way at once.
pub(super) const AT_ONCE: usize = 8;
/// If all that is under way moves slower than this, a cache is not worth its
/// while, in bytes a second.
pub(super) const SLOWEST: u64 = 1_000_000;
/// The largest pack, in bytes.
const LARGEST: u64 = 17 << 20;

pub(super) fn is_not_implemented(error: &opendal::Error) -> bool {
    let text = error.to_string();
    error.kind() == ErrorKind::Unsupported || text.contains("status: 501") || text.contains("NotImplemented")
}

/// Whether something was not written because it is there. GitHub's cache says
/// so in two ways, also of what was only begun.
pub(super) fn is_there(error: &opendal::Error) -> bool {
    matches!(error.kind(), ErrorKind::ConditionNotMatch | ErrorKind::AlreadyExists)
        || error.message() == "create cache entry returns non-ok"
}

/// An error in a few words; its context may hold what nobody should read.
pub(super) fn describe(error: &opendal::Error) -> Trouble {
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
pub(super) fn operators(
    spec: &Spec,
    rest: &Arc<Rest>,
    faults: &Arc<Faults>,
) -> Result<(Operator, Operator), String> {
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

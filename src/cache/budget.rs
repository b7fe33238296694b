//! The retry budget of a cache: how long a build waits for it altogether.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::object::{Answer, Trouble};
use super::service::{RETRIES, SLOWEST};
use super::transport::{Faults, RateLimit};

/// Response time that does not count against the retry budget.
const PROMPT: Duration = Duration::from_secs(2);

/// Counts the requests to a cache, and ends its use when the budget is spent.
pub(super) struct Budget {
    /// The name of the cache in messages.
    label: String,
    /// The rest of the retry budget.
    left: Mutex<Duration>,
    /// Size of the current transfers, in bytes.
    moving: AtomicU64,
    gone: AtomicBool,
    rate_limit: Arc<RateLimit>,
    faults: Arc<Faults>,
    requests: AtomicU64,
}

impl Budget {
    pub(super) fn new(
        label: String,
        timeout: Duration,
        rate_limit: Arc<RateLimit>,
        faults: Arc<Faults>,
    ) -> Self {
        Self {
            label,
            left: Mutex::new(timeout),
            moving: AtomicU64::new(0),
            gone: AtomicBool::new(false),
            rate_limit,
            faults,
            requests: AtomicU64::new(0),
        }
    }

    /// Whether the budget is spent.
    pub(super) fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Relaxed)
    }

    /// The number of requests.
    pub(super) fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }

    pub(super) fn add_request(&self) {
        self.requests.fetch_add(1, Ordering::Relaxed);
    }

    /// Runs a request that transfers `bytes`, and subtracts failures and slow
    /// responses from the retry budget. Retries only after a rate limit; the
    /// layers below retry other failures.
    pub(super) async fn guard<T, F: Future<Output = Answer<T>>>(
        &self,
        bytes: u64,
        work: impl Fn() -> F,
    ) -> Answer<T> {
        let gone = || Trouble { known: true, ..Trouble::new(format!("{} is no longer used", self.label)) };
        let mut tries = 0;
        loop {
            if self.is_gone() {
                return Err(gone());
            }
            let start = Instant::now();
            // Other transfers slow this one down.
            let beside = Moving::add(&self.moving, bytes);
            let left = *self.left.lock().unwrap_or_else(PoisonError::into_inner);
            let rest = self.rate_limit.left().unwrap_or_default();
            let limit = left + Duration::from_secs(beside.all() / SLOWEST);
            let result = if rest > left {
                tries = RETRIES;
                let (rest, left) = (rest.as_secs(), left.as_secs());
                Err(Trouble::new(format!(
                    "rate limited: Retry-After is {rest} s, only {left} s of the retry budget are left"
                )))
            } else {
                tokio::time::sleep(rest).await;
                self.add_request();
                let late = |_| Trouble::new(format!("no response within {} s", limit.as_secs()));
                tokio::time::timeout(limit.saturating_sub(rest), work())
                    .await
                    .unwrap_or_else(|e| Err(late(e)))
            };
            // A slow response also costs budget, beyond the time that it may
            // take.
            let fair = PROMPT + Duration::from_secs_f64(beside.all() as f64 / SLOWEST as f64);
            drop(beside);
            if result.is_ok() {
                let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
                *left = left.saturating_sub(start.elapsed().saturating_sub(fair));
                if left.is_zero() && !self.gone.swap(true, Ordering::Relaxed) {
                    self.faults.add("it is too slow, and this build no longer uses it".into());
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
                    // Only the first failure after the end of the budget gives
                    // the reason.
                    let first = !self.gone.swap(true, Ordering::Relaxed);
                    return Err(if first { trouble } else { gone() });
                }
            }
            tries += 1;
            if tries > RETRIES || self.rate_limit.left().is_none() {
                return Err(trouble);
            }
            self.faults.add(trouble.why);
        }
    }
}

/// Counts bytes as being transferred, until it is dropped.
struct Moving<'a> {
    all: &'a AtomicU64,
    own: u64,
    /// All bytes in flight when these began, including these.
    begun: u64,
}

impl<'a> Moving<'a> {
    fn add(all: &'a AtomicU64, own: u64) -> Self {
        Self { all, own, begun: all.fetch_add(own, Ordering::Relaxed) + own }
    }

    /// The largest known number of bytes in flight since these began.
    fn all(&self) -> u64 {
        self.begun.max(self.all.load(Ordering::Relaxed))
    }
}

impl Drop for Moving<'_> {
    fn drop(&mut self) {
        self.all.fetch_sub(self.own, Ordering::Relaxed);
    }
}

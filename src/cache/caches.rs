//! All caches of a build, asked one after the other.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use super::entry::{self, Asked, Build, Signed};
use super::object::{Object, Trouble};
use super::remote::Remote;
use super::service;
use super::sign::{Signer, Trust};
use crate::digest::{Description, Key};
use crate::event::{Event, Sink};

/// A state that a cache has.
#[derive(Debug, Clone)]
pub struct Hit {
    /// Which cache, in the order in which they are asked.
    pub tier: usize,
    /// The domain that it was found in.
    pub domain: String,
    /// The state, and the disks below it.
    pub chain: Vec<Signed>,
}

/// Where nothing is replaced, the note of a build has the day in its name, and
/// is looked for as many days back as GitHub keeps what nobody reads.
const NOTES: u64 = 8;

/// All caches of a build.
#[derive(Debug, Default)]
pub struct Caches {
    /// Where states are looked for, the nearest first.
    pub from: Vec<Arc<Remote>>,
    /// Where they are sent.
    pub to: Vec<Arc<Remote>>,
    /// Who is believed.
    pub trust: Trust,
    /// What is signed with.
    pub signer: Option<Signer>,
    /// What the project is called.
    pub name: String,
    /// Where it is noted how young records were that were seen.
    pub seen: Option<PathBuf>,
    pub(super) refused: Refused,
    /// States that a cache has and could not give, by its place and domain:
    /// they are sent anew to there.
    pub(super) broken: Mutex<BTreeSet<(String, Key)>>,
    /// Where they were, by tier and domain: they are not looked for there
    /// again.
    pub(super) failed: Mutex<BTreeSet<(usize, String, Key)>>,
}

/// Records that were found and are not used: told once for each reason.
#[derive(Debug, Default)]
pub(super) struct Refused(Mutex<BTreeMap<(String, String), (String, usize)>>);

impl Refused {
    pub(super) fn add(&self, cache: &str, node: &str, why: &str) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = all.entry((cache.to_owned(), why.to_owned())).or_insert_with(|| (node.to_owned(), 0));
        entry.1 += 1;
    }

    pub(super) fn tell(&self, sink: &Sink) {
        let all = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        for ((cache, why), (node, count)) in all {
            let what = match count {
                1 => format!("the record of {node} is"),
                n => format!("the records of {node} and {} more are", n - 1),
            };
            sink(Event::Notice { text: format!("{cache}: {what} not used: {why}") });
        }
    }
}

impl Caches {
    /// None yet, but those who are believed, what is signed with, and what
    /// the project is called.
    pub fn new(trust: Trust, signer: Option<Signer>, name: String) -> Self {
        Self { trust, signer, name, ..Self::default() }
    }

    /// Looks for states; what is found may be used, but for what is damaged.
    pub async fn find(&self, wanted: &[(Key, String)], sink: &Sink) -> BTreeMap<Key, Hit> {
        use futures_util::StreamExt;
        let asked =
            wanted.iter().map(|(key, name)| async move { (*key, self.find_one(key, name, sink).await) });
        let found = futures_util::stream::iter(asked).buffer_unordered(service::AT_ONCE);
        let found = found.filter_map(|(key, hit)| async move { Some((key, hit?)) }).collect().await;
        self.refused.tell(sink);
        found
    }

    pub(super) async fn find_one(&self, key: &Key, name: &str, sink: &Sink) -> Option<Hit> {
        for (tier, remote) in self.from.iter().enumerate() {
            for domain in &remote.spec.domains {
                let place = (tier, domain.clone(), *key);
                if self.failed.lock().unwrap_or_else(PoisonError::into_inner).contains(&place) {
                    continue;
                }
                match self.record(remote, domain, key).await {
                    Ok(Some(chain)) if self.is_put_back(remote, &chain[0]) => {
                        let why = "it is older than one that this machine has seen in its place";
                        self.refused.add(&remote.spec.label, name, why);
                        self.set_broken(remote, domain, key);
                    }
                    Ok(Some(chain)) => return Some(Hit { tier, domain: domain.clone(), chain }),
                    Ok(None) => {}
                    Err(Refusal::Record(why)) => {
                        self.refused.add(&remote.spec.label, name, &why);
                        self.set_broken(remote, domain, key);
                    }
                    Err(Refusal::Cache(trouble)) => {
                        if !trouble.known {
                            tell(sink, remote, &trouble.why);
                        }
                        break;
                    }
                }
            }
        }
        None
    }

    /// Whether a record is older than one that was seen in the same place:
    /// then somebody put back what its writer had replaced.
    pub(super) fn is_put_back(&self, remote: &Remote, own: &Signed) -> bool {
        let Some(dir) = &self.seen else { return false };
        let place = format!("{}\n{}", remote.place(&own.entry.domain), own.entry.state.key);
        let path = dir.join(crate::digest::Digest::of(place.as_bytes()).to_string());
        let seen: u64 = std::fs::read_to_string(&path).ok().and_then(|t| t.parse().ok()).unwrap_or_default();
        if own.entry.written > seen {
            // Losing it costs a warning.
            let _ = crate::store::replace_note(&path, own.entry.written.to_string().as_bytes());
        }
        own.entry.written < seen
    }

    /// What a cache knows of a state and its writer may be believed for.
    pub(super) async fn record(
        &self,
        remote: &Remote,
        domain: &str,
        key: &Key,
    ) -> Result<Option<Vec<Signed>>, Refusal> {
        let object = Object::Record { domain: domain.to_owned(), key: *key };
        let bytes = match remote.get(&object, entry::MAX_STORED).await {
            Ok(Some(bytes)) => bytes,
            Ok(None) => return Ok(None),
            Err(trouble) if trouble.content => return Err(Refusal::Record(trouble.why)),
            Err(trouble) => return Err(Refusal::Cache(trouble)),
        };
        let asked = Asked {
            key: *key,
            domain,
            domains: &remote.spec.domains,
            trust: &self.trust,
            now: now(),
            max_age: remote.spec.max_age,
        };
        entry::read(&bytes, &asked).map(Some).map_err(Refusal::Record)
    }

    /// What nodes of these names came from when somebody last sent them, with
    /// the names of the caches that say so.
    pub async fn previous(&self, names: &[&str]) -> BTreeMap<String, Description> {
        /// A few say what changed; the others follow from them.
        const MOST: usize = 16;
        let mut found = BTreeMap::new();
        for remote in &self.from {
            for build in self.builds(remote).await {
                for name in names.iter().take(MOST) {
                    let Some(key) = build.nodes.get(*name).filter(|_| !found.contains_key(*name)) else {
                        continue;
                    };
                    // A build may have used what was in another domain.
                    for domain in &remote.spec.domains {
                        if let Ok(Some(chain)) = self.record(remote, domain, key).await
                            && let Some(signed) = chain.into_iter().next()
                        {
                            found.insert((*name).to_owned(), signed.entry.state.description);
                            break;
                        }
                    }
                }
            }
        }
        found
    }

    /// The last builds of this project, the nearest domain first.
    pub(super) async fn builds(&self, remote: &Remote) -> Vec<Build> {
        let mut builds = Vec::new();
        for domain in &remote.spec.domains {
            for name in self.notes_in(remote) {
                let object = Object::Build { domain: domain.clone(), name: name.clone() };
                // These only explain: what can't be read explains nothing.
                if let Ok(Some(bytes)) = remote.get(&object, entry::MAX_STORED).await
                    && let Ok(build) = Build::read(&bytes, domain, &name, &self.trust)
                {
                    builds.push(build);
                    break;
                }
            }
        }
        builds
    }

    pub(super) fn set_broken(&self, remote: &Remote, domain: &str, key: &Key) {
        let place = (remote.place(domain), *key);
        self.broken.lock().unwrap_or_else(PoisonError::into_inner).insert(place);
    }

    pub(super) fn is_broken(&self, remote: &Remote, domain: &str, key: &Key) -> bool {
        let place = (remote.place(domain), *key);
        self.broken.lock().unwrap_or_else(PoisonError::into_inner).contains(&place)
    }

    /// What the note of the last build may be called, the newest first, and
    /// how a new one is.
    pub(super) fn notes_in(&self, remote: &Remote) -> Vec<String> {
        let name = remote.spec.name.as_deref().unwrap_or(&self.name);
        if remote.replaces() {
            return vec![name.to_owned()];
        }
        let today = now() / 86_400;
        (0..NOTES).map(|ago| format!("{name}.{}", today.saturating_sub(ago))).collect()
    }
}

pub(super) enum Refusal {
    /// The record is there and not used.
    Record(String),
    /// The cache does not answer.
    Cache(Trouble),
}

pub(super) fn tell(sink: &Sink, remote: &Remote, why: &str) {
    let end = if remote.is_gone() { "; it is not used any more in this build" } else { "" };
    sink(Event::Notice { text: format!("{}: {why}{end}", remote.spec.label) });
}

/// Seconds since 1970.
pub(super) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

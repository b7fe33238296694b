//! All caches of a build, in the order in which they are asked.

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
    /// Index of the cache, in the order in which they are asked.
    pub tier: usize,
    /// The trust domain that it was found in.
    pub domain: String,
    /// The entries of the state and of the disks below it.
    pub chain: Vec<Signed>,
}

/// Days to look back for the list of a project's last build. GitHub's cache
/// can't replace an object, so the name has the day in it. The number is how
/// long GitHub keeps an object that no one reads.
const NOTES: u64 = 8;

/// All caches of a build.
#[derive(Debug, Default)]
pub struct Caches {
    /// Caches to read from, the nearest first.
    pub from: Vec<Arc<Remote>>,
    /// Caches to write to.
    pub to: Vec<Arc<Remote>>,
    /// The trusted keys.
    pub trust: Trust,
    /// The signing key.
    pub signer: Option<Signer>,
    /// The name of the project.
    pub name: String,
    /// The directory that remembers the newest time of each record that this
    /// machine has seen.
    pub seen: Option<PathBuf>,
    pub(super) refused: Refused,
    /// Records that can't be used, by place and key. An upload to the same
    /// place replaces them.
    pub(super) broken: Mutex<BTreeSet<(String, Key)>>,
    /// Failed downloads, by tier, domain and key. This run does not try them
    /// again.
    pub(super) failed: Mutex<BTreeSet<(usize, String, Key)>>,
}

/// Records that were found and ignored: told once for each reason.
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
                1 => format!("ignored the record of {node}"),
                n => format!("ignored the records of {node} and {} more", n - 1),
            };
            sink(Event::Notice { text: format!("{cache}: {what}: {why}") });
        }
    }
}

impl Caches {
    /// Makes an empty list of caches, with the trusted keys, the signing key
    /// and the name of the project.
    pub fn new(trust: Trust, signer: Option<Signer>, name: String) -> Self {
        Self { trust, signer, name, ..Self::default() }
    }

    /// Looks for states in all caches. The signatures of a hit are checked, its
    /// packs are not.
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

    /// Whether this machine has seen a newer record in the same place: then
    /// someone replaced the new record with the old one.
    pub(super) fn is_put_back(&self, remote: &Remote, own: &Signed) -> bool {
        let Some(dir) = &self.seen else { return false };
        let place = format!("{}\n{}", remote.place(&own.entry.domain), own.entry.state.key);
        let path = dir.join(crate::digest::Digest::of(place.as_bytes()).to_string());
        let seen: u64 = std::fs::read_to_string(&path).ok().and_then(|t| t.parse().ok()).unwrap_or_default();
        if own.entry.written > seen {
            // If this note is lost, an old record is not detected.
            let _ = crate::store::replace_note(&path, own.entry.written.to_string().as_bytes());
        }
        own.entry.written < seen
    }

    /// Reads the record of a state and checks its signatures. `None` if the
    /// cache has no record.
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

    /// Finds the descriptions of nodes with these names in the last builds that
    /// the caches know.
    pub async fn previous(&self, names: &[&str]) -> BTreeMap<String, Description> {
        /// A few nodes explain what changed; the others follow from them.
        const MOST: usize = 16;
        let mut found = BTreeMap::new();
        for remote in &self.from {
            for build in self.builds(remote).await {
                for name in names.iter().take(MOST) {
                    let Some(key) = build.nodes.get(*name).filter(|_| !found.contains_key(*name)) else {
                        continue;
                    };
                    // The build may have used states of another domain.
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

    /// Reads the last builds of this project, the nearest domain first.
    pub(super) async fn builds(&self, remote: &Remote) -> Vec<Build> {
        let mut builds = Vec::new();
        for domain in &remote.spec.domains {
            for name in self.notes_in(remote) {
                let object = Object::Build { domain: domain.clone(), name: name.clone() };
                // Builds only explain changes, so an unreadable one is skipped.
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

    /// Names that the list of the last build may have, the newest first. A new
    /// list gets the first one.
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
    /// The record exists, and must not be used.
    Record(String),
    /// The cache does not answer.
    Cache(Trouble),
}

pub(super) fn tell(sink: &Sink, remote: &Remote, why: &str) {
    let end = if remote.is_gone() { "; this build no longer uses it" } else { "" };
    sink(Event::Notice { text: format!("{}: {why}{end}", remote.spec.label) });
}

/// Returns the current time, in seconds since 1970.
pub(super) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

//! A cache: objects by name, with a retry budget.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use bytes::Bytes;
use opendal::{ErrorKind, Operator};

use super::budget::Budget;
use super::entry::Pack;
use super::kind::Says;
use super::object::{Answer, Meta, Object, Trouble, root};
use super::registry::Registry;
use super::service::{describe, is_not_implemented, is_there, meta, operators, stream, walk};
use super::spec::{Kind, Spec};
use super::transport::{Faults, RateLimit};
use crate::store::StateId;

/// Typical size of a record, in bytes.
const RECORD: u64 = 250_000;

enum Backend {
    /// One operator for small objects and ranges, and one with a longer timeout
    /// for writing packs.
    Objects(Operator, Operator),
    Registry(Registry),
}

/// A cache that is in use.
pub struct Remote {
    /// Its spec.
    pub spec: Spec,
    backend: Backend,
    budget: Budget,
    faults: Arc<Faults>,
    down: AtomicU64,
    up: AtomicU64,
}

impl std::fmt::Debug for Remote {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Remote({})", self.spec.label)
    }
}

impl Remote {
    /// Opens a cache. Sends no request yet.
    ///
    /// # Errors
    ///
    /// The mistake in the spec.
    pub fn open(spec: Spec) -> Result<Self, String> {
        let (rate_limit, faults) = (Arc::new(RateLimit::default()), Arc::new(Faults::default()));
        let backend = match spec.kind {
            Kind::Registry => Backend::Registry(Registry::open(&spec, faults.clone())?),
            _ => {
                let (read, write) = operators(&spec, &rate_limit, &faults)?;
                Backend::Objects(read, write)
            }
        };
        Ok(Self {
            budget: Budget::new(spec.label.clone(), spec.timeout, rate_limit, faults.clone()),
            faults,
            spec,
            backend,
            down: AtomicU64::new(0),
            up: AtomicU64::new(0),
        })
    }

    /// Whether the retry budget is spent, so that the cache is no longer used.
    pub fn is_gone(&self) -> bool {
        self.budget.is_gone()
    }

    /// Returns the failures since the last call, and how often each occurred.
    pub fn faults(&self) -> BTreeMap<String, usize> {
        self.faults.take()
    }

    /// Whether a write replaces an existing object. GitHub's cache keeps the
    /// first one.
    pub(super) fn replaces(&self) -> bool {
        self.spec.kind != Kind::Gha
    }

    /// Identifies a domain of this cache, however its spec is written.
    pub(super) fn place(&self, domain: &str) -> String {
        let says_where = |says| matches!(says, Says::Place | Says::Address | Says::Url);
        let fields = self.spec.kind.fields().iter().filter(|field| says_where(field.says));
        let options: BTreeSet<&str> = fields.map(|field| field.option).collect();
        let mut place = self.spec.kind.word().to_owned();
        for name in options {
            let value = self.spec.option(name).unwrap_or_default();
            let value = match self.spec.kind {
                Kind::Local => std::path::absolute(value)
                    .unwrap_or_default()
                    .components()
                    .collect::<PathBuf>()
                    .display()
                    .to_string(),
                _ => value.trim_matches('/').to_owned(),
            };
            place.push_str(&format!("\n{name}={value}"));
        }
        format!("{place}\n{domain}")
    }

    /// Adds a failure that does not fail the operation.
    pub(super) fn add_fault(&self, why: String) {
        self.faults.add(why);
    }

    /// Returns bytes read, bytes written, and the number of requests.
    pub fn moved(&self) -> (u64, u64, u64) {
        let load = |n: &AtomicU64| n.load(Ordering::Relaxed);
        (load(&self.down), load(&self.up), self.budget.requests())
    }

    /// Reads an object of at most `most` bytes; `None` if it does not exist.
    pub async fn get(&self, object: &Object, most: u64) -> Answer<Option<Vec<u8>>> {
        let bytes = self
            .budget
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

    /// Reads a range of a pack; `None` if the pack does not exist. The result
    /// may be shorter or damaged: the caller must check it.
    pub async fn range(&self, pack: &Pack, from: u64, length: u64) -> Answer<Option<Vec<u8>>> {
        let bytes = self
            .budget
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

    /// Writes an object. `needs` lists the packs of a record, for caches that
    /// keep only referenced blobs. Returns `false` if the object exists or was
    /// begun by another writer, and can't be replaced.
    pub async fn put(&self, object: &Object, bytes: impl Into<Bytes>, needs: &[Pack]) -> Answer<bool> {
        self.write(object, bytes.into(), needs, false).await
    }

    /// Writes an object that does not exist yet; `false` if it does. Without
    /// conditional writes, two simultaneous writers may both succeed.
    pub async fn put_new(&self, object: &Object, bytes: impl Into<Bytes>, needs: &[Pack]) -> Answer<bool> {
        let tells = match &self.backend {
            Backend::Objects(op, _) => op.info().capability().write_with_if_not_exists,
            Backend::Registry(_) => false,
        };
        // Some services ignore the condition, although they should not.
        if self.stat(object).await?.is_some() {
            return Ok(false);
        }
        self.write(object, bytes.into(), needs, tells).await
    }

    async fn write(&self, object: &Object, bytes: Bytes, needs: &[Pack], new: bool) -> Answer<bool> {
        let length = bytes.len() as u64;
        let written = self.budget.guard(length, || async {
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
                        // Some services do not implement conditions.
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

    /// Reads an object's metadata; `None` if it does not exist.
    pub async fn stat(&self, object: &Object) -> Answer<Option<Meta>> {
        self.budget
            .guard(0, || async {
                match &self.backend {
                    Backend::Objects(op, _) => match op.stat(&object.path()).await {
                        Ok(found) => Ok(Some(meta(&found))),
                        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
                        // The caller then reads the object instead.
                        Err(e) if e.kind() == ErrorKind::Unsupported => Ok(None),
                        Err(e) => Err(describe(&e)),
                    },
                    Backend::Registry(registry) => registry.stat(object).await,
                }
            })
            .await
    }

    /// Lists all objects in the cache.
    pub async fn list(&self) -> Answer<Vec<(Object, Meta)>> {
        // A long list takes many requests, so it has no timeout: only commands
        // for people use it.
        let op = match &self.backend {
            Backend::Objects(op, _) => op,
            Backend::Registry(registry) => return registry.list().await,
        };
        self.budget.add_request();
        let top = format!("{}/", root());
        let entries = match self.spec.kind {
            Kind::Local | Kind::Webdav => walk(op, top).await,
            _ => op.list_with(&top).recursive(true).await,
        };
        let entries = match entries {
            Ok(entries) => entries,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) if e.kind() == ErrorKind::Unsupported => {
                return Err(Trouble::new("this cache can't be listed"));
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

    /// Deletes an object, if it exists.
    pub async fn delete(&self, object: &Object) -> Answer<()> {
        self.budget
            .guard(0, || async {
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

    /// Refreshes an object's age, as if it were written now; `false` if it does
    /// not exist.
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
            // GitHub's cache counts the age from the last read.
            return Ok(self.stat(object).await?.is_some());
        }
        if !matches!(object, Object::Pack(_)) {
            // If the object has been replaced, a copy could bring the old one
            // back.
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
        // No service can copy an object onto itself.
        let aside = Object::Aside(StateId::new().to_string()).path();
        self.budget
            .guard(0, || async {
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
}

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

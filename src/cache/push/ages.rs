//! The ages of objects in a cache: a bucket's expiry rule may delete old ones.

use std::collections::HashMap;
use std::sync::Arc;

use crate::cache::entry::{Pack, Signed};
use crate::cache::object::{Meta, Object};
use crate::cache::remote::Remote;

/// Parallel requests.
const AT_ONCE: usize = 4;

/// Refreshes ages for an upload.
pub(super) struct Ages<'a> {
    remote: &'a Arc<Remote>,
    /// Old packs that were checked, and whether they exist.
    looked: HashMap<Pack, bool>,
}

impl<'a> Ages<'a> {
    pub(super) fn new(remote: &'a Arc<Remote>) -> Self {
        Self { remote, looked: HashMap::new() }
    }
}

impl Ages<'_> {
    /// Refreshes the age of what a bucket's expiry rule might delete. `false`
    /// if some of it is gone already. Only the writers of a domain refresh its
    /// records; `own` says that this is one of them.
    pub(super) async fn keep_young(&mut self, domain: &str, own: bool, chain: &[Signed]) -> bool {
        let Some(top) = chain.first() else { return false };
        let object = Object::Record { domain: domain.to_owned(), key: top.entry.state.key };
        let Ok(Some(meta)) = self.remote.stat(&object).await else { return true };
        if !self.is_old(meta) {
            return true;
        }
        // Packs first: a record must never be younger than its packs.
        let packs = Pack::distinct(chain.iter().flat_map(|s| s.entry.packs()));
        if !self.are_there(&packs).await {
            return false;
        }
        !own || self.touch(&object).await
    }

    fn is_old(&self, meta: Meta) -> bool {
        meta.age().is_some_and(|age| age >= self.remote.spec.touch_refresh)
    }

    /// Refreshes the age of an object. `false` if it does not exist. A missing
    /// right to do so is only noted.
    async fn touch(&self, object: &Object) -> bool {
        self.remote.touch(object).await.unwrap_or_else(|trouble| {
            if !trouble.known {
                self.remote.add_fault(format!("can't refresh the age of objects: {trouble}"));
            }
            true
        })
    }

    /// Whether packs exist, as far as the cache answers. Refreshes old ones.
    pub(super) async fn are_there(&mut self, all: &[Pack]) -> bool {
        use futures_util::StreamExt;
        let packs = Pack::distinct(all.iter().filter(|p| !self.looked.contains_key(p)));
        let this = &*self;
        let dependencies = packs.into_iter().map(|pack| async move {
            let object = Object::Pack(pack.clone());
            let there = match this.remote.stat(&object).await {
                Ok(Some(meta)) if meta.size == pack.size => !this.is_old(meta) || this.touch(&object).await,
                Ok(_) => false,
                Err(_) => return None,
            };
            Some((pack, there))
        });
        let looked: Vec<Option<(Pack, bool)>> =
            futures_util::stream::iter(dependencies).buffer_unordered(AT_ONCE).collect().await;
        self.looked.extend(looked.into_iter().flatten());
        !all.iter().any(|pack| self.looked.get(pack) == Some(&false))
    }

    /// Whether [`Self::are_there`] has found a pack.
    pub(super) fn has(&self, pack: &Pack) -> bool {
        self.looked.get(pack) == Some(&true)
    }
}

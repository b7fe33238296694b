//! What a build has of caches, and what it gives them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use futures_util::StreamExt;
use vimg_agent::protocol::Primitive;

use crate::cache::spec::Mode;
use crate::cache::{Caches, Hit, State};
use crate::digest::Key;
use crate::event::{Event, Sink};
use crate::graph::{Graph, NodeId, Work};
use crate::plan::{Plan, Reason};
use crate::store::{Last, Store};

/// How many states are taken over at once.
const AT_ONCE: usize = 3;

/// Where a build looks for states and sends them, and what came of it.
pub struct Caching<'a> {
    /// The caches.
    pub caches: &'a Caches,
    /// The store of this machine.
    pub store: &'a Store,
    /// Who is told.
    pub sink: &'a Sink,
    /// Whether what is handed this secret may leave the machine.
    pub may_leave: &'a (dyn Fn(&str) -> bool + Sync),
}

/// What was looked for in caches.
#[derive(Debug, Default)]
pub struct Looked {
    asked: BTreeSet<Key>,
    /// How many states came from each cache.
    hits: BTreeMap<String, usize>,
}

impl Looked {
    /// Whether anything came from a cache.
    pub(super) fn has_taken(&self) -> bool {
        !self.hits.is_empty()
    }
}

impl Caching<'_> {
    /// Takes what is needed and missing over from caches, from above: below
    /// what is there nothing is asked for. Says what is left to build; `looked`
    /// is added to, and what was asked for before is not asked for again.
    pub async fn obtain(&self, graph: &Graph, last: &Last, wanted: &[NodeId], looked: &mut Looked) -> Plan {
        let none = BTreeMap::new();
        let mut last = last.clone();
        loop {
            let plan = Plan::new(graph, self.store, &last, &none, wanted);
            let next = next(graph, &plan, &looked.asked, wanted);
            if next.is_empty() || self.caches.from.iter().all(|r| r.is_gone()) {
                return self.explained(graph, plan).await;
            }
            looked.asked.extend(next.iter().map(|(key, _)| *key));
            let hits = self.caches.find(&next, self.sink).await;
            let taken = next.iter().filter_map(|(key, name)| Some((key, name, hits.get(key)?)));
            let taken = futures_util::stream::iter(taken)
                .map(|(key, name, hit)| async move { (*key, hit.tier, self.take(key, name, hit).await) });
            for (key, tier, came) in taken.buffer_unordered(AT_ONCE).collect::<Vec<_>>().await {
                if came {
                    *looked.hits.entry(self.caches.from[tier].spec.label.clone()).or_default() += 1;
                    last.whole.remove(&key);
                } else {
                    // Another cache may have it.
                    looked.asked.remove(&key);
                }
            }
            // What lies below came along.
            last.whole.retain(|_, id| id.is_some());
        }
    }

    /// What would be taken over, without doing so.
    pub async fn preview(&self, graph: &Graph, last: &Last, wanted: &[NodeId]) -> Plan {
        let mut asked = BTreeSet::new();
        let mut cached = BTreeMap::new();
        loop {
            let plan = Plan::new(graph, self.store, last, &cached, wanted);
            let next = next(graph, &plan, &asked, wanted);
            if next.is_empty() {
                return self.explained(graph, plan).await;
            }
            asked.extend(next.iter().map(|(key, _)| *key));
            for (key, hit) in self.caches.find(&next, self.sink).await {
                cached.insert(key, self.caches.from[hit.tier].spec.label.clone());
            }
        }
    }

    async fn take(&self, key: &Key, name: &str, hit: &Hit) -> bool {
        let from = self.caches.from[hit.tier].spec.label.clone();
        match self.caches.fetch(name, hit, self.store, self.sink).await {
            Ok(fetched) => {
                (self.sink)(Event::Fetched {
                    node: name.to_owned(),
                    key: key.to_string(),
                    from,
                    seconds: fetched.seconds,
                    bytes: fetched.bytes,
                });
                true
            }
            Err(why) => {
                (self.sink)(Event::Notice { text: format!("{from}: {name} is not taken over: {why}") });
                false
            }
        }
    }

    /// Says what is different from what a cache has, where that is not known
    /// from here.
    async fn explained(&self, graph: &Graph, mut plan: Plan) -> Plan {
        let unknown = |reason: &Reason| matches!(reason, Reason::New | Reason::Parent(_));
        let names: Vec<&str> = plan
            .to_build()
            .filter(|(_, reason)| unknown(reason))
            .map(|(id, _)| graph.node(id).name.as_str())
            .collect();
        if !names.is_empty() && !self.caches.from.is_empty() {
            plan.explain(graph, &self.caches.previous(&names).await);
        }
        plan
    }

    /// Sends what is there to each cache that is written. The error names the
    /// first that insisted on getting it.
    pub async fn send(&self, graph: &Graph, wanted: &[NodeId]) -> Result<(), String> {
        let mut failed = None;
        for remote in &self.caches.to {
            let states = self.to_send(graph, wanted, remote.spec.mode);
            let nodes: BTreeMap<String, Key> = graph
                .ids()
                .map(|id| graph.node(id))
                .filter(|node| self.store.has(&node.key) || states.iter().any(|s| s.key == node.key))
                .map(|node| (node.name.clone(), node.key))
                .collect();
            match self.caches.push(remote, &states, &nodes, self.store, self.sink).await {
                Ok(pushed) => {
                    if let Some(first) = pushed.foreign.first() {
                        let text = format!(
                            "{}: another build of {first} is there; what lies on the one that is here is not sent",
                            remote.spec.label
                        );
                        (self.sink)(Event::Notice { text });
                    }
                    if let Some(first) = pushed.withheld.first() {
                        let text = format!(
                            "{}: {first} came from a cache of another domain and is not sent; nor is what lies on it",
                            remote.spec.label
                        );
                        (self.sink)(Event::Notice { text });
                    }
                    for name in &pushed.damaged {
                        let text = format!(
                            "the disk of {name} was damaged; it is not sent, and will be built again"
                        );
                        (self.sink)(Event::Notice { text });
                    }
                    self.summary(remote, 0, 0, pushed.sent);
                }
                Err(why) => {
                    let text = format!("{}: not all was sent: {why}", remote.spec.label);
                    if remote.spec.ignore_error {
                        (self.sink)(Event::Notice { text });
                    } else {
                        failed.get_or_insert(text);
                    }
                    self.summary(remote, 0, 0, 0);
                }
            }
        }
        failed.map_or(Ok(()), Err)
    }

    /// Says what the caches that are read gave.
    pub fn tell(&self, looked: &Looked) {
        let misses = looked.asked.len().saturating_sub(looked.hits.values().sum());
        for remote in &self.caches.from {
            let hits = looked.hits.get(&remote.spec.label).copied().unwrap_or_default();
            self.summary(remote, hits, misses, 0);
        }
    }

    fn summary(&self, remote: &Arc<crate::cache::remote::Remote>, hits: usize, misses: usize, sent: usize) {
        for (why, count) in remote.faults() {
            let times = if count == 1 { "once".to_owned() } else { format!("{count} times") };
            (self.sink)(Event::Notice { text: format!("{}: asked again {times}: {why}", remote.spec.label) });
        }
        let (down, up, requests) = remote.moved();
        let cache = remote.spec.label.clone();
        (self.sink)(Event::Cache { cache, hits, misses, sent, down, up, requests });
    }

    /// The states that a cache is to have, those below first.
    fn to_send(&self, graph: &Graph, wanted: &[NodeId], mode: Mode) -> Vec<State> {
        let mut all = BTreeSet::new();
        for id in wanted {
            all.extend(graph.chain(*id));
        }
        let mut held = BTreeSet::new();
        let mut secret = None;
        let mut states = Vec::new();
        for id in all {
            let node = graph.node(id);
            let kept = self.keeps_secret(&node.work);
            if kept.is_some() || node.parent.is_some_and(|p| held.contains(&p)) {
                held.insert(id);
                secret = secret.or(kept.map(|name| (node.name.clone(), name)));
                continue;
            }
            let seal = matches!(node.work, Work::Seal);
            if (mode == Mode::Max || !seal) && self.store.has(&node.key) {
                states.push(State { key: node.key, name: node.name.clone() });
            }
        }
        if let Some((node, name)) = secret {
            let text = format!(
                "{node} and what is built on it stay here: it is handed the secret `{name}`, \
                 which does not say `cache=#true`"
            );
            (self.sink)(Event::Notice { text });
        }
        states
    }

    /// A secret that a layer is handed and that may not leave.
    fn keeps_secret(&self, work: &Work) -> Option<String> {
        let Work::Layer(work) = work else { return None };
        let handed = work.steps.iter().filter_map(|step| match step {
            Primitive::Run(run) => Some(&run.secrets),
            _ => None,
        });
        handed.flatten().find(|name| !(self.may_leave)(name)).cloned()
    }
}

/// The nodes to ask for next: those that are to be built and were not
/// asked for, but none below one that may still be found.
fn next(graph: &Graph, plan: &Plan, asked: &BTreeSet<Key>, wanted: &[NodeId]) -> Vec<(Key, String)> {
    let mut open: BTreeSet<NodeId> = wanted.iter().copied().collect();
    for (id, _) in plan.to_build() {
        let node = graph.node(id);
        if asked.contains(&node.key) {
            open.extend(node.parent);
        }
    }
    let keys: BTreeMap<Key, String> = plan
        .to_build()
        .filter(|(id, _)| open.contains(id))
        .map(|(id, _)| (graph.node(id).key, graph.node(id).name.clone()))
        .filter(|(key, _)| !asked.contains(key))
        .collect();
    keys.into_iter().collect()
}

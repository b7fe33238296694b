//! Fetches states from caches before a build, and sends states after it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use futures_util::StreamExt;
use vimg_agent::protocol::Order;

use crate::cache::spec::Mode;
use crate::cache::{Caches, Hit, State};
use crate::digest::Key;
use crate::event::{Event, Sink};
use crate::graph::{Graph, NodeId, Work};
use crate::plan::{Plan, Reason};
use crate::store::{Last, Store};

/// How many states are fetched in parallel.
const AT_ONCE: usize = 3;

/// The caches of a build, and what it needs to use them.
pub struct Caching<'a> {
    /// The caches.
    pub caches: &'a Caches,
    /// The store of this machine.
    pub store: &'a Store,
    /// Receives events.
    pub sink: &'a Sink,
    /// Whether a state that received this secret may be sent (`cache=#true`).
    pub may_leave: &'a (dyn Fn(&str) -> bool + Sync),
}

/// The keys that a build has looked up in caches.
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
    /// Fetches missing states from caches, beginning with the wanted ones:
    /// below a state that exists, it looks up nothing. Returns the plan for the
    /// rest. Adds the keys that it looks up to `looked`, and skips those that
    /// are in it.
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
                    last.complete.remove(&key);
                } else {
                    // Another cache may have it.
                    looked.asked.remove(&key);
                }
            }
            // The states below came with it.
            last.complete.retain(|_, id| id.is_some());
        }
    }

    /// Plans a build with the states that caches have, and fetches none.
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
                (self.sink)(Event::Notice { text: format!("{from}: can't fetch {name}: {why}") });
                false
            }
        }
    }

    /// Adds how a node differs from the one in a cache, if this machine has no
    /// previous build of it.
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

    /// Sends states to each cache that is written. The error is that of the
    /// first cache with `ignore-error=false` that did not get all of them.
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
                            "{}: the cache has another build of {first}; states built on the local one \
                             are not sent",
                            remote.spec.label
                        );
                        (self.sink)(Event::Notice { text });
                    }
                    if let Some(first) = pushed.withheld.first() {
                        let text = format!(
                            "{}: {first} came from another trust domain; it and states built on it are not \
                             sent",
                            remote.spec.label
                        );
                        (self.sink)(Event::Notice { text });
                    }
                    for name in &pushed.damaged {
                        let text =
                            format!("the disk of {name} is damaged; it is not sent, and will be rebuilt");
                        (self.sink)(Event::Notice { text });
                    }
                    self.summary(remote, 0, 0, pushed.sent);
                }
                Err(why) => {
                    let text = format!("{}: not all states were sent: {why}", remote.spec.label);
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

    /// Sends the totals of the caches that were read.
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
            (self.sink)(Event::Notice { text: format!("{}: retried {times}: {why}", remote.spec.label) });
        }
        let (down, up, requests) = remote.moved();
        let cache = remote.spec.label.clone();
        (self.sink)(Event::Cache { cache, hits, misses, sent, down, up, requests });
    }

    /// Returns the states to send to a cache, the lowest first.
    fn to_send(&self, graph: &Graph, wanted: &[NodeId], mode: Mode) -> Vec<State> {
        let all = graph.needed(wanted.iter().copied());
        let mut held = BTreeSet::new();
        let mut secret = None;
        let mut states = Vec::new();
        for id in all {
            let node = graph.node(id);
            let kept = self.keeps_secret(&node.work);
            if kept.is_some() || node.inputs().any(|input| held.contains(&input)) {
                held.insert(id);
                secret = secret.or(kept.map(|name| (node.name.clone(), name)));
                continue;
            }
            let seal = matches!(node.work, Work::Seal { .. });
            if (mode == Mode::Max || !seal) && self.store.has(&node.key) {
                states.push(State { key: node.key, name: node.name.clone() });
            }
        }
        if let Some((node, name)) = secret {
            let text = format!(
                "{node} and states built on it are not sent: it receives the secret `{name}`, \
                 which is declared without `cache=#true`"
            );
            (self.sink)(Event::Notice { text });
        }
        states
    }

    /// Returns a secret that a layer receives and that must not reach a cache.
    fn keeps_secret(&self, work: &Work) -> Option<String> {
        let Work::Layer(work) = work else { return None };
        work.order.steps.iter().flat_map(Order::secrets).find(|name| !(self.may_leave)(name)).cloned()
    }
}

/// Returns the nodes to look up next: those that the plan builds and that were
/// not looked up, but none below a node that a cache may still have.
fn next(graph: &Graph, plan: &Plan, asked: &BTreeSet<Key>, wanted: &[NodeId]) -> Vec<(Key, String)> {
    let mut open: BTreeSet<NodeId> = wanted.iter().copied().collect();
    for (id, _) in plan.to_build() {
        let node = graph.node(id);
        if asked.contains(&node.key) {
            open.extend(node.inputs());
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

//! `vimg cache`: inspects, fills and cleans up caches.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;

use super::caching::{self, CacheArgs};
use super::consent::Consent;
use super::global::Global;
use super::interrupt::{interruptible, stopped};
use super::keys;
use super::output::{Error, Outcome, eprint, print, print_json};
use super::project;
use crate::cache::gc::{self, Cleaned, Keep, Listing};
use crate::cache::object::Trouble;
use crate::cache::remote::Remote;
use crate::cache::spec::duration;
use crate::execute::caching::{Caching, Looked};
use crate::execute::remember;
use crate::report::{self, Style, bytes, duration as for_people};

/// Inspect, fill and clean up caches
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// List the states in a cache
    Ls(Which),
    /// Show the size of a cache, by trust domain
    Du(Which),
    /// Remove old records and unneeded packs; safe while builds run
    Gc {
        #[command(flatten)]
        which: Which,
        /// Remove records that no writer used within this time, such as `30d`
        #[arg(long, value_name = "TIME", value_parser = time)]
        keep_age: Option<Duration>,
        /// Size limit; the least recently used records are removed first
        #[arg(long, value_name = "SIZE", value_parser = vimg_lang::value::size)]
        keep_size: Option<u64>,
        /// Keep unneeded packs for this time, which must be longer than a build
        #[arg(long, value_name = "TIME", value_parser = time, default_value = "24h")]
        grace: Duration,
        /// Show what would be removed, and remove nothing
        #[arg(short = 'n', long)]
        dry_run: bool,
    },
    /// Check every record as a build would, and that its packs are complete
    Verify {
        #[command(flatten)]
        which: Which,
        /// Read all packs and check their content
        #[arg(long)]
        deep: bool,
    },
    /// Send the stored states of images to caches
    Push(Moved),
    /// Fetch the states of images from caches, and build nothing
    Pull(Moved),
    /// Copy all records of a cache to another one, with their signatures
    Copy {
        /// The cache to copy from
        from: String,
        /// The cache to copy to
        to: String,
    },
    /// Create a signing key and print its public half
    Keygen {
        /// File for the secret key; `-` prints it [default:
        /// `$XDG_CONFIG_HOME/vimg/cache.key`]
        file: Option<PathBuf>,
    },
    /// Trust a public key: builds may use the states that it signed
    Trust {
        /// The public key
        key: String,
        /// Trust domain that the key may sign for; `*` at its end matches any
        /// rest
        #[arg(long, default_value = "main")]
        domain: String,
        /// Add the key to the project's `vimg.kdl` instead of the user's settings
        #[arg(long)]
        project: bool,
    },
}

#[derive(Debug, clap::Args)]
struct Which {
    /// The cache, such as `type=s3,bucket=B` [default: the first one that
    /// builds use]
    #[arg(value_name = "SPEC")]
    cache: Option<String>,
}

#[derive(Debug, clap::Args)]
struct Moved {
    /// Names of images [default: all that the project declares]
    images: Vec<String>,
    #[command(flatten)]
    cache: CacheArgs,
}

fn time(text: &str) -> Result<Duration, String> {
    duration("TIME", text)
}

pub(super) fn run(args: &Args, global: &Global, style: Style) -> Outcome {
    match &args.command {
        Command::Ls(which) => {
            let listing = listed(which, global)?;
            if style.json { print_json(&as_json(&listing)) } else { print(&as_text(&listing)) }
        }
        Command::Du(which) => du(&listed(which, global)?, style),
        Command::Gc { which, keep_age, keep_size, grace, dry_run } => {
            let keep = Keep { age: *keep_age, size: *keep_size, grace: *grace, dry_run: *dry_run };
            let (_, remote) = which.open(global)?;
            let cleaned = asked(&remote, gc::clean(&remote, &keep))?;
            if style.json { print_json(&json!(cleaned)) } else { print(&cleaned_text(&cleaned, *dry_run)) }
        }
        Command::Verify { which, deep } => verify(which, *deep, global, style),
        Command::Push(moved) => push(moved, global, style),
        Command::Pull(moved) => pull(moved, global, style),
        Command::Copy { from, to } => {
            let consent = consent(global)?;
            let (opened, from) = caching::one(from, false, &consent)?;
            let (_, to) = caching::one(to, true, &consent)?;
            let copied = interruptible(opened.caches.copy(&from, &to))?.ok_or_else(stopped)?;
            let copied = copied.map_err(|trouble| Error::host(trouble.to_string()))?;
            print(&format!("{} records copied, {} written\n", copied.records, bytes(copied.bytes)))?;
            match copied.damaged {
                0 => Ok(()),
                n => Err(Error::Message(
                    format!("{n} records were not copied: they, or packs that they need, are damaged"),
                    Some("`vimg cache verify` lists them".into()),
                    1,
                )),
            }
        }
        Command::Keygen { file } => keys::keygen(file.as_ref()),
        Command::Trust { key, domain, project } => keys::trust(key, domain, *project, global),
    }
}

/// Reads the consent of the project here. Without a project, it is that of the
/// current directory, because `vimg cache` also works outside of projects.
fn consent(global: &Global) -> Result<Consent, Error> {
    let root = project::find(global).map_or_else(|_| PathBuf::from("."), |(root, _)| root);
    Consent::of(&root.canonicalize().unwrap_or(root), global)
}

impl Which {
    fn open(&self, global: &Global) -> Result<(caching::Opened, Arc<Remote>), Error> {
        let consent = consent(global)?;
        let text = match &self.cache {
            Some(text) => text.clone(),
            None => caching::first(&consent)?.ok_or_else(|| {
                let help = "name one, such as type=local,src=DIR".to_owned();
                Error::Message("no cache is configured".into(), Some(help), 2)
            })?,
        };
        caching::one(&text, false, &consent)
    }
}

/// Runs `work` on a cache; Ctrl-C stops it.
fn asked<T>(remote: &Remote, work: impl Future<Output = Result<T, Trouble>>) -> Result<T, Error> {
    let done = interruptible(work)?.ok_or_else(stopped)?;
    done.map_err(|e| Error::host(format!("{}: {e}", remote.spec.label)))
}

fn listed(which: &Which, global: &Global) -> Result<Listing, Error> {
    let (_, remote) = which.open(global)?;
    asked(&remote, gc::list(&remote))
}

fn as_json(listing: &Listing) -> serde_json::Value {
    let records = listing.records.iter().map(|listed| {
        let own = listed.entries.as_ref().ok().and_then(|all| all.first());
        json!({
            "domain": listed.domain,
            "key": listed.key,
            "wrong": listed.entries.as_ref().err(),
            "name": own.map(|e| &e.state.name),
            "kind": own.map(|e| &e.state.kind),
            "written": own.map(|e| e.written),
            "writer": own.map(|e| &e.writer),
            "seconds": own.map(|e| e.state.seconds),
            "bytes": own.map(|e| e.packs().collect::<std::collections::BTreeSet<_>>().iter().map(|p| p.size).sum::<u64>()),
            "description": own.map(|e| &e.state.description),
        })
    });
    json!({ "records": records.collect::<Vec<_>>(), "bytes": listing.bytes() })
}

fn as_text(listing: &Listing) -> String {
    let mut out = String::new();
    for listed in &listing.records {
        let line = match listed.entries.as_ref().map(|all| all.first()) {
            Ok(Some(own)) => {
                let took = for_people(own.state.seconds);
                format!("{}  built in {took}", crate::event::plain(&own.state.name))
            }
            Ok(None) => "damaged".into(),
            Err(why) => why.clone(),
        };
        out.push_str(&format!("{:<10} {}  {line}\n", listed.domain, listed.key.short()));
    }
    out.push_str(&format!(
        "{} records, {} packs, {}\n",
        listing.records.len(),
        listing.packs.len(),
        bytes(listing.bytes())
    ));
    out
}

fn du(listing: &Listing, style: Style) -> Outcome {
    // A pack that two domains need counts for both.
    let mut domains: BTreeMap<&str, (usize, BTreeMap<&str, u64>)> = BTreeMap::new();
    for listed in &listing.records {
        let (records, packs) = domains.entry(&listed.domain).or_default();
        *records += 1;
        let all = listed.entries.iter().flatten().flat_map(|e| e.packs());
        packs.extend(all.map(|p| (p.sha256.as_str(), p.size)));
    }
    let sizes: BTreeMap<&str, (usize, u64)> =
        domains.into_iter().map(|(domain, (n, packs))| (domain, (n, packs.values().sum()))).collect();
    if style.json {
        let domains: BTreeMap<_, _> =
            sizes.iter().map(|(d, (n, b))| (d, json!({ "records": n, "bytes": b }))).collect();
        return print_json(&json!({ "domains": domains, "bytes": listing.bytes() }));
    }
    let mut out = String::new();
    for (domain, (records, size)) in sizes {
        out.push_str(&format!("{domain:<20} {records:>6} records  {}\n", bytes(size)));
    }
    out.push_str(&format!("{} in total\n", bytes(listing.bytes())));
    print(&out)
}

fn cleaned_text(cleaned: &Cleaned, dry_run: bool) -> String {
    let verb = if dry_run { "would be removed" } else { "removed" };
    let next = match cleaned.tombstones {
        0 => String::new(),
        n => format!("\na later run removes {n} more packs, unless they are needed by then"),
    };
    format!(
        "{} records and {} packs {verb}, {}; {} left{next}\n",
        cleaned.records,
        cleaned.packs,
        bytes(cleaned.bytes),
        bytes(cleaned.left)
    )
}

fn verify(which: &Which, deep: bool, global: &Global, style: Style) -> Outcome {
    let (opened, remote) = which.open(global)?;
    let verified = asked(&remote, opened.caches.verify(&remote, deep))?;
    if style.json {
        print_json(&json!({ "good": verified.good, "wrong": verified.wrong, "read": verified.read }))?;
    } else {
        let mut out = String::new();
        for (name, why) in &verified.wrong {
            out.push_str(&format!("{}: {}\n", crate::event::plain(name), crate::event::plain(why)));
        }
        let read = if deep { format!(", {} read", bytes(verified.read)) } else { String::new() };
        out.push_str(&format!("{} good, {} wrong{read}\n", verified.good, verified.wrong.len()));
        print(&out)?;
    }
    if verified.wrong.is_empty() { Ok(()) } else { Err(Error::Code(1)) }
}

fn push(moved: &Moved, global: &Global, style: Style) -> Outcome {
    let mut loaded = project::load(global, &project::only(&moved.images))?;
    let graph = project::graph(&mut loaded)?;
    let images = project::wanted(&graph, &loaded, &moved.images)?;
    let nodes = project::nodes_of(&graph, &images, project::Extent::Outputs);
    let opened = moved.cache.open(&loaded.consent, &loaded.store)?;
    loaded.store = opened.store(&loaded.store);
    let caching::Opened { caches, notices, .. } = opened;
    if caches.to.is_empty() {
        return Err(none("--cache-to", notices));
    }
    let reporter = report::reporter(style);
    let sink = reporter.sink();
    caching::tell(&sink, notices);
    let may_leave = |name: &str| loaded.model.secrets.iter().any(|s| s.name == name && s.cache);
    let _lease = loaded.store.lease(graph.keys())?;
    let caching = Caching { caches: &caches, store: &loaded.store, sink: &sink, may_leave: &may_leave };
    let sent = interruptible(caching.send(&graph, &nodes))?;
    reporter.end();
    sent.ok_or_else(stopped)?.map_err(Error::host)
}

fn pull(moved: &Moved, global: &Global, style: Style) -> Outcome {
    let mut loaded = project::load(global, &project::only(&moved.images))?;
    let mut graph = project::graph(&mut loaded)?;
    let images = project::wanted(&graph, &loaded, &moved.images)?;
    let nodes = project::nodes_of(&graph, &images, project::Extent::Outputs);
    let opened = moved.cache.open(&loaded.consent, &loaded.store)?;
    loaded.store = opened.store(&loaded.store);
    let caching::Opened { caches, notices, .. } = opened;
    if caches.from.is_empty() {
        return Err(none("--cache-from", notices));
    }
    let mut last = loaded.last();
    let reporter = report::reporter(style);
    let sink = reporter.sink();
    caching::tell(&sink, notices);
    let _lease = loaded.store.lease(graph.keys())?;
    let caching = Caching { caches: &caches, store: &loaded.store, sink: &sink, may_leave: &|_| false };
    let obtained = interruptible(async {
        let mut looked = Looked::default();
        loop {
            let plan = caching.obtain(&graph, &last, &nodes, &mut looked).await;
            // A fetched state may be identical to another one (early cutoff),
            // which changes keys; and states that were missing may exist now.
            last.complete.retain(|_, id| id.is_some());
            if !graph.resolve(|key| loaded.store.stands_for(key)) {
                caching.tell(&looked);
                return plan;
            }
        }
    })?;
    reporter.end();
    let plan = obtained.ok_or_else(stopped)?;
    remember(&graph, &plan, &loaded.store, &loaded.notes);
    match plan.to_build().count() {
        0 => Ok(()),
        n => {
            eprint(&format!("{n} nodes are in no cache; `vimg build` builds them\n"));
            Err(Error::Code(1))
        }
    }
}

fn none(flag: &str, notices: Vec<String>) -> Error {
    match notices.into_iter().next() {
        Some(notice) => Error::Message(notice, None, 2),
        None => Error::Message("no cache is configured".into(), Some(format!("name one with {flag}")), 2),
    }
}

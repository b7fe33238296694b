//! `vimg store`: what takes room in the store, and garbage collection.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::json;

use super::global::Global;
use super::output::{Outcome, print, print_json};
use super::project;
use crate::cache::spec::duration;
use crate::report::{Style, bytes, duration as for_people};
use crate::store::gc::{Item, Keep, Kind};

/// Show what takes room in the store, and clean it up
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Show what takes room
    Du,
    /// Remove what no project, server or running build needs
    ///
    /// Memory snapshots go first, then disks of failed layers, then states and
    /// kernels; of each kind those that were used longest ago first. Safe while
    /// builds, servers and forks run. A removed memory snapshot costs a boot.
    Gc {
        /// Keep what was used within this time, such as `7d`
        #[arg(long, value_name = "TIME", value_parser = |text: &str| duration("TIME", text))]
        keep_age: Option<Duration>,
        /// Stop when the store takes no more than this
        #[arg(long, value_name = "SIZE", value_parser = vimg_lang::value::size)]
        keep_size: Option<u64>,
        /// Show what would be removed, and remove nothing
        #[arg(short = 'n', long)]
        dry_run: bool,
    },
}

fn kind(kind: Kind) -> &'static str {
    match kind {
        Kind::Snapshot => "memory snapshot",
        Kind::Failed => "failed layer",
        Kind::State => "state",
        Kind::Blob => "kernel or initrd",
        Kind::Server => "server",
        Kind::Other => "other",
    }
}

fn value(item: &Item) -> serde_json::Value {
    json!({
        "kind": kind(item.kind),
        "name": item.name,
        "path": item.path,
        "bytes": item.bytes,
        "neededBy": item.root,
    })
}

pub(super) fn run(args: &Args, global: &Global, style: Style) -> Outcome {
    let store = project::store(global)?;
    match args.command {
        Command::Du => {
            let all = store.usage()?;
            if style.json {
                return print_json(&all.iter().map(value).collect());
            }
            let mut sums: BTreeMap<Kind, (usize, u64, u64)> = BTreeMap::new();
            for item in &all {
                let (count, sum, free) = sums.entry(item.kind).or_default();
                *count += 1;
                *sum += item.bytes;
                *free += if item.root.is_none() { item.bytes } else { 0 };
            }
            let mut out = format!("{:<18} {:>6} {:>12} {:>12}\n", "kind", "count", "size", "removable");
            let total = sums.values().fold((0, 0, 0), |a, b| (a.0 + b.0, a.1 + b.1, a.2 + b.2));
            let rows = sums.iter().map(|(of, sums)| (kind(*of), *sums)).chain([("total", total)]);
            for (name, (count, sum, free)) in rows {
                out.push_str(&format!("{name:<18} {count:>6} {:>12} {:>12}\n", bytes(sum), bytes(free)));
            }
            print(&out)
        }
        Command::Gc { keep_age, keep_size, dry_run } => {
            let done = store.collect(&Keep { age: keep_age, size: keep_size, dry_run })?;
            let sum: u64 = done.removed.iter().map(|item| item.bytes).sum();
            if style.json {
                let removed: Vec<_> = done.removed.iter().map(value).collect();
                return print_json(&json!({ "removed": removed, "bytes": sum, "left": done.left }));
            }
            let mut out = String::new();
            if style.verbose || dry_run {
                for item in &done.removed {
                    let age = item.used.elapsed().unwrap_or_default().as_secs_f64();
                    let line = format!(
                        "{:<16} {:>9}  {}, used {} ago\n",
                        kind(item.kind),
                        bytes(item.bytes),
                        crate::event::plain(&item.name),
                        for_people(age)
                    );
                    out.push_str(&line);
                }
            }
            let what = if dry_run { "would remove" } else { "removed" };
            out.push_str(&format!(
                "{what} {} in {}; {} left\n",
                bytes(sum),
                match done.removed.len() {
                    1 => "1 item".to_owned(),
                    n => format!("{n} items"),
                },
                bytes(done.left)
            ));
            print(&out)
        }
    }
}

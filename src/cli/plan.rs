//! `vimg plan`

use std::collections::BTreeMap;

use serde_json::json;

use super::caching::{self, CacheArgs, Opened};
use super::global::Global;
use super::interrupt::{interruptible, stopped};
use super::output::{Error, Outcome, print, print_json};
use super::project;
use super::settings::ProviderArgs;
use crate::execute::caching::Caching;
use crate::graph::{Graph, Needs, NodeId};
use crate::plan::{Plan, Reason, Step};
use crate::report::{self, Paint, Style};
use crate::store::Last;

/// Show what a build would do, and why
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Images to plan [default: all that the project declares]
    images: Vec<String>,
    #[command(flatten)]
    provider: ProviderArgs,
    #[command(flatten)]
    cache: CacheArgs,
}

/// Plans a build, with the states that caches would provide. What is said about
/// caches goes to standard error, because standard output has the plan.
pub(super) fn previewed(
    args: &CacheArgs,
    graph: &Graph,
    loaded: &project::Loaded,
    last: &Last,
    wanted: &[NodeId],
    style: Style,
) -> Result<Plan, Error> {
    let opened = args.open(&loaded.consent, &loaded.store)?;
    let store = opened.store(&loaded.store);
    let Opened { caches, notices, .. } = opened;
    if caches.from.is_empty() && notices.is_empty() {
        return Ok(Plan::new(graph, &store, last, &BTreeMap::new(), wanted));
    }
    let reporter = report::reporter(Style { json: false, ..style });
    let sink = reporter.sink();
    caching::tell(&sink, notices);
    let caching = Caching { caches: &caches, store: &store, sink: &sink, may_leave: &|_| false };
    let plan = interruptible(caching.preview(graph, last, wanted))?;
    reporter.end();
    plan.ok_or_else(stopped)
}

pub(super) fn run(args: &Args, global: &Global, style: Style) -> Outcome {
    let mut loaded = project::load(global, &project::only(&args.images))?;
    let graph = project::graph(&mut loaded)?;
    let images = project::wanted(&graph, &loaded, &args.images)?;
    let nodes = project::nodes_of(&graph, &images, project::Extent::Outputs);
    let last = loaded.last();
    let plan = previewed(&args.cache, &graph, &loaded, &last, &nodes, style)?;
    project::keep_stamps(&loaded.notes, loaded.project);
    // Testing the host takes a moment, so vimg does it only if the plan needs it.
    let to_build = |needs: Needs| plan.to_build().any(|(id, _)| graph.node(id).needs == needs);
    let (disks, machines) = (to_build(Needs::Disk), to_build(Needs::Machine));
    let explained = match disks || machines {
        true => Some(args.provider.explain(&loaded.store)?),
        false => None,
    };
    let offline = explained.as_ref().filter(|_| disks).map(|e| e.offline.text.as_str());
    let booted = explained.as_ref().filter(|_| machines).map(|e| e.booted.as_str());
    if style.json {
        let mut plan = as_json(&graph, &plan);
        plan["offline"] = json!(offline);
        plan["booted"] = json!(booted);
        return print_json(&plan);
    }
    let mut text = as_text(&graph, &plan, Paint(style.colour_out));
    for (what, how) in [("layers are applied", offline), ("machines are booted", booted)] {
        if let Some(how) = how {
            text.push_str(&format!("{what} {how}\n"));
        }
    }
    print(&text)
}

/// Returns the name of a step. A node whose parent is rebuilt may be reused,
/// because early cutoff may keep its key.
fn word(step: &Step) -> &'static str {
    match step {
        Step::Reuse => "reused",
        Step::Fetch(_) => "fetch",
        Step::Build(Reason::Parent(_)) => "may be reused",
        Step::Build(_) => "build",
    }
}

fn as_text(graph: &Graph, plan: &Plan, paint: Paint) -> String {
    let mut out = String::new();
    let width = plan.steps.keys().map(|id| graph.node(*id).name.chars().count()).max().unwrap_or(0).min(40);
    for (id, step) in &plan.steps {
        let name = &graph.node(*id).name;
        match step {
            Step::Reuse => out.push_str(&format!("{}  {name}\n", paint.green("reuse"))),
            Step::Fetch(cache) => {
                out.push_str(&format!("{}  {name:width$}  from {cache}\n", paint.cyan("fetch")));
            }
            Step::Build(Reason::Changed(changes)) => {
                // Each change has its own line, because some are long.
                for (n, change) in changes.iter().enumerate() {
                    let (verb, name) = match n {
                        0 => (paint.yellow("build"), name.as_str()),
                        _ => ("     ".to_owned(), ""),
                    };
                    if n == 5 {
                        let more = changes.len() - n;
                        out.push_str(&format!("{verb}  {name:width$}  and {more} more: vimg why\n"));
                        break;
                    }
                    out.push_str(&format!("{verb}  {name:width$}  {}\n", change.text));
                }
            }
            Step::Build(reason) => {
                let later = if matches!(reason, Reason::Parent(_)) { "; may be reused" } else { "" };
                out.push_str(&format!("{}  {name:width$}  {reason}{later}\n", paint.yellow("build")));
            }
        }
    }
    for (id, _) in plan.to_build() {
        let node = graph.node(id);
        let taken = node.work.takes_back();
        if !taken.is_empty() {
            out.push_str(&format!("{} reverts {}; nothing below is rebuilt\n", node.name, taken.join(", ")));
        }
    }
    let mut lines: Vec<String> = out.lines().map(|l| l.trim_end().to_owned()).collect();
    let build = plan.to_build().count();
    let fetched = plan.steps.values().filter(|s| matches!(s, Step::Fetch(_))).count();
    let fetched = if fetched > 0 { format!(", {fetched} from caches") } else { String::new() };
    lines.push(format!("{build} to build, {} reused{fetched}", plan.reused()));
    lines.join("\n") + "\n"
}

fn as_json(graph: &Graph, plan: &Plan) -> serde_json::Value {
    let steps: Vec<_> = plan
        .steps
        .iter()
        .map(|(id, step)| {
            let node = graph.node(*id);
            json!({
                "node": node.name,
                "key": node.key,
                "action": word(step),
                "takes_back": node.work.takes_back(),
                "needs": match node.needs {
                    Needs::Nothing => None,
                    Needs::Disk => Some("disk"),
                    Needs::Machine => Some("booted"),
                },
                "reason": match step {
                    Step::Reuse => None,
                    Step::Fetch(cache) => Some(format!("from {cache}")),
                    Step::Build(reason) => Some(reason.to_string()),
                },
            })
        })
        .collect();
    json!({ "steps": steps })
}

//! `vimg apply`

use super::build::{How, Made};
use super::global::Global;
use super::interrupt::{interrupted, orderly};
use super::output::{Error, Outcome, print};
use super::server;
use crate::execute::server::{self as servers, Changes};
use crate::graph::ServerPlan;
use crate::report::{Style, bytes};

/// Change a running server to match the recipe
///
/// vimg reverts the parts that the recipe no longer has, and applies the new and
/// the changed ones. If that fails, or on Ctrl-C, the server boots from its disk as it was
/// before; a second Ctrl-C leaves at once. Another number of CPUs or other memory
/// takes effect with `vimg restart`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// A server of the recipe
    server: String,
    /// Show what would be done, and change nothing
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    how: How,
}

pub(super) fn run(args: &Args, global: &Global, style: Style) -> Outcome {
    let server::Planned { made, plan, home } =
        server::planned(&args.server, &args.how, global, style, false)?;
    if servers::known(home.dir()).is_none() {
        return Err(server::unknown(&args.server));
    }
    let Made { context, sources } = made;
    if args.dry_run {
        let changes =
            servers::difference(&plan, &home).map_err(|why| server::message(&plan.name, why, None))?;
        return print(&told(&plan, &changes));
    }
    let applied = orderly(|stop| servers::apply(&context, &plan, &home, stop))?;
    let changes = applied.map_err(|failure| Error::Build(Box::new(sources), vec![*failure]))?;
    let text = "stopped; the server has booted from its disk as it was before";
    print(&told(&plan, &changes.ok_or_else(|| interrupted(text))?))
}

/// Formats a line for each part that is reverted or applied, and for another size.
fn told(plan: &ServerPlan, changes: &Changes) -> String {
    let mut out = String::new();
    for id in &changes.parts.reverts {
        out.push_str(&format!("revert {id}\n"));
    }
    for place in &changes.parts.apply {
        out.push_str(&format!("apply  {}\n", plan.wanted[*place].id));
    }
    if changes.size {
        let (cpus, memory) = (plan.machine.cpus, bytes(plan.machine.memory));
        out.push_str(&format!(
            "size   cpus={cpus}, {memory} of memory, after `vimg restart {}`\n",
            plan.name
        ));
    }
    if out.is_empty() { "nothing to apply\n".into() } else { out }
}

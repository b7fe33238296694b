//! Changes a running server to match its recipe.

use std::collections::BTreeMap;

use super::super::change::{self, ServerContext};
use super::super::context::BuildContext;
use super::super::failure::Failure;
use super::super::guest::Guest;
use super::super::node_failure::{FailureKind, NodeFailure};
use super::super::order::NodeOrder;
use super::branch::branch;
use super::record::{MOST_DISKS, ServerRecord, forwards, lead};
use super::running::{find, leave, servers};
use super::start::{back, server};
use crate::graph::{Difference, ServerPlan};
use crate::provider::Provider;
use crate::store::ServerHome;

/// How a server differs from its recipe.
#[derive(Debug, PartialEq, Eq)]
pub struct Changes {
    /// The parts to revert and to apply.
    pub parts: Difference,
    /// Whether the recipe has another number of CPUs or other memory than the
    /// machine has booted with.
    pub size: bool,
}

impl Changes {
    fn of(plan: &ServerPlan, record: &ServerRecord) -> Self {
        let (cpus, memory, _) = record.machine;
        let size = (cpus, memory) != (plan.machine.cpus, plan.machine.memory);
        Self { parts: plan.difference(&record.parts), size }
    }
}

/// Returns how a server differs from its recipe. The error says that it was
/// never started.
pub fn difference(plan: &ServerPlan, home: &ServerHome) -> Result<Changes, String> {
    let record = home.record().ok_or("it was never started")?;
    Ok(Changes::of(plan, &record))
}

/// Returns why the server of a record can't be changed, if that is so.
fn refusal<P>(
    server: &ServerContext<'_, P>,
    record: &ServerRecord,
    difference: &Difference,
) -> Option<Box<Failure>> {
    let (graph, plan) = (&server.context.graph, server.plan);
    let help = |mut failure: Box<Failure>, help: String| {
        failure.help = Some(help);
        Some(failure)
    };
    let again = || create_again(&plan.name);
    if graph.node(graph.chain(plan.image)[0]).key != record.root {
        return help(server.failure(FailureKind::Recipe, "its image has another base now"), again());
    }
    if record.changing {
        let back = "to go back to the disk before it";
        return help(
            server.host("its last change was interrupted".into()),
            format!("{back}: `vimg down --force {0}`, then `vimg up {0}`", plan.name),
        );
    }
    let stuck = difference.stuck.first()?;
    let message = format!("`{stuck}` can't be reverted: one of its scripts has no `undo`");
    help(server.failure(FailureKind::Recipe, &message), again())
}

/// Says how to start over with a server.
fn create_again(name: &str) -> String {
    format!("create it again: `vimg down --remove {name}`, then `vimg up {name}`")
}

/// Changes a running server to match its recipe. If that fails or `stop` is ready
/// first, the server boots from its disk as it was before. `None` if it was
/// stopped. Another size of the machine takes effect when the server boots again.
pub async fn apply<P: Provider>(
    context: &BuildContext<P>,
    plan: &ServerPlan,
    home: &ServerHome,
    stop: impl Future<Output = ()>,
) -> Result<Option<Changes>, Box<Failure>> {
    let worker = context.worker();
    let node = NodeOrder::new(&context.graph, plan.image, &BTreeMap::new());
    let server = server(context, &worker, &node, plan);
    let mut record = home.record().ok_or_else(|| server.host("it was never started".into()))?;
    let changes = Changes::of(plan, &record);
    if let Some(failure) = refusal(&server, &record, &changes.parts) {
        return Err(failure);
    }
    let forwards = forwards(&record);
    if changes.parts.is_empty() && forwards == plan.forwards {
        if changes.size {
            resize(&mut record, plan);
            home.keep(&record).map_err(|e| server.io_failure(home.dir(), e))?;
        }
        return Ok(Some(changes));
    }
    let found = find(&*worker.provider, home).await.map_err(|why| server.host(why))?;
    let mut found = found.ok_or_else(|| {
        let mut failure = server.host("it is switched off".into());
        failure.help = Some(format!("`vimg up {}` boots it", plan.name));
        failure
    })?;
    if record.chain.len() >= MOST_DISKS {
        leave(&*worker.provider, found);
        let mut failure = server.host(format!("its disk has been changed {MOST_DISKS} times, the maximum"));
        failure.help = Some(create_again(&plan.name));
        return Err(failure);
    }
    if !changes.parts.is_empty() {
        match carry_out(&server, home, (&mut record, &changes.parts), found, stop).await? {
            Some(changed) => found = changed,
            None => return Ok(None),
        }
    }
    resize(&mut record, plan);
    let servers = servers(&*worker.provider).map_err(|why| server.host(why))?;
    let led = servers.forward(&mut found.instance, &forwards, &plan.forwards).await;
    if led.is_ok() {
        lead(&mut record, &plan.forwards);
    }
    home.keep(&record).map_err(|e| server.io_failure(home.dir(), e))?;
    leave(&*worker.provider, found);
    led.map_err(|e| Box::new(Failure::at(plan.span, NodeFailure::provider(&plan.name, e))))?;
    Ok(Some(changes))
}

/// Notes the size that the recipe has for the machine. Its disk stays as large as
/// it is.
fn resize(record: &mut ServerRecord, plan: &ServerPlan) {
    record.machine = (plan.machine.cpus, plan.machine.memory, record.machine.2);
}

/// Reverts and applies the parts of a difference in a running server, on a new
/// disk. Returns the server; `None` if `stop` was ready first, and the server has
/// booted from its disk as it was before.
async fn carry_out<P: Provider>(
    server: &ServerContext<'_, P>,
    home: &ServerHome,
    (record, difference): (&mut ServerRecord, &Difference),
    mut found: Guest<P::Instance>,
    stop: impl Future<Output = ()>,
) -> Result<Option<Guest<P::Instance>>, Box<Failure>> {
    let provider = &*server.site.worker.provider;
    let change = match change::prepare(server, difference).await {
        Ok(change) => change,
        Err(failure) => {
            leave(provider, found);
            return Err(failure);
        }
    };
    if let Err(why) = branch::<P>(home, record, true, &mut found).await {
        leave(provider, found);
        return Err(server.host(why));
    }
    let made = tokio::select! {
        biased;
        made = change::make(server, change, &mut found) => Some(made),
        () = stop => None,
    };
    match made {
        Some(Ok(parts)) => record.parts = parts,
        failed => {
            if failed.is_none() {
                server.site.notice("stopping: the server boots from its disk as it was before");
            }
            found.stop().await;
            home.step_back(record);
            if let Err(hook) = back(server, home, record).await? {
                server.site.notice(&hook.message);
            }
            return match failed {
                Some(Err(mut failure)) => {
                    failure.help = Some("the server has booted from its disk as it was before".into());
                    Err(failure)
                }
                _ => Ok(None),
            };
        }
    }
    record.changing = false;
    record.parting = server.plan.has_parting();
    home.keep(record).map_err(|e| server.io_failure(home.dir(), e))?;
    Ok(Some(found))
}

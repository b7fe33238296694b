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

/// Returns how a server differs from its recipe. The error says that it was
/// never started.
pub fn difference(plan: &ServerPlan, home: &ServerHome) -> Result<Difference, String> {
    let record = home.record().ok_or("it was never started")?;
    Ok(plan.difference(&record.parts))
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

/// Changes a running server to match its recipe. If that fails, the server
/// boots from its disk as it was before.
pub async fn apply<P: Provider>(
    context: &BuildContext<P>,
    plan: &ServerPlan,
    home: &ServerHome,
) -> Result<Difference, Box<Failure>> {
    let worker = context.worker();
    let node = NodeOrder::new(&context.graph, plan.image, &BTreeMap::new());
    let server = server(context, &worker, &node, plan);
    let mut record = home.record().ok_or_else(|| server.host("it was never started".into()))?;
    let difference = plan.difference(&record.parts);
    if let Some(failure) = refusal(&server, &record, &difference) {
        return Err(failure);
    }
    let forwards = forwards(&record);
    if difference.is_empty() && forwards == plan.forwards {
        return Ok(difference);
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
    if !difference.is_empty() {
        found = carry_out(&server, home, (&mut record, &difference), found).await?;
    }
    let servers = servers(&*worker.provider).map_err(|why| server.host(why))?;
    let led = servers.forward(&mut found.instance, &forwards, &plan.forwards).await;
    if led.is_ok() {
        lead(&mut record, &plan.forwards);
    }
    home.keep(&record).map_err(|e| server.io_failure(home.dir(), e))?;
    leave(&*worker.provider, found);
    led.map_err(|e| Box::new(Failure::at(plan.span, NodeFailure::provider(&plan.name, e))))?;
    Ok(difference)
}

/// Reverts and applies the parts of a difference in a running server, on a new
/// disk. Returns the server.
async fn carry_out<P: Provider>(
    server: &ServerContext<'_, P>,
    home: &ServerHome,
    (record, difference): (&mut ServerRecord, &Difference),
    mut found: Guest<P::Instance>,
) -> Result<Guest<P::Instance>, Box<Failure>> {
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
    match change::make(server, change, &mut found).await {
        Ok(parts) => record.parts = parts,
        Err(mut failure) => {
            found.stop().await;
            home.step_back(record);
            if let Err(hook) = back(server, home, record).await? {
                server.site.notice(&hook.message);
            }
            failure.help = Some("the server has booted from its disk as it was before".into());
            return Err(failure);
        }
    }
    record.changing = false;
    record.parting = server.plan.has_parting();
    home.keep(record).map_err(|e| server.io_failure(home.dir(), e))?;
    Ok(found)
}

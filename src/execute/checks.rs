//! Makes checks: each asks a fork of its image's machine, which is thrown
//! away. What comes of one is a record without a disk.

use std::sync::Arc;

use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::explain::{Trouble, explain};
use super::log::Log;
use super::run::{Facts, Making};
use super::session::Progress;
use super::up::{self, Stand, Up};
use super::{Failure, Settled, Shared};
use crate::event::Event;
use crate::graph::{NodeId, Work};
use crate::provider::{Instance, Provider};
use crate::store::DiskKind;

/// Makes all checks of an image: side by side where its machine can be
/// forked, otherwise one after the other in one that boots.
pub(super) async fn make<P: Provider>(
    shared: Arc<Shared<P>>,
    nodes: Vec<NodeId>,
    sender: mpsc::UnboundedSender<Settled>,
) {
    if !shared.keep_memory {
        let mut machine = None;
        for id in nodes {
            settle(&shared, id, &mut machine, &sender).await;
        }
        if let Some(Up { instance, .. }) = machine {
            instance.stop().await;
        }
        return;
    }
    let mut tasks = JoinSet::new();
    for id in nodes {
        let (shared, sender) = (shared.clone(), sender.clone());
        tasks.spawn(async move { settle(&shared, id, &mut None, &sender).await });
    }
    while let Some(done) = tasks.join_next().await {
        if let Err(error) = done
            && error.is_panic()
        {
            std::panic::resume_unwind(error.into_panic());
        }
    }
}

/// The machine of the check before, if it is to be asked more.
type Machine<P> = Option<Up<<P as Provider>::Instance>>;

async fn settle<P: Provider>(
    shared: &Shared<P>,
    id: NodeId,
    machine: &mut Machine<P>,
    sender: &mpsc::UnboundedSender<Settled>,
) {
    let settled = match one(shared, id, machine).await {
        Ok(true) => Settled::Built(id),
        Ok(false) => Settled::There(id),
        Err(failure) => Settled::Failed(id, failure),
    };
    let _ = sender.send(settled);
}

/// Makes one check; `false` if somebody else has made it meanwhile.
async fn one<P: Provider>(
    shared: &Shared<P>,
    id: NodeId,
    machine: &mut Machine<P>,
) -> Result<bool, Box<Failure>> {
    let node = shared.graph.node(id);
    let lock = shared
        .store
        .lock(&node.key)
        .await
        .map_err(|error| Box::new(Failure::store(&node.name, node.span, &error)))?;
    if shared.store.has(&node.key) {
        shared.tell(Event::Reused { node: node.name.clone(), key: node.key.to_string() });
        return Ok(false);
    }
    // A semaphore that is never closed always gives its permit.
    let _job = shared.jobs.acquire().await;
    let _memory = shared.reserve(node).await;
    let making = Making::begin(shared, id, Arc::new(lock));
    let (scratch, staging) = (making.staging()?, making.staging()?);
    let log_path = staging.path().join(DiskKind::None.file_name());
    let mut log = Log::create(&log_path).map_err(|e| making.io_failure(&log_path, e))?;
    let mut up = match machine.take() {
        Some(up) => up,
        None => {
            let overlay = scratch.path().join(DiskKind::Qcow2.file_name());
            let parent = node.parent.map(|id| shared.graph.node(id)).ok_or_else(|| making.gone())?;
            let (machine, needs) = (node.machine, node.needs);
            let stand = Stand { state: parent, machine, needs, network: true, again: false, on_top: None };
            up::up(&making, &stand, &scratch, &overlay).await?
        }
    };
    let asked = ask(&making, &mut up, &mut log).await;
    let way = up.instance.way();
    if let Err(trouble) = asked {
        let tail = log.finish();
        let mut failure = explain(&making, &mut up.instance, trouble, Some(tail)).await;
        failure.log = making.keep_log(&log_path);
        up.instance.stop().await;
        return Err(failure);
    }
    log.finish();
    if shared.keep_memory {
        up.instance.stop().await;
    } else {
        // Its disk is in the directory that goes with the first check.
        up.scratch.get_or_insert(scratch);
        *machine = Some(up);
    }
    making.commit(staging, Facts::of(DiskKind::None, way)).await?;
    Ok(true)
}

async fn ask<P: Provider>(
    making: &Making<'_, P>,
    up: &mut Up<P::Instance>,
    log: &mut Log,
) -> Result<(), Trouble> {
    let Work::Check(work) = &making.node.work else { return Ok(()) };
    making.phase("check");
    let Up { instance, session, .. } = up;
    let asked = session.check(&work.probes, |progress| match progress {
        Progress::Started(step) => log.heading(&work.places[step].1),
        Progress::Output(text) => log.text(text, |line| making.line(line)),
        Progress::Finished { .. } => {}
    });
    tokio::select! {
        asked = asked => asked.map_err(Trouble::Session),
        ended = instance.ended() => Err(Trouble::Ended(ended)),
    }
}

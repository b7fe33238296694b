//! Makes checks: each asks a fork of its image's machine, which is thrown
//! away. What comes of one is a record without a disk.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::explain::{Trouble, explain};
use super::log::Log;
use super::run::{Facts, Making};
use super::session::Progress;
use super::up::{self, Stand, Up};
use super::{Failure, JOB, Settled, Shared};
use crate::event::Event;
use crate::graph::{NodeId, Work};
use crate::provider::{Carry, Instance, Provider};
use crate::store::DiskKind;

/// Makes all checks of a machine, side by side as far as processors go.
pub(super) async fn make<P: Provider>(
    shared: Arc<Shared<P>>,
    nodes: Vec<NodeId>,
    sender: mpsc::UnboundedSender<Settled>,
) {
    let broken = Arc::new(Mutex::new(None));
    let mut tasks = JoinSet::new();
    for id in nodes {
        let (shared, sender, broken) = (shared.clone(), sender.clone(), broken.clone());
        tasks.spawn(async move {
            let settled = match one(&shared, id, &broken).await {
                Ok(true) => Settled::Built(id),
                Ok(false) => Settled::There(id),
                Err(failure) => Settled::Failed(id, failure),
            };
            let _ = sender.send(settled);
        });
    }
    while let Some(done) = tasks.join_next().await {
        if let Err(error) = done
            && error.is_panic()
        {
            std::panic::resume_unwind(error.into_panic());
        }
    }
}

/// Why their machine does not come up, once one of them has found that out.
type Broken = Mutex<Option<Failure>>;

/// Makes one check; `false` if somebody else has made it meanwhile.
async fn one<P: Provider>(shared: &Shared<P>, id: NodeId, broken: &Broken) -> Result<bool, Box<Failure>> {
    let node = shared.graph.node(id);
    // A semaphore that is never closed always gives its permits. They come
    // before the lock, so that few files are open at once. A fork keeps one
    // processor busy, a machine that boots more.
    let job = if shared.keep_memory { 1 } else { JOB };
    let _job = shared.jobs.acquire_many(job).await;
    let lock = shared
        .store
        .lock(&node.key)
        .await
        .map_err(|error| Box::new(Failure::store(&node.name, node.span, &error)))?;
    if shared.store.has(&node.key) {
        shared.tell(Event::Reused { node: node.name.clone(), key: node.key.to_string() });
        return Ok(false);
    }
    let _memory = shared.reserve(node).await;
    let making = Making::begin(shared, id, Arc::new(lock));
    let known = broken.lock().unwrap_or_else(PoisonError::into_inner).clone();
    if let Some(failure) = known {
        return Err(Box::new(Failure { node: node.name.clone(), span: node.span, ..failure }));
    }
    let (scratch, staging) = (making.staging()?, making.staging()?);
    let log_path = staging.path().join(DiskKind::None.file_name());
    let mut log = Log::create(&log_path).map_err(|e| making.io_failure(&log_path, e))?;
    let overlay = scratch.path().join(DiskKind::Qcow2.file_name());
    let parent = node.parent.map(|id| shared.graph.node(id)).ok_or_else(|| making.gone())?;
    let (machine, needs) = (node.machine, node.needs);
    let stand = Stand {
        state: parent,
        machine,
        needs,
        network: true,
        chain: None,
        carry: Carry::Thrown,
        lasting: None,
    };
    let mut up = up::up(&making, &stand, scratch.path(), &overlay).await.inspect_err(|failure| {
        *broken.lock().unwrap_or_else(PoisonError::into_inner) = Some(Failure::clone(failure));
    })?;
    let asked = ask(&making, &mut up, &mut log).await;
    let tail = log.finish();
    let way = up.instance.way();
    let failure = match asked {
        Ok(()) => None,
        Err(trouble) => {
            let mut failure = explain(&making, &mut up.instance, trouble, Some(tail)).await;
            failure.log = making.keep_log(&log_path);
            Some(failure)
        }
    };
    up.instance.stop().await;
    match failure {
        Some(failure) => Err(failure),
        None => making.commit(staging, Facts::of(DiskKind::None, way)).await.map(|_| true),
    }
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

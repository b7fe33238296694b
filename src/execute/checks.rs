//! Runs checks in forks of their image's machine, which are thrown away. The
//! state of a check has no disk.
//!
//! Checks that only read share a fork, because making a fork takes many times
//! as long as asking it. Checks that send requests use it after them, because a
//! request may start the service that answers it. A check that does both, or
//! that runs a script, has its own fork. A check that fails in a shared fork
//! runs again alone, so that no other check can be the cause.
//!
//! A check of services in a shared fork has passed only if the services are
//! still up when all checks of the fork have been asked.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::SemaphorePermit;
use tokio::task::JoinSet;
use vimg_agent::protocol::Probe;

use super::batch_context::BatchContext;
use super::executor::Report;
use super::explain::explain;
use super::guest::Stopped;
use super::log::{Log, clean};
use super::make::{Facts, Made, NodeBuild};
use super::node_failure::{FailureKind, NodeFailure};
use super::order::{BatchOrder, Task};
use super::prewarm::{self, Prewarm};
use super::session::{Progress, SessionError};
use super::up::{self, StartOptions, Started};
use super::worker::JOB;
use crate::provider::{Instance, Provider};
use crate::store::{DiskKind, Staging};

/// Runs all checks of a machine, in parallel as far as processors allow.
pub(super) async fn make<P: Provider>(batch: Arc<BatchContext<P>>, prewarmed: Option<Prewarm<P>>) {
    let machine = Arc::new(Machine { prewarmed: Mutex::new(prewarmed), broken: Mutex::default() });
    let mut tasks = JoinSet::new();
    let mut parties = parties(&batch.order);
    loop {
        for party in parties.drain(..) {
            let (batch, machine) = (batch.clone(), machine.clone());
            tasks.spawn(async move { together(&batch, party, &machine).await });
        }
        match tasks.join_next().await {
            Some(Ok(left)) => parties.extend(left.into_iter().map(|n| vec![n])),
            Some(Err(error)) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            Some(Err(_)) => {}
            None => return,
        }
    }
}

/// Groups checks by fork, each group in the order in which it runs.
fn parties(order: &BatchOrder) -> Vec<Vec<usize>> {
    let (mut looking, mut calling, mut alone) = (Vec::new(), Vec::new(), Vec::new());
    for (n, node) in order.nodes.iter().enumerate() {
        let Task::Check(check) = &node.task else { continue };
        match check.probes.iter().map(effect).reduce(|a, b| if a == b { a } else { Effect::Alone }) {
            Some(Effect::Looks) => looking.push(n),
            Some(Effect::Calls) => calling.push(n),
            Some(Effect::Alone) | None => alone.push(vec![n]),
        }
    }
    looking.extend(calling);
    let together = Some(looking).filter(|party| !party.is_empty());
    together.into_iter().chain(alone).collect()
}

/// What a probe may do to a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Effect {
    /// Nothing.
    Looks,
    /// Start the service that answers its request.
    Calls,
    /// Anything.
    Alone,
}

fn effect(probe: &Probe) -> Effect {
    match probe {
        Probe::File { .. } | Probe::Service { .. } | Probe::Package { .. } => Effect::Looks,
        Probe::Http { .. } | Probe::Port { .. } => Effect::Calls,
        Probe::Run { .. } => Effect::Alone,
    }
}

/// What the checks of one machine share.
struct Machine<P: Provider> {
    /// A prewarmed fork, until a check takes it.
    prewarmed: Mutex<Option<Prewarm<P>>>,
    /// Why the machine does not start, once a check has found that out.
    broken: Mutex<Option<NodeFailure>>,
}

/// Runs checks in one fork. Returns the checks that are left: those after one
/// that fails, because each may fail as slowly and they can run in parallel;
/// one that a full disk has stopped, if there is room now; and one that another
/// process runs, with those after it.
async fn together<P: Provider>(
    batch: &BatchContext<P>,
    party: Vec<usize>,
    machine: &Machine<P>,
) -> Vec<usize> {
    let worker = &batch.worker;
    // A semaphore that is never closed always gives its permits. They are taken
    // before the lock, so that few files are open at once. A fork keeps one
    // processor busy, a machine that boots more.
    let job = if worker.use_snapshots { 1 } else { JOB };
    let _job = worker.jobs.acquire_many(job).await;
    let (mut fork, mut held, mut left) = (None, Vec::new(), Vec::new());
    for (at, n) in party.iter().enumerate() {
        match one(batch, *n, &mut fork, machine).await {
            Ok(Asked::Passed(passed)) if party.len() > 1 && passed.services().next().is_some() => {
                held.push((*n, *passed));
            }
            Ok(Asked::Passed(passed)) => left.extend(end(batch, *n, passed.commit().await).await),
            Ok(Asked::There) => batch.report(*n, Report::Reuse),
            Ok(Asked::Left) => {
                left.extend(&party[at..]);
                break;
            }
            Err(failure) => {
                leave(fork.take()).await;
                let again = batch.fail(*n, failure).await;
                left.extend(&party[at + usize::from(!again)..]);
                break;
            }
        }
    }
    for (n, passed) in held {
        let passed = match &mut fork {
            Some(fork) => passed.still(&mut fork.up).await,
            None => Ok(passed),
        };
        let made = match passed {
            Ok(passed) => passed.commit().await,
            Err(failure) => Err(failure),
        };
        left.extend(end(batch, n, made).await);
    }
    leave(fork).await;
    left
}

/// Reports the end of a check. Returns the check if it can be tried again.
async fn end<P: Provider>(batch: &BatchContext<P>, n: usize, made: Made) -> Option<usize> {
    match made {
        Ok(built) => {
            batch.report(n, Report::Build(built));
            None
        }
        Err(failure) => batch.fail(n, failure).await.then_some(n),
    }
}

/// A check that has passed, before its state is committed.
struct Passed<'a, P: Provider> {
    build: NodeBuild<'a, P>,
    staging: Staging,
    made: Facts,
}

impl<P: Provider> Passed<'_, P> {
    async fn commit(self) -> Made {
        self.build.commit(self.staging, self.made).await.map(|(_, built)| built)
    }

    /// The services that the check names, with the steps that do.
    fn services(&self) -> impl Iterator<Item = (usize, &Probe)> {
        let probes = match &self.build.node.task {
            Task::Check(check) => check.probes.as_slice(),
            _ => &[],
        };
        probes.iter().enumerate().filter(|(_, probe)| matches!(probe, Probe::Service { .. }))
    }

    /// Asks again for the services, after the other checks of the fork.
    async fn still(self, up: &mut Started<P::Instance>) -> Result<Self, Box<NodeFailure>> {
        let log_path = self.staging.path().join(DiskKind::None.file_name());
        let (steps, probes): (Vec<usize>, Vec<Probe>) =
            self.services().map(|(step, probe)| (step, probe.clone())).unzip();
        let mut lines = Vec::new();
        let mut hear = |progress: Progress<'_>| {
            if let Progress::Output(text) = progress {
                lines.extend(text.lines().map(clean));
            }
        };
        let asked = up.guest.ask(async |session| session.check(&probes, &[], &mut hear).await).await;
        let Err(mut trouble) = asked else { return Ok(self) };
        if let Stopped::Session(SessionError::Step { step, .. }) = &mut trouble {
            *step = steps[*step];
        }
        let mut failure = explain(&self.build, &mut up.guest.instance, trouble, Some(lines)).await;
        failure.log = self.build.keep_log(&log_path);
        Err(failure)
    }
}

/// A machine that runs checks, with its files and its memory permit.
struct Fork<'a, I: Instance> {
    up: Started<I>,
    _scratch: Staging,
    _memory: Option<SemaphorePermit<'a>>,
}

async fn leave<I: Instance>(fork: Option<Fork<'_, I>>) {
    if let Some(fork) = fork {
        fork.up.guest.stop().await;
    }
}

/// The result of a check.
enum Asked<'a, P: Provider> {
    Passed(Box<Passed<'a, P>>),
    /// Another process has run it meanwhile.
    There,
    /// Another process runs it now.
    Left,
}

/// Runs one check, in the given fork or in a new one.
async fn one<'a, P: Provider>(
    batch: &'a BatchContext<P>,
    n: usize,
    fork: &mut Option<Fork<'a, P::Instance>>,
    machine: &Machine<P>,
) -> Result<Asked<'a, P>, Box<NodeFailure>> {
    let (worker, node) = (&batch.worker, &batch.order.nodes[n]);
    let lock = match fork {
        None => worker.store.lock(&node.key).await.map(Some),
        // Do not wait for another process while this one holds a machine.
        Some(_) => worker.store.try_lock(&node.key),
    };
    let lock = lock.map_err(|error| Box::new(NodeFailure::store(&node.name, &error)))?;
    let Some(lock) = lock else { return Ok(Asked::Left) };
    if worker.store.has(&node.key) {
        return Ok(Asked::There);
    }
    let build = NodeBuild::begin(batch, n, Arc::new(lock));
    let staging = build.staging()?;
    let log_path = staging.path().join(DiskKind::None.file_name());
    let mut in_company = fork.is_some();
    loop {
        let up = match fork {
            Some(fork) => &mut fork.up,
            None => &mut fork.insert(start(&build, machine).await?).up,
        };
        let mut log = Log::create(&log_path).map_err(|e| build.io_failure(&log_path, e))?;
        let asked = ask(&build, up, &mut log).await;
        let tail = log.finish();
        match asked {
            Ok(()) => {
                let made = Facts::of(DiskKind::None, up.guest.instance.runner());
                return Ok(Asked::Passed(Box::new(Passed { build, staging, made })));
            }
            Err(_) if in_company => {
                build.phase("ask again, alone");
                leave(fork.take()).await;
                in_company = false;
            }
            Err(trouble) => {
                let mut failure = explain(&build, &mut up.guest.instance, trouble, Some(tail)).await;
                failure.log = build.keep_log(&log_path);
                return Err(failure);
            }
        }
    }
}

/// Starts a fork for a check.
async fn start<'a, P: Provider>(
    build: &NodeBuild<'a, P>,
    machine: &Machine<P>,
) -> Result<Fork<'a, P::Instance>, Box<NodeFailure>> {
    let (worker, node) = (build.worker, build.node);
    let memory = worker.reserve(node).await;
    let known = machine.broken.lock().unwrap_or_else(PoisonError::into_inner).clone();
    if let Some(failure) = known {
        return Err(Box::new(NodeFailure { node: node.name.clone(), step: None, layer: None, ..failure }));
    }
    let parent = node.parent.ok_or_else(|| build.gone())?;
    let options = StartOptions::of_check(node, parent);
    let prewarm = || machine.prewarmed.lock().unwrap_or_else(PoisonError::into_inner).take();
    let prewarmed = if options.network { None } else { prewarm() };
    if let Some(prewarmed) = prewarmed
        && let Some(prewarm) = prewarmed.up().await
        && let Some((up, scratch)) = prewarm.adopt(build, &options).await
    {
        return Ok(Fork { up, _scratch: scratch, _memory: memory });
    }
    let scratch = build.staging()?;
    let up = up::up(build, &options, scratch.path(), &prewarm::overlay(&scratch)).await.inspect_err(
        |failure| {
            // A full disk may have room for the next one.
            if failure.kind != FailureKind::Full {
                *machine.broken.lock().unwrap_or_else(PoisonError::into_inner) =
                    Some(NodeFailure::clone(failure));
            }
        },
    )?;
    Ok(Fork { up, _scratch: scratch, _memory: memory })
}

async fn ask<P: Provider>(
    build: &NodeBuild<'_, P>,
    up: &mut Started<P::Instance>,
    log: &mut Log,
) -> Result<(), Stopped> {
    let Task::Check(check) = &build.node.task else { return Ok(()) };
    build.phase("check");
    let variables = if check.network { up.guest.instance.way_out().variables } else { Vec::new() };
    let mut hear = |progress: Progress<'_>| match progress {
        Progress::Started(step) => log.heading(&check.labels[step]),
        Progress::Output(text) => log.text(text, |line| build.line(line)),
        Progress::Finished { .. } => {}
    };
    up.guest.ask(async |session| session.check(&check.probes, &variables, &mut hear).await).await
}

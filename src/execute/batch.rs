//! Builds one batch: locks the keys, starts an instance, and commits a state
//! after each node.

use std::sync::Arc;

use tokio::sync::SemaphorePermit;
use vimg_agent::protocol::Order;

use super::batch_context::BatchContext;
use super::executor::Report;
use super::make::{Facts, Made, NodeBuild};
use super::node_failure::{FailureKind, NodeFailure};
use super::order::Task;
use super::prewarm::Prewarm;
use super::worker::JOB;
use super::{checks, export, layer, up};
use crate::base::{self, Base, Wanted, import};
use crate::event::Event;
use crate::host::{Lines, space};
use crate::provider::Provider;
use crate::store::{Boot, Disk, DiskKind, KeyLock};

/// Builds the nodes of a batch in order, or its checks in parallel. If another
/// process builds one of them, the state below was built again, or a full disk
/// has room again, returns that node and those after it, to try again.
pub(super) async fn make<P: Provider>(
    batch: Arc<BatchContext<P>>,
    prewarmed: Option<Prewarm<P>>,
) -> Vec<usize> {
    if matches!(batch.order.nodes[0].task, Task::Check(_)) {
        checks::make(batch, prewarmed).await;
        return Vec::new();
    }
    let worker = &batch.worker;
    for (n, node) in batch.order.nodes.iter().enumerate() {
        let lock = match worker.store.lock(&node.key).await {
            Ok(lock) => lock,
            Err(error) => return fail(&batch, n, Box::new(NodeFailure::store(&node.name, &error))).await,
        };
        if !worker.store.has(&node.key) {
            return start(&batch, n, lock).await;
        }
        // Another process built it while we waited, or it is in the graph
        // twice.
        if worker.has_moved(node) {
            batch.report(n, Report::Supersede(None));
            break;
        }
        batch.report(n, Report::Reuse);
    }
    Vec::new()
}

/// Ends the build of a node with a failure. Returns the nodes that can be tried
/// again.
async fn fail<P>(batch: &BatchContext<P>, n: usize, failure: Box<NodeFailure>) -> Vec<usize> {
    match batch.fail(n, failure).await {
        true => batch.rest(n),
        false => Vec::new(),
    }
}

async fn start<P: Provider>(batch: &BatchContext<P>, n: usize, lock: KeyLock) -> Vec<usize> {
    let (worker, node) = (&batch.worker, &batch.order.nodes[n]);
    let job = if matches!(node.task, Task::Export { .. }) { 1 } else { JOB };
    // A semaphore that is never closed always gives its permits.
    let mut job = worker.jobs.acquire_many(job).await.ok();
    let boots = matches!(node.task, Task::Layer { .. } | Task::Check(_) | Task::Seal { .. });
    let _memory = if boots { worker.reserve(node).await } else { None };
    // Another process may have built the state below again while we waited. A
    // new order then names that state.
    if n == 0
        && let Some((key, id)) = batch.order.parent
        && worker.store.record(&key).is_some_and(|record| record.id != id)
    {
        return batch.rest(n);
    }
    let lock = Arc::new(lock);
    let result = match &node.task {
        Task::Bootstrap(_) | Task::Import { .. } => base(batch, n, lock).await,
        Task::Export { export, own, .. } => export::export(batch, n, (*export, *own), lock).await,
        Task::Layer { .. } | Task::Check(_) | Task::Seal { .. } => {
            return machine(batch, n, lock, &mut job).await;
        }
    };
    match result {
        Ok(built) => {
            batch.report(n, Report::Build(built));
            Vec::new()
        }
        Err(failure) => fail(batch, n, failure).await,
    }
}

async fn base<P: Provider>(batch: &BatchContext<P>, n: usize, lock: Arc<KeyLock>) -> Made {
    let build = NodeBuild::begin(batch, n, lock);
    let (worker, node) = (build.worker, build.node);
    let staging = build.staging()?;
    let (sink, name) = (worker.sink.clone(), node.name.clone());
    let lines: Lines =
        Arc::new(move |line: &str| sink(Event::Output { node: name.clone(), line: line.to_owned() }));
    let created = match &node.task {
        Task::Import { file, sha256 } => {
            build.phase("copy");
            // Check and convert a copy: the file of the project may change
            // meanwhile.
            let copy = staging.path().join("import");
            let (inputs, from, to) = (build.inputs.clone(), file.clone(), copy.clone());
            let copied = tokio::task::spawn_blocking(move || {
                std::io::copy(&mut inputs.open(&from)?, &mut std::fs::File::create(to)?)
            });
            match copied.await {
                Ok(Ok(_)) => {}
                Ok(Err(e)) if space::is_full(&e) => return Err(build.io_failure(&copy, e)),
                Ok(Err(e)) => return Err(build.failure(FailureKind::Recipe, format!("`{file}`: {e}"))),
                Err(e) => return Err(build.failure(FailureKind::Host, e.to_string())),
            }
            import::check(&copy, sha256).await.map_err(|e| build.provider_failure(e))?;
            Base { disk: copy, boot: None, modules: None }
        }
        Task::Bootstrap(bootstrap) => {
            build.phase("bootstrap");
            let Some(distribution) = base::find(worker.distributions, &bootstrap.distribution) else {
                let message = format!("vimg knows no distribution `{}`", bootstrap.distribution);
                return Err(build.failure(FailureKind::Recipe, message));
            };
            let (size, dir) = (node.machine.disk, staging.path());
            let wanted = Wanted { bootstrap, size, dir, access: &worker.access, lines: &lines };
            distribution.make(wanted).await.map_err(|e| build.provider_failure(e))?
        }
        _ => return Err(build.failure(FailureKind::Recipe, "the node is not a base")),
    };
    let disk = staging.path().join(DiskKind::Qcow2.file_name());
    worker.disks.import(&created.disk, &disk).await.map_err(|e| build.provider_failure(e))?;
    let _ = std::fs::remove_file(&created.disk);
    let boot = match &created.boot {
        Some(files) => Some(build.keep_boot(files)?),
        None => None,
    };
    let appliance = match (&created.modules, boot) {
        (Some(modules), Some(boot)) => Some(Boot { kernel: boot.kernel, initrd: build.keep_file(modules)? }),
        _ => None,
    };
    let made = Facts {
        disk: Disk { kind: DiskKind::Qcow2, backing: None, depth: 0 },
        boot,
        appliance,
        trusted_filesystem: matches!(node.task, Task::Bootstrap(_)),
        provider: worker.disks.name(),
        source: None,
        inherited: Vec::new(),
        same: None,
    };
    build.phase("store");
    build.commit(staging, made).await.map(|(_, built)| built)
}

async fn machine<P: Provider>(
    batch: &BatchContext<P>,
    first: usize,
    first_lock: Arc<KeyLock>,
    job: &mut Option<SemaphorePermit<'_>>,
) -> Vec<usize> {
    let worker = &batch.worker;
    let rest = &batch.order.nodes[first..];
    let mut build = NodeBuild::begin(batch, first, first_lock);
    // The instance's own files must outlive the staging directories of its
    // states.
    let (scratch, mut staging) = match (build.staging(), build.staging()) {
        (Ok(scratch), Ok(staging)) => (scratch, staging),
        (Err(failure), _) | (_, Err(failure)) => return fail(batch, first, failure).await,
    };
    let network = rest.iter().any(|node| wants_network(&node.task));
    let Some(parent) = build.node.parent else {
        return fail(batch, first, build.gone()).await;
    };
    let options = up::StartOptions::of_layers(build.node, parent, network);
    let overlay = staging.path().join(DiskKind::Qcow2.file_name());
    let mut running = match up::up(&build, &options, scratch.path(), &overlay).await {
        Ok(up) => layer::Running::on(up, job.as_mut().and_then(|job| job.split(JOB as usize - 1))),
        Err(failure) => return fail(batch, first, failure).await,
    };
    for (n, node) in batch.order.nodes.iter().enumerate().skip(first) {
        if n > first {
            // The machine's disk is this node's parent now. Do not wait for
            // another process that builds the node: this one would hold a
            // machine meanwhile.
            let lock = match worker.store.try_lock(&node.key) {
                Ok(Some(lock)) if !worker.store.has(&node.key) => Arc::new(lock),
                Ok(_) => {
                    running.guest.stop().await;
                    return batch.rest(n);
                }
                Err(error) => {
                    running.guest.stop().await;
                    let failure = NodeFailure::store(&node.name, &error);
                    return fail(batch, n, Box::new(failure)).await;
                }
            };
            build = NodeBuild::begin(batch, n, lock);
        }
        let next = match build.staging() {
            Ok(next) => next,
            Err(failure) => {
                running.guest.stop().await;
                return fail(batch, n, failure).await;
            }
        };
        let last = n + 1 == batch.order.nodes.len();
        let spent = std::mem::replace(&mut staging, next);
        let next_disk = staging.path().join(DiskKind::Qcow2.file_name());
        match layer::make(&build, &mut running, spent, &next_disk, last).await {
            Ok(built) => {
                if worker.has_moved(node) {
                    batch.report(n, Report::Supersede(Some(built)));
                    break;
                }
                batch.report(n, Report::Build(built));
            }
            Err(failure) => {
                running.guest.stop().await;
                return fail(batch, n, failure).await;
            }
        }
    }
    running.guest.stop().await;
    Vec::new()
}

/// Whether a layer may need the network.
fn wants_network(task: &Task) -> bool {
    match task {
        Task::Layer { layer, .. } => layer.steps.iter().any(Order::wants_network),
        _ => false,
    }
}

//! Builds one batch: locks the keys, starts an instance, and commits a state
//! after each node.

use std::path::PathBuf;
use std::sync::Arc;

use tokio::sync::SemaphorePermit;
use vimg_agent::protocol::Order;
use vimg_lang::model::DiskFormat;

use super::batches::Batch;
use super::context::{BuildState, JOB};
use super::make::{Facts, Made, NodeBuild};
use super::node_failure::{FailureKind, NodeFailure};
use super::prewarm::Prewarm;
use super::staged::{Before, Copies};
use super::states::Step;
use super::{checks, layer, up};
use crate::base::{self, Base, Wanted, import};
use crate::digest::Description;
use crate::disk::Exported;
use crate::event::Event;
use crate::graph::{NodeId, Work};
use crate::host::{Lines, space};
use crate::provider::{Provider, Retarget};
use crate::store::{Boot, Disk, DiskKind, KeyLock, Record};

/// Builds the nodes of a batch in order. If another process builds one of them,
/// or a full disk has room again, returns that node and those after it, as a
/// batch to try again.
pub(super) async fn make<P: Provider>(
    shared: Arc<BuildState<P>>,
    nodes: Batch,
    prewarmed: Option<Prewarm<P>>,
) -> Batch {
    if matches!(shared.graph.node(nodes[0]).work, Work::Check(_)) {
        checks::make(shared, nodes, prewarmed).await;
        return Vec::new();
    }
    let mut rest = nodes.as_slice();
    while let Some((first, others)) = rest.split_first() {
        let node = shared.graph.node(*first);
        let lock = match shared.store.lock(&node.key).await {
            Ok(lock) => lock,
            Err(error) => {
                return fail(&shared, rest, Box::new(NodeFailure::store(&node.name, &error))).await;
            }
        };
        if !shared.store.has(&node.key) {
            return start(&shared, rest, lock).await;
        }
        // Another process built it while we waited, or it is in the graph
        // twice.
        if shared.has_moved(node) {
            shared.states.set(*first, Step::Supersede(None));
            break;
        }
        shared.states.set(*first, Step::Reuse);
        rest = others;
    }
    Vec::new()
}

/// Ends the build of the first node of `rest` with a failure. Returns the nodes
/// that can be tried again.
async fn fail<P>(shared: &BuildState<P>, rest: &[NodeId], failure: Box<NodeFailure>) -> Batch {
    match shared.fail(rest[0], failure).await {
        true => rest.to_vec(),
        false => Vec::new(),
    }
}

async fn start<P: Provider>(shared: &BuildState<P>, rest: &[NodeId], lock: KeyLock) -> Batch {
    let node = shared.graph.node(rest[0]);
    let job = if matches!(node.work, Work::Export(_)) { 1 } else { JOB };
    // A semaphore that is never closed always gives its permits.
    let mut job = shared.jobs.acquire_many(job).await.ok();
    let lock = Arc::new(lock);
    let result = match &node.work {
        Work::Bootstrap(_) | Work::Import { .. } => base(shared, rest[0], lock).await,
        Work::Export(format) => export(shared, rest[0], *format, lock).await,
        Work::Layer(_) | Work::Check(_) | Work::Seal => {
            let _memory = shared.reserve(node).await;
            return machine(shared, rest, lock, &mut job).await;
        }
    };
    match result {
        Ok(built) => {
            shared.states.set(rest[0], Step::Build(built));
            Vec::new()
        }
        Err(failure) => fail(shared, rest, failure).await,
    }
}

async fn base<P: Provider>(shared: &BuildState<P>, id: NodeId, lock: Arc<KeyLock>) -> Made {
    let build = NodeBuild::begin(shared, id, lock);
    let node = build.node;
    let staging = build.staging()?;
    let (sink, name) = (shared.sink.clone(), node.name.clone());
    let lines: Lines =
        Arc::new(move |line: &str| sink(Event::Output { node: name.clone(), line: line.to_owned() }));
    let created = match &node.work {
        Work::Import { file, sha256 } => {
            build.phase("copy");
            // Check and convert a copy: the file of the project may change
            // meanwhile.
            let copy = staging.path().join("import");
            let (project, path, to) = (shared.project.clone(), file.path.clone(), copy.clone());
            let copied = tokio::task::spawn_blocking(move || {
                std::io::copy(&mut project.open_file(&path)?, &mut std::fs::File::create(to)?)
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
        Work::Bootstrap(bootstrap) => {
            build.phase("bootstrap");
            let Some(distribution) = base::find(shared.distributions, &bootstrap.distribution) else {
                let message = format!("vimg knows no distribution `{}`", bootstrap.distribution);
                return Err(build.failure(FailureKind::Recipe, message));
            };
            let (size, dir) = (node.machine.disk, staging.path());
            let wanted = Wanted { bootstrap, size, dir, access: &shared.access, lines: &lines };
            distribution.make(wanted).await.map_err(|e| build.provider_failure(e))?
        }
        _ => return Err(build.failure(FailureKind::Recipe, "the node is not a base")),
    };
    let disk = staging.path().join(DiskKind::Qcow2.file_name());
    shared.disks.import(&created.disk, &disk).await.map_err(|e| build.provider_failure(e))?;
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
        trusted_filesystem: matches!(node.work, Work::Bootstrap(_)),
        way: shared.disks.name(),
        source: None,
        inherited: Vec::new(),
        same: None,
    };
    build.phase("store");
    build.commit(staging, made).await.map(|(_, built)| built)
}

async fn export<P: Provider>(
    shared: &BuildState<P>,
    id: NodeId,
    format: DiskFormat,
    lock: Arc<KeyLock>,
) -> Made {
    let build = NodeBuild::begin(shared, id, lock);
    let node = build.node;
    build.phase("convert");
    let kind = DiskKind::from(format);
    let store = &shared.store;
    let parent = node.parent().map(|parent| shared.graph.node(parent)).ok_or_else(|| build.gone())?;
    let source = store.record(&parent.key).map(|record| (parent.key, record.id));
    let chain = source.and_then(|source| store.chain_of(&source)).ok_or_else(|| build.gone())?;
    copy_earlier(shared, id);
    let revised = match shared.staged.take_earlier(id) {
        Some(earlier) => earlier.revise(store, &*shared.disks, &chain).await,
        None => None,
    };
    let stood = source.and_then(|source| store.chain_of(&source)).is_some_and(|now| now == chain);
    let revised = revised.filter(|_| stood);
    let (staging, copies) = match revised {
        Some(revised) => revised,
        None => {
            let staging = build.staging()?;
            let exported = shared.disks.export(&chain, format, &staging.path().join(kind.file_name())).await;
            exported.map_err(|e| build.provider_failure(e))?;
            (staging, Copies::new())
        }
    };
    shared.staged.begin(id, &node.key, &staging.path().join(kind.file_name()), copies);
    build.phase("store");
    let made = Facts { source, ..Facts::of(kind, shared.disks.name()) };
    build.commit(staging, made).await.map(|(_, built)| built)
}

/// Begins to copy the previous output, if most of the new one is probably in
/// it.
pub(super) fn copy_earlier<P>(shared: &BuildState<P>, id: NodeId) {
    let (node, store) = (shared.graph.node(id), &shared.store);
    if !matches!(node.work, Work::Export(DiskFormat::Qcow2)) || shared.staged.has_earlier(id) {
        return;
    }
    let same_way = |record: &Record| {
        let fields = |d: &Description| d.own().cloned().collect::<Vec<_>>();
        fields(&record.description) == fields(&node.description)
    };
    let earlier = shared.notes.nodes().get(&node.name).and_then(|key| store.record(key)).filter(same_way);
    // On another base, hardly a block would be the same.
    let lowest = |chain: &[PathBuf]| chain.first().cloned();
    let below = |id: NodeId| shared.graph.node(id).parent();
    let layer = below(id).map(|seal| below(seal).unwrap_or(seal)).map(|id| shared.graph.node(id).key);
    let base = layer.and_then(|key| lowest(&store.chain(&key)?));
    let before = earlier.and_then(|record| {
        let (state, source) = ((record.key, record.id), record.source?);
        let disk = store.state_dir(&record.key).join(record.disk.kind.file_name());
        let chain = store.chain_of(&source).filter(|chain| lowest(chain) == base)?;
        Some(Before { state, source, exported: Exported { disk, chain } })
    });
    if let (Some(before), Ok(staging)) = (before, store.staging()) {
        shared.staged.copy_earlier(id, before, staging);
    }
}

async fn machine<P: Provider>(
    shared: &BuildState<P>,
    rest: &[NodeId],
    first_lock: Arc<KeyLock>,
    job: &mut Option<SemaphorePermit<'_>>,
) -> Batch {
    let mut build = NodeBuild::begin(shared, rest[0], first_lock);
    // The instance's own files must outlive the staging directories of its
    // states.
    let (scratch, mut staging) = match (build.staging(), build.staging()) {
        (Ok(scratch), Ok(staging)) => (scratch, staging),
        (Err(failure), _) | (_, Err(failure)) => return fail(shared, rest, failure).await,
    };
    let network = rest.iter().any(|id| wants_network(&shared.graph.node(*id).work));
    let Some(parent) = build.node.parent().map(|id| shared.graph.node(id)) else {
        return fail(shared, rest, build.gone()).await;
    };
    let stand = up::Stand {
        state: parent,
        machine: build.node.machine,
        needs: build.node.needs,
        network,
        opens: false,
        chain: None,
        retarget: Retarget::Stored,
        lasting: None,
    };
    let overlay = staging.path().join(DiskKind::Qcow2.file_name());
    let mut running = match up::up(&build, &stand, scratch.path(), &overlay).await {
        Ok(up) => layer::Running::on(up, job.as_mut().and_then(|job| job.split(JOB as usize - 1))),
        Err(failure) => return fail(shared, rest, failure).await,
    };
    for (n, id) in rest.iter().enumerate() {
        let node = shared.graph.node(*id);
        if n > 0 {
            // The machine's disk is this node's parent now. Do not wait for
            // another process that builds the node: this one would hold a
            // machine meanwhile.
            let lock = match shared.store.try_lock(&node.key) {
                Ok(Some(lock)) if !shared.store.has(&node.key) => Arc::new(lock),
                Ok(_) => {
                    running.guest.stop().await;
                    return rest[n..].to_vec();
                }
                Err(error) => {
                    running.guest.stop().await;
                    let failure = NodeFailure::store(&node.name, &error);
                    return fail(shared, &rest[n..], Box::new(failure)).await;
                }
            };
            build = NodeBuild::begin(shared, *id, lock);
        }
        let next = match build.staging() {
            Ok(next) => next,
            Err(failure) => {
                running.guest.stop().await;
                return fail(shared, &rest[n..], failure).await;
            }
        };
        let last = n + 1 == rest.len();
        let spent = std::mem::replace(&mut staging, next);
        let next_disk = staging.path().join(DiskKind::Qcow2.file_name());
        match layer::make(&build, &mut running, spent, &next_disk, last).await {
            Ok(built) => {
                if shared.has_moved(node) {
                    shared.states.set(*id, Step::Supersede(Some(built)));
                    break;
                }
                shared.states.set(*id, Step::Build(built));
            }
            Err(failure) => {
                running.guest.stop().await;
                return fail(shared, &rest[n..], failure).await;
            }
        }
    }
    running.guest.stop().await;
    Vec::new()
}

/// Whether a layer may need the network.
fn wants_network(work: &Work) -> bool {
    match work {
        Work::Layer(work) => work.steps.iter().any(Order::wants_network),
        _ => false,
    }
}

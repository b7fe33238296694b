//! Converts a sealed state to the file of an output.

use std::path::PathBuf;
use std::sync::Arc;

use vimg_lang::model::DiskFormat;

use super::batch_context::BatchContext;
use super::make::{Facts, Made, NodeBuild};
use super::node_failure::{FailureKind, NodeFailure};
use super::order::{Export, NodeOrder, Task};
use super::staged::{Before, Copies};
use super::worker::Worker;
use crate::digest::Description;
use crate::disk::{Exported, Problem};
use crate::provider::Provider;
use crate::store::{DiskKind, KeyLock, Record};

/// Writes an output, from a copy of the previous one if there is one. `own` says
/// that vimg made the disk.
pub(super) async fn export<P: Provider>(
    batch: &BatchContext<P>,
    n: usize,
    (export, own): (Export, bool),
    lock: Arc<KeyLock>,
) -> Made {
    let build = NodeBuild::begin(batch, n, lock);
    let (worker, node) = (build.worker, build.node);
    let kind = DiskKind::from(export.format);
    let store = &worker.store;
    let parent = node.parent.ok_or_else(|| build.gone())?;
    let source = store.record(&parent).map(|record| (parent, record.id));
    let chain = source.and_then(|source| store.chain_of(&source)).ok_or_else(|| build.gone())?;
    inspect(&build, &chain, own).await?;
    build.phase("convert");
    copy_earlier(worker, node);
    let revised = match worker.staged.take_earlier(&node.name) {
        Some(earlier) => earlier.revise(store, &*worker.disks, &chain).await,
        None => None,
    };
    let stood = source.and_then(|source| store.chain_of(&source)).is_some_and(|now| now == chain);
    let revised = revised.filter(|_| stood);
    let (staging, copies) = match revised {
        Some(revised) => revised,
        None => {
            let staging = build.staging()?;
            let to = staging.path().join(kind.file_name());
            let exported = worker.disks.export(&chain, export.format, export.size, &to).await;
            exported.map_err(|e| build.provider_failure(e))?;
            (staging, Copies::new())
        }
    };
    worker.staged.begin(&node.name, &node.key, &staging.path().join(kind.file_name()), copies);
    build.phase("store");
    let made = Facts { source, ..Facts::of(kind, worker.disks.name()) };
    build.commit(staging, made).await.map(|(_, built)| built)
}

async fn inspect<P: Provider>(
    build: &NodeBuild<'_, P>,
    chain: &[PathBuf],
    own: bool,
) -> Result<(), Box<NodeFailure>> {
    let disks = &build.worker.disks;
    let found = disks.problems(chain, own).await.map_err(|e| build.provider_failure(e))?;
    let Some((problem, more)) = found.split_first() else { return Ok(()) };
    let message = format!("the disk would not boot, so nothing is written: {problem}");
    let mut failure = build.failure(FailureKind::Recipe, message);
    failure.tail = more.iter().map(Problem::to_string).collect();
    failure.help = Some(problem.help.clone());
    // Disks of lower states are there already, and reading one takes milliseconds.
    for n in 1..chain.len() {
        let since = disks.problems(&chain[..n], own).await.is_ok_and(|below| below.contains(problem));
        let record = build.worker.store.owner(&chain[n - 1]).filter(|_| since);
        if let Some(record) = record {
            failure.layer = record.name.split_once('@').map(|(_, layer)| layer.to_owned());
            failure.message.push_str(&format!(" (since {})", record.name));
            break;
        }
    }
    Err(failure)
}

/// Begins to copy the previous output, if most of the new one is probably in
/// it.
pub(super) fn copy_earlier<P>(worker: &Worker<P>, node: &NodeOrder) {
    let store = &worker.store;
    let Task::Export { export: Export { format: DiskFormat::Qcow2, .. }, layer, .. } = &node.task else {
        return;
    };
    if worker.staged.has_earlier(&node.name) {
        return;
    }
    let same_way = |record: &Record| {
        let fields = |d: &Description| d.own().cloned().collect::<Vec<_>>();
        fields(&record.description) == fields(&node.description)
    };
    let earlier = node.before.and_then(|key| store.record(&key)).filter(same_way);
    // On another base, hardly a block would be the same.
    let lowest = |chain: &[PathBuf]| chain.first().cloned();
    let base = layer.and_then(|key| lowest(&store.chain(&key)?));
    let before = earlier.and_then(|record| {
        let (state, source) = ((record.key, record.id), record.source?);
        let disk = store.state_dir(&record.key).join(record.disk.kind.file_name());
        let chain = store.chain_of(&source).filter(|chain| lowest(chain) == base)?;
        Some(Before { state, source, exported: Exported { disk, chain } })
    });
    if let (Some(before), Ok(staging)) = (before, store.staging()) {
        worker.staged.copy_earlier(&node.name, before, staging);
    }
}

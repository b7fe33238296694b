//! Starts a server, or boots it again from its disk.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use vimg_lang::model::Machine;

use super::super::change::{self, ServerContext};
use super::super::context::BuildContext;
use super::super::failure::Failure;
use super::super::node::NodeContext;
use super::super::node_failure::FailureKind;
use super::super::order::NodeOrder;
use super::super::up::{self, StartOptions};
use super::super::worker::Worker;
use super::hooks::live;
use super::ports::free_ports;
use super::record::{ServerRecord, launch, lead};
use super::running::{leave, runs};
use crate::graph::ServerPlan;
use crate::provider::{Instance, Lasting, Provider, Retarget};
use crate::store::{Record, ServerHome};

/// What `up` found or did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Came {
    /// It was already running.
    Running,
    /// It was off, and booted from its disk.
    Back,
    /// It is new.
    New,
}

/// Returns the context of a server.
pub(super) fn server<'a, P>(
    context: &'a BuildContext<P>,
    worker: &'a Worker<P>,
    node: &'a NodeOrder,
    plan: &'a ServerPlan,
) -> ServerContext<'a, P> {
    let site = NodeContext { worker, node };
    ServerContext { site, context, plan }
}

/// Starts a server, or boots it again from its disk.
pub async fn up<P: Provider>(
    context: &BuildContext<P>,
    plan: &ServerPlan,
    home: &ServerHome,
) -> Result<Came, Box<Failure>> {
    let worker = context.worker();
    let node = NodeOrder::new(&context.graph, plan.image, &BTreeMap::new());
    let server = server(context, &worker, &node, plan);
    if let Some(mut record) = home.record() {
        if runs(&*worker.provider, home.dir()).await {
            return Ok(Came::Running);
        }
        home.step_back(&mut record);
        if let Some(gone) = home.missing(&record) {
            let mut failure = server.host(format!("one of its disks is missing: {}", gone.display()));
            failure.help = Some(format!("`vimg down --force --remove {}` deletes the rest of it", plan.name));
            return Err(failure);
        }
        let lives = back(&server, home, &record).await?;
        return lives.map(|()| Came::Back);
    }
    if home.has_record() {
        let mut failure = server.host("its record can't be read, so its disk stays as it is".into());
        failure.help = Some(format!("if you do not need the disk, delete {}", home.dir().display()));
        return Err(failure);
    }
    // An earlier start may have been interrupted.
    if let Some(servers) = worker.provider.servers()
        && let Ok(Some(old)) = servers.find(home.dir()).await
    {
        old.stop().await;
    }
    home.forget()
        .and_then(|()| std::fs::create_dir_all(home.dir()))
        .map_err(|e| server.io_failure(home.dir(), e))?;
    let made = match free_ports(plan).await {
        Ok(()) => start(&server, home).await,
        Err(taken) => Err(taken),
    };
    if made.is_err() {
        let _ = home.forget();
    }
    made.map(|()| Came::New)
}

async fn start<P: Provider>(server: &ServerContext<'_, P>, home: &ServerHome) -> Result<(), Box<Failure>> {
    let ServerContext { site, context, plan } = server;
    let graph = &context.graph;
    let overlay = home.free_disk();
    let options = StartOptions {
        machine: plan.machine,
        lasting: Some(Lasting { forwards: plan.forwards.clone() }),
        ..StartOptions::of_person(site.node, Retarget::Never)
    };
    let up = up::up(site, &options, home.dir(), &home.dir().join(&overlay)).await;
    let up = up.map_err(|failure| server.placed(*failure))?;
    let mut found = up.guest;
    let chain = match own(server, home, &up.launch.chain, &up.record) {
        Ok(chain) => chain,
        Err(failure) => {
            found.stop().await;
            return Err(failure);
        }
    };
    let root = graph.node(graph.chain(plan.image)[0]).key;
    let Machine { cpus, memory, disk } = plan.machine;
    let mut record = ServerRecord {
        image: graph.node(plan.image).image.clone(),
        root,
        since: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
        forwards: Vec::new(),
        parts: plan.base.clone(),
        machine: (cpus, memory, disk),
        boot: up.record.boot,
        chain,
        overlay,
        changing: false,
        parting: plan.has_parting(),
    };
    lead(&mut record, &plan.forwards);
    let difference = plan.difference(&record.parts);
    let made = async {
        let change = change::prepare(server, &difference).await?;
        let parts = change::make(server, change, &mut found).await?;
        live(server, &mut found, "begin").await.map(|()| parts)
    };
    match made.await {
        Ok(parts) => {
            record.parts = parts;
            home.keep(&record).map_err(|e| server.io_failure(home.dir(), e))?;
            leave(&*site.worker.provider, found);
            Ok(())
        }
        Err(failure) => {
            found.stop().await;
            Err(failure)
        }
    }
}

/// Gives a server that has started everything that it stands on. Returns the
/// names of its disks.
fn own<P>(
    server: &ServerContext<'_, P>,
    home: &ServerHome,
    chain: &[PathBuf],
    state: &Record,
) -> Result<Vec<PathBuf>, Box<Failure>> {
    let store = &server.site.worker.store;
    let names = home.adopt(chain).and_then(|names| home.boot(store, &state.boot).map(|_| names));
    let names = names.map_err(|error| {
        let message = format!("it can't have hard links to its disks: {error}");
        let mut failure = server.failure(FailureKind::Store, &message);
        failure.help = Some("the store must be in one filesystem that has hard links".into());
        failure
    })?;
    // The links must be to the disks that the machine has started from.
    let stood = store.chain_of(&(state.key, state.id)).is_some_and(|now| now == chain);
    if stood { Ok(names) } else { Err(server.placed(*server.site.gone())) }
}

/// Boots a server from its disk. The inner result says whether its hooks
/// passed; it keeps running in any case.
pub(super) async fn back<P: Provider>(
    server: &ServerContext<'_, P>,
    home: &ServerHome,
    record: &ServerRecord,
) -> Result<Result<(), Box<Failure>>, Box<Failure>> {
    let ServerContext { site, plan, .. } = server;
    let boot = home.boot(&site.worker.store, &record.boot).map_err(|error| {
        let why = format!("its kernel or initrd is missing: {error}");
        let mut failure = server.failure(FailureKind::Store, &why);
        failure.help = Some("its disks are whole: `vimg save` writes them to a file".into());
        failure
    })?;
    let found = up::again(site, &launch(home, record, boot)).await;
    let mut found = found.map_err(|failure| server.placed(*failure))?;
    home.keep(record).map_err(|e| server.io_failure(home.dir(), e))?;
    let lives = live(server, &mut found, "live").await.map_err(|mut failure| {
        failure.help = Some(format!("the server runs; `vimg restart {}` tries again", plan.name));
        failure
    });
    leave(&*site.worker.provider, found);
    Ok(lives)
}

//! Starts an instance on a state: boots its machine, forks a memory snapshot,
//! or starts an appliance or a container with its disk.

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use vimg_lang::model::Machine;

use super::explain::explain;
use super::guest::{Guest, Stopped};
use super::node::NodeContext;
use super::node_failure::{FailureKind, NodeFailure};
use super::order::{Needs, NodeOrder, Task};
use super::retargeted;
use super::session::SessionError;
use crate::digest::Key;
use crate::provider::{Ended, Instance, Lasting, Launch, Offline, Place, Provider, Retarget};
use crate::store::{Disk, DiskKind, Record};

/// How often a machine tries to store or resume a memory snapshot before it
/// just boots.
const TRIES: u32 = 2;

/// An instance whose agent is ready.
pub(super) struct Up<I: Instance> {
    pub(super) guest: Guest<I>,
    /// How it was launched, with the disks below its own.
    pub(super) launch: Launch,
    /// The record of the state that was asked for.
    pub(super) record: Record,
    /// The disk that takes its writes.
    pub(super) disk: Disk,
}

/// The state that an instance starts on, and its options.
pub(super) struct Stand {
    /// The state whose disk it gets.
    pub(super) state: Key,
    /// The size of the machine.
    pub(super) machine: Machine,
    /// Whether it is a machine, or an appliance or container.
    pub(super) needs: Needs,
    /// Whether something in it may need the network.
    pub(super) network: bool,
    /// Whether the network is open from the start. Otherwise, layers open it
    /// for each step.
    pub(super) opens: bool,
    /// Disks to use instead of the state's.
    pub(super) chain: Option<Vec<PathBuf>>,
    /// Whether a snapshot of a near-identical disk may be used.
    pub(super) retarget: Retarget,
    /// Set for a server: it continues when vimg ends.
    pub(super) lasting: Option<Lasting>,
}

impl Stand {
    /// Returns the options for a check: a machine on `state` that is thrown
    /// away.
    pub(super) fn of_check(check: &NodeOrder, state: Key) -> Self {
        Self {
            state,
            machine: check.machine,
            needs: check.needs,
            network: matches!(&check.task, Task::Check(check) if check.network),
            opens: true,
            chain: None,
            retarget: Retarget::Discarded,
            lasting: None,
        }
    }

    /// Returns the options for a person: a machine on the state of a node, with
    /// a network.
    pub(super) fn of_person(node: &NodeOrder, retarget: Retarget) -> Self {
        let (state, machine, needs) = (node.key, node.machine, Needs::Machine);
        Self { state, machine, needs, network: true, opens: true, chain: None, retarget, lasting: None }
    }
}

/// Returns the request to launch an instance, and the record of its state.
pub(super) fn prepare<P: Provider>(
    site: &NodeContext<'_, P>,
    stand: &Stand,
    scratch: &Path,
    overlay: &Path,
) -> Result<(Launch, Record), Box<NodeFailure>> {
    let worker = site.worker;
    let record = worker.store.record(&stand.state).ok_or_else(|| site.gone())?;
    let own = || worker.store.chain(&stand.state);
    let chain = stand.chain.clone().or_else(own).ok_or_else(|| site.gone())?;
    let offline = (stand.needs == Needs::Disk)
        .then(|| Offline { appliance: site.boot_paths(&record.appliance), ours: record.trusted_filesystem });
    let kept = worker.use_snapshots && stand.needs == Needs::Machine && stand.chain.is_none();
    let launch = Launch {
        chain,
        overlay: overlay.to_owned(),
        again: false,
        machine: Machine { ..stand.machine },
        boot: site.boot_paths(&record.boot),
        offline,
        memory: kept.then(|| format!("{}:{}", stand.state, record.id)),
        network: stand.network,
        retarget: stand.retarget,
        scratch: scratch.to_owned(),
        lasting: stand.lasting.clone(),
    };
    Ok((launch, record))
}

/// Starts an instance and waits until its agent is ready.
pub(super) async fn up<P: Provider>(
    site: &NodeContext<'_, P>,
    stand: &Stand,
    scratch: &Path,
    overlay: &Path,
) -> Result<Up<P::Instance>, Box<NodeFailure>> {
    let (mut launch, record) = prepare(site, stand, scratch, overlay)?;
    let (mut tries, mut refused, mut hung) = (0, None::<String>, false);
    loop {
        if tries == TRIES {
            launch.memory = None;
        }
        let mut guest = start(site, &launch).await?;
        let mut place = guest.instance.place();
        let mut on = ((stand.state, record.id), record.disk.depth);
        if let Place::Retargeted(retargeted) = &mut place
            && launch.retarget == Retarget::Stored
        {
            match retargeted::vet(&site.worker.store, &launch.chain, retargeted) {
                Ok((below, altered)) => {
                    // The layer built here lies on another state than the recipe's.
                    let _ = site.worker.store.lease_more(&site.worker.lease, [below.key]);
                    on = ((below.key, below.id), below.disk.depth);
                    retargeted.altered = altered;
                }
                Err(why) => {
                    guest.stop().await;
                    refused = Some(why);
                    launch.retarget = Retarget::Never;
                    continue;
                }
            }
        }
        if place == Place::Machine
            && let Some(why) = refused.take()
        {
            tell_why(site, &why);
        }
        let snapshots = site.worker.provider.snapshots();
        let saves = snapshots.filter(|snapshots| snapshots.can_save(&guest.instance));
        let way_out = guest.instance.way_out();
        let ready = guest.ask(async |session| {
            let units = session.ready(place == Place::Machine).await?;
            match &place {
                Place::Outside(network) => session.prepare(network.clone()).await?,
                Place::Forked => session.resume().await?,
                Place::Retargeted(retargeted) => session.retarget(&retargeted.altered).await?,
                Place::Machine if saves.is_some() => session.prepare_snapshot().await?,
                Place::Machine => {}
            }
            // Layers open it per step; other users get it at once.
            if stand.opens && stand.network {
                way_out.set(true).await.map_err(SessionError::from)?;
            }
            Ok(units)
        });
        match ready.await {
            Ok(units) => tell_failed(site, &units),
            // The snapshot is good, but the agent can't retarget it to this
            // disk.
            Err(Stopped::Session(SessionError::Refused(why))) if matches!(place, Place::Retargeted(_)) => {
                guest.stop().await;
                refused = Some(why);
                launch.retarget = Retarget::Never;
                continue;
            }
            // Only the boot is repeated: no layer has begun.
            Err(Stopped::Ended(Ended::Hangs(seconds))) if place == Place::Machine && !hung => {
                hung = true;
                guest.stop().await;
                let stuck = format!("its processors were stuck for {seconds} s");
                site.notice(&format!("the machine hung while it booted ({stuck}); vimg boots it again"));
                continue;
            }
            Err(trouble) => {
                if let Some(snapshots) = snapshots {
                    snapshots.distrust(&mut guest.instance);
                }
                if matches!(place, Place::Forked | Place::Retargeted(_)) {
                    tries += u32::from(place == Place::Forked);
                    launch.retarget = Retarget::Never;
                    guest.stop().await;
                    site.notice("a memory snapshot can't be resumed; the machine boots");
                    continue;
                }
                let failure = explain(site, &mut guest.instance, trouble, None).await;
                guest.stop().await;
                return Err(failure);
            }
        }
        let Some(saves) = saves else {
            // Its writes go on top of the disks that it booted from.
            if let Place::Retargeted(retargeted) = place {
                launch.chain = retargeted.chain;
            }
            let (backing, depth) = (Some(on.0), on.1 + 1);
            let disk = Disk { kind: DiskKind::Qcow2, backing, depth };
            return Ok(Up { guest, launch, record, disk });
        };
        // Save its memory now, so that it never has to boot again. The loop
        // then forks it.
        tries += 1;
        site.phase("keep");
        if let Err(error) = saves.save(guest.close()).await {
            site.notice(&format!("{error}; vimg boots the machine again"));
            launch.memory = None;
        }
    }
}

/// Starts an instance and opens the conversation with its agent.
async fn start<P: Provider>(
    site: &NodeContext<'_, P>,
    launch: &Launch,
) -> Result<Guest<P::Instance>, Box<NodeFailure>> {
    site.phase("start");
    let instance = site.worker.provider.launch(launch).await.map_err(|e| site.provider_failure(e))?;
    let guest = Guest::connect(instance)
        .map_err(|_| site.failure(FailureKind::Host, "the machine has no agent port"))?;
    if guest.instance.place() == Place::Machine {
        site.worker.boots.fetch_add(1, Ordering::Relaxed);
        let snapshots = site.worker.provider.snapshots();
        if let Some(why) = snapshots.and_then(|snapshots| snapshots.boot_reason(&guest.instance)) {
            tell_why(site, &why);
        }
        site.phase("boot");
    }
    Ok(guest)
}

/// Boots a machine that was switched off, and waits until its agent is ready.
pub(super) async fn again<P: Provider>(
    site: &NodeContext<'_, P>,
    launch: &Launch,
) -> Result<Guest<P::Instance>, Box<NodeFailure>> {
    let mut guest = start(site, launch).await?;
    match guest.ask(async |session| session.ready(true).await).await {
        Ok(units) => {
            tell_failed(site, &units);
            Ok(guest)
        }
        Err(trouble) => {
            let failure = explain(site, &mut guest.instance, trouble, None).await;
            guest.stop().await;
            Err(failure)
        }
    }
}

/// Sends the reason why a machine boots although there is a snapshot of a
/// near-identical disk.
fn tell_why<P>(site: &NodeContext<'_, P>, why: &str) {
    site.line(&super::log::clean(&format!("the machine boots: {why}")));
}

/// Sends the names of the units that failed to start.
pub(super) fn tell_failed<P>(site: &NodeContext<'_, P>, units: &[String]) {
    if !units.is_empty() {
        site.line(&super::log::clean(&format!("units that failed at boot: {}", units.join(" "))));
    }
}

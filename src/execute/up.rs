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
use crate::store::{Disk, DiskKind, Record, StateId};

/// How often a machine tries to store or resume a memory snapshot before it
/// just boots.
const TRIES: u32 = 2;

/// An instance whose agent is ready.
pub(super) struct Started<I: Instance> {
    pub(super) guest: Guest<I>,
    /// How it was launched, with the disks below its own.
    pub(super) launch: Launch,
    /// The record of the state that was asked for.
    pub(super) record: Record,
    /// The disk that takes its writes.
    pub(super) disk: Disk,
}

/// The state that an instance starts on, and its options.
pub(super) struct StartOptions {
    /// The state whose disk it gets.
    pub(super) state: Key,
    /// The size of the machine.
    pub(super) machine: Machine,
    /// Words for the kernel's command line, besides vimg's own.
    pub(super) parameters: String,
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

impl StartOptions {
    /// Returns the options for a check: a machine on `state` that is thrown
    /// away.
    pub(super) fn of_check(check: &NodeOrder, state: Key) -> Self {
        Self {
            state,
            machine: check.machine,
            parameters: check.parameters.line(),
            needs: check.needs,
            network: matches!(&check.task, Task::Check(check) if check.network),
            opens: true,
            chain: None,
            retarget: Retarget::Discarded,
            lasting: None,
        }
    }

    /// Returns the options for layers and seals that become states, on `state`.
    pub(super) fn of_layers(first: &NodeOrder, state: Key, network: bool) -> Self {
        Self {
            state,
            machine: first.machine,
            parameters: first.parameters.line(),
            needs: first.needs,
            network,
            opens: false,
            chain: None,
            retarget: Retarget::Stored,
            lasting: None,
        }
    }

    /// Returns the options for a person: a machine on the state of a node, with
    /// a network.
    pub(super) fn of_person(node: &NodeOrder, retarget: Retarget) -> Self {
        Self {
            state: node.key,
            machine: node.machine,
            parameters: node.task.parameters(&node.parameters, usize::MAX).line(),
            needs: Needs::Machine,
            network: true,
            opens: true,
            chain: None,
            retarget,
            lasting: None,
        }
    }

    /// Returns the options for reads of the disk of a node's state, in an appliance
    /// or container without a network.
    pub(super) fn of_disk(node: &NodeOrder) -> Self {
        Self {
            state: node.key,
            machine: node.machine,
            parameters: node.task.parameters(&node.parameters, usize::MAX).line(),
            needs: Needs::Disk,
            network: false,
            opens: false,
            chain: None,
            retarget: Retarget::Never,
            lasting: None,
        }
    }
}

/// Returns the request to launch an instance, and the record of its state.
pub(super) fn prepare<P: Provider>(
    site: &NodeContext<'_, P>,
    options: &StartOptions,
    scratch: &Path,
    overlay: &Path,
) -> Result<(Launch, Record), Box<NodeFailure>> {
    let worker = site.worker;
    let record = worker.store.record(&options.state).ok_or_else(|| site.gone())?;
    let own = || worker.store.chain(&options.state);
    let chain = options.chain.clone().or_else(own).ok_or_else(|| site.gone())?;
    let offline = (options.needs == Needs::Disk).then(|| Offline {
        appliance: site.boot_paths(&record.appliance),
        trusted_filesystem: record.trusted_filesystem,
    });
    let kept = worker.use_snapshots && options.needs == Needs::Machine && options.chain.is_none();
    let launch = Launch {
        chain,
        overlay: overlay.to_owned(),
        again: false,
        machine: Machine { ..options.machine },
        parameters: options.parameters.clone(),
        boot: site.boot_paths(&record.boot),
        offline,
        memory: kept.then(|| format!("{}:{}", options.state, record.id)),
        network: options.network,
        retarget: options.retarget,
        scratch: scratch.to_owned(),
        watched: false,
        lasting: options.lasting.clone(),
    };
    Ok((launch, record))
}

/// Starts an instance and waits until its agent is ready.
pub(super) async fn up<P: Provider>(
    site: &NodeContext<'_, P>,
    options: &StartOptions,
    scratch: &Path,
    overlay: &Path,
) -> Result<Started<P::Instance>, Box<NodeFailure>> {
    let (mut launch, record) = prepare(site, options, scratch, overlay)?;
    let mut attempts = Attempts::default();
    loop {
        if attempts.tries == TRIES {
            launch.memory = None;
        }
        let mut guest = start(site, &launch).await?;
        let mut place = guest.instance.place();
        let parent = match lies_on(site, &launch, &record, &mut place) {
            Ok(parent) => parent,
            Err(why) => {
                guest.stop().await;
                attempts.refuse(&mut launch, why);
                continue;
            }
        };
        if place == Place::Machine
            && let Some(why) = attempts.refused.take()
        {
            tell_why(site, &why);
        }
        let snapshots = site.worker.provider.snapshots();
        let saves = snapshots.filter(|snapshots| snapshots.can_save(&guest.instance));
        match make_ready(&mut guest, &place, saves.is_some(), options.opens && options.network).await {
            Ok(units) => tell_failed(site, &units),
            Err(trouble) => {
                attempts.after_failure(site, &mut launch, guest, &place, trouble).await?;
                continue;
            }
        }
        let Some(saves) = saves else {
            // Its writes go on top of the disks that it booted from.
            if let Place::Retargeted(retargeted) = place {
                launch.chain = retargeted.chain;
            }
            let disk = Disk { kind: DiskKind::Qcow2, backing: Some(parent.0), depth: parent.1 + 1 };
            return Ok(Started { guest, launch, record, disk });
        };
        // Save its memory now, so that it never has to boot again. The loop
        // then forks it.
        attempts.tries += 1;
        site.phase("keep");
        if let Err(error) = saves.save(guest.close()).await {
            site.notice(&format!("{error}; vimg boots the machine again"));
            launch.memory = None;
        }
    }
}

/// Returns the state that the new disk lies on, and the depth of that state's
/// disk. This is the recipe's, or for a retargeted fork whose result is stored
/// the one that its snapshot was made of. The error is the reason why the fork
/// can't be used.
fn lies_on<P: Provider>(
    site: &NodeContext<'_, P>,
    launch: &Launch,
    record: &Record,
    place: &mut Place,
) -> Result<((Key, StateId), u32), String> {
    if let Place::Retargeted(retargeted) = place
        && launch.retarget == Retarget::Stored
    {
        let (below, altered) = retargeted::vet(&site.worker.store, &launch.chain, retargeted)?;
        // The layer built here lies on another state than the recipe's.
        let _ = site.worker.store.lease_more(&site.worker.lease, [below.key]);
        retargeted.altered = altered;
        return Ok(((below.key, below.id), below.disk.depth));
    }
    Ok(((record.key, record.id), record.disk.depth))
}

/// Waits until the agent of an instance is ready, and prepares it for its
/// work. `saves` says that its memory is saved next. `opens` opens its network:
/// layers open it for each step, other users at once. Returns the units that
/// failed to start.
async fn make_ready<I: Instance>(
    guest: &mut Guest<I>,
    place: &Place,
    saves: bool,
    opens: bool,
) -> Result<Vec<String>, Stopped> {
    let way_out = guest.instance.way_out();
    let ready = guest.ask(async |session| {
        let units = session.ready(*place == Place::Machine).await?;
        match place {
            Place::Outside(network) => session.prepare(network.clone()).await?,
            Place::Forked => session.resume().await?,
            Place::Retargeted(retargeted) => session.retarget(&retargeted.altered).await?,
            Place::Machine if saves => session.prepare_snapshot().await?,
            Place::Machine => {}
        }
        if opens {
            way_out.set(true).await.map_err(SessionError::from)?;
        }
        Ok(units)
    });
    ready.await
}

/// The attempts to start an instance.
#[derive(Default)]
struct Attempts {
    /// How often storing or resuming a snapshot was tried.
    tries: u32,
    /// Why the last fork could not be retargeted, until it is reported.
    refused: Option<String>,
    /// Whether a machine hung while it booted.
    hung: bool,
}

impl Attempts {
    /// Has the next attempt use no snapshot of another disk.
    fn refuse(&mut self, launch: &mut Launch, why: String) {
        self.refused = Some(why);
        launch.retarget = Retarget::Never;
    }

    /// Stops an instance that did not get ready, and changes `launch` for
    /// another attempt. The error says that there is none.
    async fn after_failure<P: Provider>(
        &mut self,
        site: &NodeContext<'_, P>,
        launch: &mut Launch,
        mut guest: Guest<P::Instance>,
        place: &Place,
        trouble: Stopped,
    ) -> Result<(), Box<NodeFailure>> {
        match trouble {
            // The snapshot is good, but the agent can't retarget it to this
            // disk.
            Stopped::Session(SessionError::Refused(why)) if matches!(place, Place::Retargeted(_)) => {
                guest.stop().await;
                self.refuse(launch, why);
                Ok(())
            }
            // Only the boot is repeated: no layer has begun.
            Stopped::Ended(Ended::Hangs(seconds)) if *place == Place::Machine && !self.hung => {
                self.hung = true;
                guest.stop().await;
                let stuck = format!("its processors were stuck for {seconds} s");
                site.notice(&format!("the machine hung while it booted ({stuck}); vimg boots it again"));
                Ok(())
            }
            trouble => {
                if let Some(snapshots) = site.worker.provider.snapshots() {
                    snapshots.distrust(&mut guest.instance);
                }
                if matches!(place, Place::Forked | Place::Retargeted(_)) {
                    self.tries += u32::from(*place == Place::Forked);
                    launch.retarget = Retarget::Never;
                    guest.stop().await;
                    site.notice("a memory snapshot can't be resumed; the machine boots");
                    return Ok(());
                }
                let failure = explain(site, &mut guest.instance, trouble, None).await;
                guest.stop().await;
                Err(failure)
            }
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

//! Gets an instance up on a state: booted, forked from a machine that was
//! kept, or outside of its machine, on the disk alone.

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use vimg_lang::model::Machine;

use super::explain::{Trouble, explain};
use super::run::{Making, gone};
use super::session::Session;
use super::{Failure, FailureKind};
use crate::digest::Key;
use crate::event::Event;
use crate::graph::Needs;
use crate::provider::{Instance, Launch, Memory, Offline, Place, Provider};
use crate::store::{Boot, Record, Staging, StateId};

/// How often a machine is started that others fork, or that was forked, before
/// it is only booted.
const TRIES: u32 = 2;

/// An instance that is up.
pub(super) struct Up<I: Instance> {
    pub(super) instance: I,
    pub(super) session: Session<I::Channel>,
    /// The disks below the one that takes the writes.
    pub(super) chain: Vec<PathBuf>,
    /// The state that it stands on.
    pub(super) parent: Key,
    pub(super) record: Record,
    /// Kept as long as the instance, if nobody else keeps it.
    pub(super) scratch: Option<Staging>,
}

/// Names a state's disk for who keeps memories of machines.
pub(super) fn name(key: &Key, id: StateId) -> String {
    format!("{key}:{id}")
}

/// Starts an instance on the node's parent and waits until its agent is up.
/// `again` says that it may be kept once more when it has gone on.
pub(super) async fn up<P: Provider>(
    making: &Making<'_, P>,
    network: bool,
    again: bool,
    scratch: &Staging,
    overlay: &Path,
) -> Result<Up<P::Instance>, Box<Failure>> {
    let (shared, node) = (making.shared, making.node);
    let parent = node.parent.map(|id| shared.graph.node(id)).ok_or_else(|| gone(making))?;
    let record = shared.store.record(&parent.key).ok_or_else(|| gone(making))?;
    let chain = shared.store.chain(&parent.key).ok_or_else(|| gone(making))?;
    // Kernel and initrd, if they are still in the store.
    let files = |boot: &Option<Boot>| {
        let boot = boot.filter(|b| shared.store.has_blob(&b.kernel) && shared.store.has_blob(&b.initrd))?;
        Some((shared.store.blob(&boot.kernel.digest), shared.store.blob(&boot.initrd.digest)))
    };
    let offline = (node.needs == Needs::Disk).then(|| Offline {
        appliance: files(&record.appliance),
        ours: record.ours,
        network,
    });
    let kept = shared.keep_memory && node.needs == Needs::Machine;
    let mut launch = Launch {
        chain: chain.clone(),
        overlay: overlay.to_owned(),
        machine: Machine { ..node.machine },
        boot: files(&record.boot),
        offline,
        memory: kept.then(|| Memory { of: name(&parent.key, record.id), again }),
        scratch: scratch.path().to_owned(),
    };
    for tries in 1.. {
        if tries > TRIES {
            launch.memory = None;
        }
        making.phase("start");
        let mut instance = shared.provider.launch(&launch).await.map_err(|e| making.provider_failure(e))?;
        let channel = instance
            .channel()
            .ok_or_else(|| making.failure(FailureKind::Host, "the machine has no agent port"))?;
        let place = instance.place();
        if place == Place::Machine {
            shared.boots.fetch_add(1, Ordering::Relaxed);
            making.phase("boot");
        }
        let mut session = Session::new(channel);
        let first = instance.has_just_booted();
        let ready = async {
            let units = session.ready(place == Place::Machine).await?;
            match &place {
                Place::Outside(network) => session.prepare(network.clone()).await?,
                Place::Forked => session.wake().await?,
                Place::Machine if first => session.freeze().await?,
                Place::Machine => {}
            }
            Ok(units)
        };
        let units = tokio::select! {
            ready = ready => ready.map_err(Trouble::Session),
            ended = instance.ended() => Err(Trouble::Ended(ended)),
        };
        match units {
            Ok(units) if !units.is_empty() => {
                making.line(&super::log::clean(&format!("units that failed at boot: {}", units.join(" "))));
            }
            Ok(_) => {}
            Err(trouble) => {
                instance.distrust();
                if place == Place::Forked && tries <= TRIES {
                    instance.stop().await;
                    notice(making, "a kept machine does not go on; it boots");
                    continue;
                }
                let failure = explain(making, &mut instance, trouble, None).await;
                instance.stop().await;
                return Err(failure);
            }
        }
        if !first {
            return Ok(Up { instance, session, chain, parent: parent.key, record, scratch: None });
        }
        // Kept as it is now, it never has to boot again.
        making.phase("keep");
        drop(session);
        if let Err(error) = instance.keep(None).await {
            notice(making, &format!("{error}; it boots again"));
            launch.memory = None;
        }
    }
    Err(gone(making))
}

fn notice<P: Provider>(making: &Making<'_, P>, text: &str) {
    making.shared.tell(Event::Notice { text: text.to_owned() });
}

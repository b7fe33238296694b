//! Gets an instance up on a state: booted, forked from a machine that was
//! kept, or outside of its machine, on the disk alone.

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use vimg_lang::model::Machine;

use super::explain::{Trouble, explain};
use super::session::Session;
use super::site::Site;
use super::{Failure, FailureKind};
use crate::digest::Key;
use crate::graph::{Needs, Node};
use crate::provider::{Instance, Launch, Offline, Place, Provider};
use crate::store::{Boot, Record, Staging};

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
}

/// What an instance is to stand on, and as what.
pub(super) struct Stand<'a> {
    /// The state whose disk it gets.
    pub(super) state: &'a Node,
    /// The machine, if it is to be booted.
    pub(super) machine: Machine,
    /// Whether it is to be booted.
    pub(super) needs: Needs,
    /// Whether what is done from outside of the machine may want the network.
    pub(super) network: bool,
    /// A disk on top of the state's that is no state.
    pub(super) on_top: Option<PathBuf>,
}

/// What to launch, and the record of the state below.
pub(super) fn prepare<P: Provider>(
    site: &Site<'_, P>,
    stand: &Stand<'_>,
    scratch: &Staging,
    overlay: &Path,
) -> Result<(Launch, Record), Box<Failure>> {
    let (shared, parent) = (site.shared, stand.state);
    let record = shared.store.record(&parent.key).ok_or_else(|| site.gone())?;
    let mut chain = shared.store.chain(&parent.key).ok_or_else(|| site.gone())?;
    chain.extend(stand.on_top.clone());
    // Kernel and initrd, if they are still in the store.
    let files = |boot: &Option<Boot>| {
        let boot = boot.filter(|b| shared.store.has_blob(&b.kernel) && shared.store.has_blob(&b.initrd))?;
        Some((shared.store.blob(&boot.kernel.digest), shared.store.blob(&boot.initrd.digest)))
    };
    let offline = (stand.needs == Needs::Disk).then(|| Offline {
        appliance: files(&record.appliance),
        ours: record.ours,
        network: stand.network,
    });
    let kept = shared.keep_memory && stand.needs == Needs::Machine && stand.on_top.is_none();
    let launch = Launch {
        chain,
        overlay: overlay.to_owned(),
        machine: Machine { ..stand.machine },
        boot: files(&record.boot),
        offline,
        memory: kept.then(|| format!("{}:{}", parent.key, record.id)),
        scratch: scratch.path().to_owned(),
    };
    Ok((launch, record))
}

/// Starts an instance and waits until its agent is up.
pub(super) async fn up<P: Provider>(
    site: &Site<'_, P>,
    stand: &Stand<'_>,
    scratch: &Staging,
    overlay: &Path,
) -> Result<Up<P::Instance>, Box<Failure>> {
    let shared = site.shared;
    let (mut launch, record) = prepare(site, stand, scratch, overlay)?;
    for tries in 1.. {
        if tries > TRIES {
            launch.memory = None;
        }
        site.phase("start");
        let mut instance = shared.provider.launch(&launch).await.map_err(|e| site.provider_failure(e))?;
        let channel = instance
            .channel()
            .ok_or_else(|| site.failure(FailureKind::Host, "the machine has no agent port"))?;
        let place = instance.place();
        if place == Place::Machine {
            shared.boots.fetch_add(1, Ordering::Relaxed);
            site.phase("boot");
        }
        let mut session = Session::new(channel);
        let first = instance.can_be_kept();
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
                site.line(&super::log::clean(&format!("units that failed at boot: {}", units.join(" "))));
            }
            Ok(_) => {}
            Err(trouble) => {
                instance.distrust();
                if place == Place::Forked && tries <= TRIES {
                    instance.stop().await;
                    site.notice("a kept machine does not go on; it boots");
                    continue;
                }
                let failure = explain(site, &mut instance, trouble, None).await;
                instance.stop().await;
                return Err(failure);
            }
        }
        if !first {
            let (chain, parent) = (launch.chain, stand.state.key);
            return Ok(Up { instance, session, chain, parent, record });
        }
        // Kept as it is now, it never has to boot again.
        site.phase("keep");
        drop(session);
        if let Err(error) = instance.keep().await {
            site.notice(&format!("{error}; it boots again"));
            launch.memory = None;
        }
    }
    Err(site.gone())
}

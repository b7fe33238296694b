//! Machines that boot, and forks of them.
//!
//! A machine whose memory may be kept has it in a file. When it has booted it
//! is kept under a name that says what it depends on: the disk below, QEMU,
//! accelerator, devices, and this boot of the host, because nothing of it is
//! synced. Whoever then wants that machine forks it.
//!
//! What a layer leaves running is never kept: a fork of that would answer for
//! programs that nobody starts when the disk boots by itself.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use super::disks::Disks;
use super::instance::{QemuInstance, Start, keeper, way_out};
use super::programs::{Accel, Rig};
use super::save::incoming;
use super::snapshot::{self, Snapshot};
use super::snapshots::{FREE, Origin, PendingSnapshot, Snapshots, free};
use super::{args, retarget};
use crate::digest::Description;
use crate::host::keeper::Keeper;
use crate::host::network::{Tools, WayOut};
use crate::provider::{Instance, Launch, Lines, Place, ProviderError, Retarget, Retargeted};
use crate::sparse;

/// Starts a machine: forks it if it was kept, otherwise boots it.
pub(super) async fn start(
    rig: Rig<'_>,
    launch: &Launch,
    snapshots: &Arc<Snapshots>,
    notice: &Lines,
) -> Result<QemuInstance, ProviderError> {
    let home = &snapshots.home;
    let Some(below) = launch.memory.as_ref().filter(|_| snapshots.are_of_use()) else {
        return boot(rig, launch, None).await;
    };
    let fail = |e: std::io::Error| ProviderError::new(format!("{}: {e}", home.display()));
    std::fs::create_dir_all(home).map_err(fail)?;
    let of = facts(rig, launch);
    let origin = retarget::Origin::of(of.key().to_string(), &launch.chain).map_err(fail)?;
    let dir = home.join(name(of, below));
    let snapshot = Snapshot::at(&dir);
    let (mut lock, mut why) = (None, None);
    loop {
        if snapshot.is_there() {
            let network = network(rig, launch).await?;
            match fork(rig, launch, &snapshot, Place::Forked, false, network).await {
                Ok(mut instance) => {
                    lead(&mut instance, launch).await?;
                    instance.origin = Some(Origin { snapshots: snapshots.clone(), dir });
                    return Ok(instance);
                }
                Err(error) => {
                    snapshots.failed(&dir);
                    notice(&format!("{error}; the machine boots"));
                    let _ = std::fs::remove_file(&launch.overlay);
                }
            }
        }
        if lock.is_some() {
            break;
        }
        // Only a direct boot notes what it reads.
        if launch.retarget != Retarget::Never && launch.boot.is_some() {
            match retargeted(rig, launch, &origin, snapshots, notice).await {
                Ok(Some(instance)) => return Ok(instance),
                Ok(None) => {}
                Err(unlike) => why = Some(unlike),
            }
        }
        // One boots it, the others wait and fork.
        lock = Some(snapshot::exclusive(&dir.with_extension("lock")).await.map_err(fail)?);
    }
    let memory = launch.scratch.join("memory");
    let Some(lock) = lock.filter(|_| snapshots.are_of_use() && free(home) > FREE + launch.machine.memory)
    else {
        return boot(rig, launch, None).await;
    };
    // Only what is forked from it goes on.
    let first = Launch { lasting: None, ..launch.clone() };
    let mut instance = boot(rig, &first, Some(&memory)).await?;
    let (scratch, overlay) = (launch.scratch.clone(), launch.overlay.clone());
    let snapshots = snapshots.clone();
    instance.pending = Some(PendingSnapshot { snapshots, dir, scratch, overlay, origin, why, _lock: lock });
    Ok(instance)
}

/// Forks the kept machine that would do for the disk of `launch`, for a disk
/// that is not there yet.
pub(super) async fn prewarm(
    rig: Rig<'_>,
    launch: &Launch,
    snapshots: &Arc<Snapshots>,
) -> Option<QemuInstance> {
    // Only a direct boot notes what it reads.
    let of_use = snapshots.are_of_use() && launch.boot.is_some();
    let like = origin(rig, launch).filter(|_| of_use)?;
    let home = snapshots.home.clone();
    // Reading disks blocks.
    let found = tokio::task::spawn_blocking(move || retarget::find(&home, &like, Retarget::Discarded)).await;
    let near = found.ok().flatten()?.ok()?;
    let other = Launch { chain: near.retargeted.chain.clone(), ..launch.clone() };
    let place = Place::Retargeted(near.retargeted);
    let network = network(rig, &other).await.ok()?;
    let mut instance = fork(rig, &other, &Snapshot::at(&near.snapshot), place, true, network).await.ok()?;
    instance.origin = Some(Origin { snapshots: snapshots.clone(), dir: near.snapshot });
    Some(instance)
}

/// How a fork that was made ahead is carried over to the disk of `launch`, if
/// it may be.
pub(super) async fn retarget_fork(rig: Rig<'_>, launch: &Launch, fork: &QemuInstance) -> Option<Retargeted> {
    let wanted = origin(rig, launch)?;
    let snapshot = fork.origin.as_ref()?.dir.clone();
    // Reading disks blocks.
    tokio::task::spawn_blocking(move || retarget::over(snapshot, &wanted)).await.ok().flatten()
}

/// What a machine of `launch` would be kept of.
fn origin(rig: Rig<'_>, launch: &Launch) -> Option<retarget::Origin> {
    retarget::Origin::of(facts(rig, launch).key().to_string(), &launch.chain).ok()
}

/// Forks a machine that was kept of a disk that is almost the same; a sentence
/// says in what none is. What fails of that is no loss.
async fn retargeted(
    rig: Rig<'_>,
    launch: &Launch,
    origin: &retarget::Origin,
    snapshots: &Arc<Snapshots>,
    notice: &Lines,
) -> Result<Option<QemuInstance>, String> {
    // Reading disks blocks.
    let (home, wanted, retarget) = (snapshots.home.clone(), origin.clone(), launch.retarget);
    let found = tokio::task::spawn_blocking(move || retarget::find(&home, &wanted, retarget)).await;
    let Ok(Some(near)) = found else { return Ok(None) };
    let near = near?;
    let other = Launch { chain: near.retargeted.chain.clone(), ..launch.clone() };
    // Without a network there is none for a machine that boots either.
    let Ok(network) = network(rig, &other).await else { return Ok(None) };
    match fork(rig, &other, &Snapshot::at(&near.snapshot), Place::Retargeted(near.retargeted), false, network)
        .await
    {
        Ok(mut instance) => {
            instance.origin = Some(Origin { snapshots: snapshots.clone(), dir: near.snapshot });
            Ok(Some(instance))
        }
        Err(error) => {
            notice(&format!("{error}; the machine boots"));
            snapshots.failed(&near.snapshot);
            let _ = std::fs::remove_file(&launch.overlay);
            Ok(None)
        }
    }
}

/// Everything that a kept machine depends on besides its disk.
fn facts(rig: Rig<'_>, launch: &Launch) -> Description {
    let mut facts = snapshot::facts(rig);
    let memory = Some((Path::new("memory"), true));
    facts.value("arguments", arguments(rig.accel, launch, memory, cut_off(rig, launch)).join(" "));
    facts.value("boot", args::boot(rig.accel, launch.boot.as_ref(), true).join(" "));
    facts
        .value("host's boot", std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default());
    facts
}

/// Whether a machine that is kept boots with a restricted network interface.
/// QEMU then tells it of no gateway and no resolver, so that its forks could not
/// be given a network either. Others have a gateway that is closed.
fn cut_off(rig: Rig<'_>, launch: &Launch) -> bool {
    !launch.network && (rig.access.reach.all || Tools::find().is_err())
}

/// Names a kept machine by everything that it depends on.
fn name(mut facts: Description, disk: &str) -> String {
    facts.value("disk", disk);
    facts.key().short()
}

/// Everything but disks, and where the kernel comes from.
fn arguments(accel: Accel, launch: &Launch, memory: Option<(&Path, bool)>, cut_off: bool) -> Vec<String> {
    let mut all = args::base();
    all.extend(args::machine(accel, &launch.machine, memory));
    all.extend(args::channels());
    all.extend(args::devices());
    all.extend(args::network(cut_off));
    all
}

async fn boot(rig: Rig<'_>, launch: &Launch, memory: Option<&Path>) -> Result<QemuInstance, ProviderError> {
    let disks = match launch.again {
        true => Disks::on(rig.programs, launch)?,
        false => Disks::new(rig.programs, launch).await?,
    };
    let cut_off = if memory.is_some() { cut_off(rig, launch) } else { !launch.network };
    let mut all = arguments(rig.accel, launch, memory.map(|path| (path, true)), cut_off);
    all.extend(args::disks(&disks.nodes(launch)));
    all.extend(args::boot(rig.accel, launch.boot.as_ref(), memory.is_some()));
    let way = format!("qemu {} {}", rig.programs.version, rig.accel.name());
    if disks.lasting() {
        args::with_log(&mut all);
    }
    let way_out = way_out(rig.access, launch, !cut_off).await?;
    let keeper = keeper(rig.access, launch).await?;
    let start =
        Start { scratch: &launch.scratch, disks, way, place: Place::Machine, yields: false, way_out, keeper };
    let mut instance = QemuInstance::start(rig.programs, &all, start).await?;
    lead(&mut instance, launch).await?;
    Ok(instance)
}

/// Has ports of the host lead into a machine that goes on.
async fn lead(instance: &mut QemuInstance, launch: &Launch) -> Result<(), ProviderError> {
    match &launch.lasting {
        Some(lasting) => instance.forward(&[], &lasting.forwards).await,
        None => Ok(()),
    }
}

/// The network of a fork. That it can't be had says nothing of what is forked.
async fn network(rig: Rig<'_>, launch: &Launch) -> Result<(WayOut, Option<Keeper>), ProviderError> {
    Ok((way_out(rig.access, launch, launch.network).await?, keeper(rig.access, launch).await?))
}

async fn fork(
    rig: Rig<'_>,
    launch: &Launch,
    snapshot: &Snapshot,
    place: Place,
    yields: bool,
    (way_out, keeper): (WayOut, Option<Keeper>),
) -> Result<QemuInstance, ProviderError> {
    let fail = |e: std::io::Error| ProviderError::new(format!("the machine can't be forked: {e}"));
    // What it wrote before it was kept is not in the disks below.
    sparse::copy(&File::open(snapshot.disk()).map_err(fail)?, &File::create(&launch.overlay).map_err(fail)?)
        .map_err(fail)?;
    let disks = Disks::on(rig.programs, launch)?;
    let mut all = arguments(rig.accel, launch, Some((&snapshot.memory(), false)), !launch.network);
    all.extend(args::disks(&disks.nodes(launch)));
    all.extend(incoming());
    let way = format!("qemu {} {}, forked", rig.programs.version, rig.accel.name());
    if disks.lasting() {
        args::with_log(&mut all);
    }
    let start = Start { scratch: &launch.scratch, disks, way, place, yields, way_out, keeper };
    let mut instance = QemuInstance::start(rig.programs, &all, start).await?;
    match snapshot.resume(&mut instance, &launch.scratch).await {
        Ok(()) => {
            snapshot.touch();
            Ok(instance)
        }
        Err(error) => {
            // It holds the disk.
            instance.stop().await;
            Err(error)
        }
    }
}

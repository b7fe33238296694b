//! Boots machines, saves memory snapshots of them, and forks these.
//!
//! A machine that may become a snapshot has its memory in a file. The name of
//! the snapshot contains everything that it depends on: the disk below, QEMU,
//! accelerator, devices, and this boot of the host, because the files are not
//! synced.
//!
//! A snapshot is always of a machine that has just booted, never of one in
//! which a layer left programs running. A check in a fork of that could pass
//! for a program that does not start when the disk boots.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use super::args::Purpose;
use super::disks::Disks;
use super::instance::{QemuInstance, Start, keeper, way_out};
use super::programs::{Accel, Rig};
use super::save::incoming;
use super::snapshot::{self, Snapshot};
use super::snapshots::{FREE, Origin, PendingSnapshot, Snapshots, free};
use super::{args, retarget};
use crate::agent;
use crate::digest::{Description, Digest};
use crate::disk::layout::Layout;
use crate::disk::sparse;
use crate::host::keeper::Keeper;
use crate::host::network::{Tools, WayOut};
use crate::host::{HostError, Lines};
use crate::provider::{Instance, Launch, Place, Retarget, Retargeted};

/// Starts a machine: forks its snapshot if there is one, otherwise boots it.
pub(super) async fn start(
    rig: Rig<'_>,
    launch: &Launch,
    snapshots: &Arc<Snapshots>,
    notice: &Lines,
) -> Result<QemuInstance, HostError> {
    let home = &snapshots.home;
    let Some(below) = launch.memory.as_ref().filter(|_| snapshots.are_of_use()) else {
        return boot(rig, launch, None).await;
    };
    let fail = |e: std::io::Error| HostError::io(home.display(), &e);
    std::fs::create_dir_all(home).map_err(fail)?;
    let of = facts(rig, launch)?;
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
                    notice(&format!("{error}; the machine boots instead"));
                    let _ = std::fs::remove_file(&launch.overlay);
                }
            }
        }
        if lock.is_some() {
            break;
        }
        // Only a direct boot records which files it opens.
        if launch.retarget != Retarget::Never && launch.boot.is_some() {
            match retargeted(rig, launch, &origin, snapshots, notice).await {
                Ok(Some(instance)) => return Ok(instance),
                Ok(None) => {}
                Err(unlike) => why = Some(unlike),
            }
        }
        // One process boots the machine; the others wait, then fork it.
        lock = Some(snapshot::exclusive(&dir.with_extension("lock")).await.map_err(fail)?);
    }
    let memory = launch.scratch.join("memory");
    let Some(lock) = lock.filter(|_| snapshots.are_of_use() && free(home) > FREE + launch.machine.memory)
    else {
        return boot(rig, launch, None).await;
    };
    // This machine becomes a snapshot. The server is a fork of it.
    let first = Launch { lasting: None, ..launch.clone() };
    let mut instance = boot(rig, &first, Some(&memory)).await?;
    let (scratch, overlay) = (launch.scratch.clone(), launch.overlay.clone());
    let snapshots = snapshots.clone();
    instance.pending = Some(PendingSnapshot { snapshots, dir, scratch, overlay, origin, why, _lock: lock });
    Ok(instance)
}

/// Prewarms: forks the snapshot that fits `launch` best, for a disk that is not
/// ready yet.
pub(super) async fn prewarm(
    rig: Rig<'_>,
    launch: &Launch,
    snapshots: &Arc<Snapshots>,
) -> Option<QemuInstance> {
    // Only a direct boot records which files it opens.
    let of_use = snapshots.are_of_use() && launch.boot.is_some();
    let like = origin(rig, launch).filter(|_| of_use)?;
    let home = snapshots.home.clone();
    // Reading disks blocks the thread.
    let found = tokio::task::spawn_blocking(move || retarget::find(&home, &like, Retarget::Discarded)).await;
    let near = found.ok().flatten()?.ok()?;
    let other = Launch { chain: near.retargeted.chain.clone(), ..launch.clone() };
    let place = Place::Retargeted(near.retargeted);
    let network = network(rig, &other).await.ok()?;
    let mut instance = fork(rig, &other, &Snapshot::at(&near.snapshot), place, true, network).await.ok()?;
    instance.origin = Some(Origin { snapshots: snapshots.clone(), dir: near.snapshot });
    Some(instance)
}

/// Compares the disk of a prewarmed fork with that of `launch`; `None` if the
/// fork can't be retargeted.
pub(super) async fn retarget_fork(rig: Rig<'_>, launch: &Launch, fork: &QemuInstance) -> Option<Retargeted> {
    let wanted = origin(rig, launch)?;
    let snapshot = fork.origin.as_ref()?.dir.clone();
    // Reading disks blocks the thread.
    tokio::task::spawn_blocking(move || retarget::over(snapshot, &wanted)).await.ok().flatten()
}

/// Describes the machine and disk of `launch`, for comparison with snapshots.
fn origin(rig: Rig<'_>, launch: &Launch) -> Option<retarget::Origin> {
    retarget::Origin::of(facts(rig, launch).ok()?.key().to_string(), &launch.chain).ok()
}

/// Forks a snapshot of a near-identical disk. `Err` says why none fits. Best
/// effort: other failures give `None`.
async fn retargeted(
    rig: Rig<'_>,
    launch: &Launch,
    origin: &retarget::Origin,
    snapshots: &Arc<Snapshots>,
    notice: &Lines,
) -> Result<Option<QemuInstance>, String> {
    // Reading disks blocks the thread.
    let (home, wanted, retarget) = (snapshots.home.clone(), origin.clone(), launch.retarget);
    let found = tokio::task::spawn_blocking(move || retarget::find(&home, &wanted, retarget)).await;
    let Ok(Some(near)) = found else { return Ok(None) };
    let near = near?;
    let other = Launch { chain: near.retargeted.chain.clone(), ..launch.clone() };
    // If there is no network, a boot would not have one either.
    let Ok(network) = network(rig, &other).await else { return Ok(None) };
    match fork(rig, &other, &Snapshot::at(&near.snapshot), Place::Retargeted(near.retargeted), false, network)
        .await
    {
        Ok(mut instance) => {
            instance.origin = Some(Origin { snapshots: snapshots.clone(), dir: near.snapshot });
            Ok(Some(instance))
        }
        Err(error) => {
            notice(&format!("{error}; the machine boots instead"));
            snapshots.failed(&near.snapshot);
            let _ = std::fs::remove_file(&launch.overlay);
            Ok(None)
        }
    }
}

/// Everything that a machine snapshot depends on, besides its disk.
fn facts(rig: Rig<'_>, launch: &Launch) -> Result<Description, HostError> {
    let mut facts = snapshot::facts(rig);
    let memory = Some((Path::new("memory"), true));
    facts.value("arguments", arguments(rig.accel, launch, memory, cut_off(rig, launch)).join(" "));
    if let Some((_, initrd)) = &launch.boot {
        facts.value("boot", direct(rig.accel, launch, initrd, Purpose::Snapshot)?.join(" "));
        facts.content("agent", Digest::of(agent::PROGRAM));
    }
    facts
        .value("host's boot", std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default());
    Ok(facts)
}

/// The arguments of a direct boot with this initrd.
fn direct(accel: Accel, launch: &Launch, initrd: &Path, purpose: Purpose) -> Result<Vec<String>, HostError> {
    let Some((kernel, _)) = &launch.boot else { return Ok(Vec::new()) };
    let layout = Layout::of_chain(&launch.chain).map_err(|e| {
        HostError::new(format!("the disk to boot from: {e}"))
            .help("vimg finds the root filesystem by the partition's type or name")
    })?;
    let line = args::Line { root: &layout.device(), parameters: &launch.parameters, purpose };
    Ok(args::boot(accel, kernel, initrd, line))
}

/// Whether a machine that becomes a snapshot boots with a restricted network
/// card. QEMU then tells it no gateway and no resolver, so its forks can't have
/// a network either. Other machines have a gateway that is closed.
fn cut_off(rig: Rig<'_>, launch: &Launch) -> bool {
    !launch.network && (rig.access.reach.all || Tools::find().is_err())
}

/// Names a snapshot by everything that it depends on.
fn name(mut facts: Description, disk: &str) -> String {
    facts.value("disk", disk);
    facts.key().short()
}

/// The arguments without disks and kernel.
fn arguments(accel: Accel, launch: &Launch, memory: Option<(&Path, bool)>, cut_off: bool) -> Vec<String> {
    let mut all = args::base();
    all.extend(args::machine(accel, &launch.machine, memory));
    all.extend(args::channels());
    all.extend(args::devices());
    all.extend(args::network(cut_off));
    all
}

async fn boot(rig: Rig<'_>, launch: &Launch, memory: Option<&Path>) -> Result<QemuInstance, HostError> {
    let disks = match launch.again {
        true => Disks::on(rig.programs, launch)?,
        false => Disks::new(rig.programs, launch).await?,
    };
    let cut_off = if memory.is_some() { cut_off(rig, launch) } else { !launch.network };
    let mut all = arguments(rig.accel, launch, memory.map(|path| (path, true)), cut_off);
    all.extend(args::disks(&disks.nodes(launch)));
    if let Some((_, more)) = &launch.boot {
        let initrd = launch.scratch.join("initrd");
        let fail = |e: std::io::Error| HostError::new(format!("can't write {}: {e}", initrd.display()));
        let more = tokio::fs::read(more).await.map_err(fail)?;
        tokio::fs::write(&initrd, agent::initramfs(&more)).await.map_err(fail)?;
        let purpose = match memory {
            Some(_) => Purpose::Snapshot,
            None if launch.watched => Purpose::Console,
            None => Purpose::Work,
        };
        all.extend(direct(rig.accel, launch, &initrd, purpose)?);
    }
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

/// Forwards ports of the host into a server.
async fn lead(instance: &mut QemuInstance, launch: &Launch) -> Result<(), HostError> {
    match &launch.lasting {
        Some(lasting) => instance.forward(&[], &lasting.forwards).await,
        None => Ok(()),
    }
}

/// Makes the network of a fork. A failure here does not mean that the snapshot
/// is bad.
async fn network(rig: Rig<'_>, launch: &Launch) -> Result<(WayOut, Option<Keeper>), HostError> {
    Ok((way_out(rig.access, launch, launch.network).await?, keeper(rig.access, launch).await?))
}

async fn fork(
    rig: Rig<'_>,
    launch: &Launch,
    snapshot: &Snapshot,
    place: Place,
    yields: bool,
    (way_out, keeper): (WayOut, Option<Keeper>),
) -> Result<QemuInstance, HostError> {
    let fail = |e: std::io::Error| HostError::io("can't fork the machine", &e);
    // What it wrote before the snapshot is not in the disks below.
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
            // It has the disk open.
            instance.stop().await;
            Err(error)
        }
    }
}

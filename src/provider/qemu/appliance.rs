//! Appliances: small machines that work on the disks of other machines, with
//! the base's kernel and an initramfs that holds only the agent. vimg boots an
//! appliance once and saves a memory snapshot. Each use is a fork.
//!
//! A snapshot only saves time. The name of its directory contains QEMU,
//! accelerator, kernel and agent. Without it, or if it does not start, an
//! appliance boots.

use std::path::Path;
use std::time::Duration;

use vimg_agent::protocol::{Network, card};

use super::args;
use super::disks::Disks;
use super::instance::{QemuInstance, Start, way_out};
use super::programs::{Accel, Rig};
use super::snapshot::{self, Snapshot};
use crate::agent;
use crate::host::HostError;
use crate::host::Lines;
use crate::host::network::WayOut;
use crate::provider::{Instance, Launch, Offline, Place};

/// Timeout for the boot of an appliance; under emulation it takes about three
/// seconds.
const BOOT: Duration = Duration::from_secs(180);

/// Size limit of all snapshots of appliances on disk, in bytes; one takes about
/// 130 MB.
const MOST: u64 = 600 << 20;

/// Starts an appliance on a disk. `appliances` is the directory of their
/// snapshots.
pub(super) async fn start(
    rig: Rig<'_>,
    launch: &Launch,
    offline: &Offline,
    appliances: &Path,
    notice: &Lines,
) -> Result<QemuInstance, HostError> {
    let (kernel, modules) = offline
        .appliance
        .as_ref()
        .ok_or_else(|| HostError::new("there is no kernel to run an appliance with"))?;
    let network = launch.network.then(|| Network { resolv_conf: format!("nameserver {}\n", card::RESOLVER) });
    let way = |how: &str| format!("qemu {} {}, appliance{how}", rig.programs.version, rig.accel.name());
    let dir = appliances.join(name(rig, kernel, modules));
    let snapshot = Snapshot::at(&dir);
    let place = Place::Outside(network);
    // Without a way out, booting would not help either.
    let way_out = way_out(rig.access, launch, launch.network).await?;
    let forked = async {
        if !snapshot.is_there() {
            // One task of one process makes the snapshot; the others wait.
            std::fs::create_dir_all(appliances).map_err(|e| HostError::io(appliances.display(), &e))?;
            let _lock = snapshot::exclusive(&dir.with_extension("lock"))
                .await
                .map_err(|e| HostError::io(appliances.display(), &e))?;
            if !snapshot.is_there() {
                make(rig, kernel, modules, &dir, &launch.scratch).await?;
            }
        }
        fork(rig, launch, &snapshot, way(""), place.clone(), way_out.clone()).await
    };
    match forked.await {
        Ok(mut instance) => {
            instance.forked_from(&dir);
            Ok(instance)
        }
        Err(error) => {
            // The snapshot only saves time. The next use makes a new one.
            snapshot.remove();
            notice(&format!("{error}; the appliance boots instead"));
            cold(rig, launch, (kernel, modules), way(" (cold boot)"), place, way_out).await
        }
    }
}

/// Names the snapshot by everything that it depends on.
fn name(rig: Rig<'_>, kernel: &Path, modules: &Path) -> String {
    let mut d = snapshot::facts(rig);
    // Files of the store are named by their digests.
    for file in [kernel, modules] {
        d.value("file", file.file_name().unwrap_or_default().to_string_lossy());
    }
    d.content("agent", crate::digest::Digest::of(agent::PROGRAM));
    d.value("arguments", arguments(rig.accel, Path::new("memory"), false, false).join(" "));
    d.value("boot", args::appliance_boot(rig.accel, Path::new("k"), Path::new("i")).join(" "));
    d.key().short()
}

fn arguments(accel: Accel, memory: &Path, fork: bool, network: bool) -> Vec<String> {
    let mut all = args::base();
    all.extend(args::appliance(accel, memory, fork));
    all.extend(args::channels());
    all.extend(args::network(!network));
    all
}

/// Boots an appliance and saves a snapshot of it.
async fn make(
    rig: Rig<'_>,
    kernel: &Path,
    modules: &Path,
    dir: &Path,
    scratch: &Path,
) -> Result<(), HostError> {
    let fail = |e: std::io::Error| HostError::io("can't save the appliance", &e);
    let new = Snapshot::new(scratch.join("snapshot")).map_err(fail)?;
    let initrd = scratch.join("appliance.cpio");
    std::fs::write(&initrd, agent::initramfs(&std::fs::read(modules).map_err(fail)?)).map_err(fail)?;
    let mut all = arguments(rig.accel, &new.memory(), false, false);
    all.extend(args::appliance_boot(rig.accel, kernel, &initrd));
    let start = Start {
        scratch,
        disks: Disks::none(rig.programs),
        way: String::new(),
        place: Place::Outside(None),
        yields: false,
        way_out: WayOut::default(),
        keeper: None,
    };
    let mut instance = QemuInstance::start(rig.programs, &all, start).await?;
    tokio::time::timeout(BOOT, instance.agent_opens())
        .await
        .map_err(|_| HostError::new(format!("the appliance did not start within {} s", BOOT.as_secs())))??;
    new.save(&mut instance, scratch).await?;
    instance.stop().await;
    new.shrink().await;
    new.sync().map_err(fail)?;
    snapshot::forget_old(dir.parent().unwrap_or(dir), MOST);
    new.rename(dir).map_err(fail)
}

/// Forks the snapshot of an appliance.
async fn fork(
    rig: Rig<'_>,
    launch: &Launch,
    snapshot: &Snapshot,
    way: String,
    place: Place,
    way_out: WayOut,
) -> Result<QemuInstance, HostError> {
    let disks = Disks::new(rig.programs, launch).await?;
    let mut all = arguments(rig.accel, &snapshot.memory(), true, launch.network);
    all.extend(args::disks(&disks.nodes(launch)));
    all.extend(super::save::incoming());
    let start = Start { scratch: &launch.scratch, disks, way, place, yields: false, way_out, keeper: None };
    let mut instance = QemuInstance::start(rig.programs, &all, start).await?;
    match snapshot.resume(&mut instance, &launch.scratch).await {
        Ok(()) => Ok(instance),
        Err(error) => {
            // It has the disk open.
            instance.stop().await;
            Err(error)
        }
    }
}

/// Boots an appliance for one use, without a snapshot.
async fn cold(
    rig: Rig<'_>,
    launch: &Launch,
    (kernel, modules): (&Path, &Path),
    way: String,
    place: Place,
    way_out: WayOut,
) -> Result<QemuInstance, HostError> {
    let fail = |e: std::io::Error| HostError::io("can't start the appliance", &e);
    let initrd = launch.scratch.join("appliance.cpio");
    std::fs::write(&initrd, agent::initramfs(&std::fs::read(modules).map_err(fail)?)).map_err(fail)?;
    let memory = launch.scratch.join("memory");
    let disks = Disks::new(rig.programs, launch).await?;
    // A private mapping: the memory of a layer is never written to disk.
    let mut all = arguments(rig.accel, &memory, true, launch.network);
    all.extend(args::disks(&disks.nodes(launch)));
    all.extend(args::direct(rig.accel, kernel, &initrd));
    let start = Start { scratch: &launch.scratch, disks, way, place, yields: false, way_out, keeper: None };
    let mut instance = QemuInstance::start(rig.programs, &all, start).await?;
    tokio::time::timeout(BOOT, instance.agent_opens())
        .await
        .map_err(|_| HostError::new(format!("the appliance did not start within {} s", BOOT.as_secs())))??;
    Ok(instance)
}

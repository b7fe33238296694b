//! A small machine that works on the disks of others: the base's kernel and an
//! initramfs with nothing but the agent. It is booted once; its memory, in a
//! file, and the state of its devices are kept, and each use of it is a fork
//! that writes to a copy of its own.
//!
//! What is kept only saves time. It fits one QEMU, one accelerator, one kernel
//! and one agent, all of which name its directory; without it, or if it does
//! not start, an appliance boots anew.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use vimg_agent::protocol::{Network, card};

use super::disks::Disks;
use super::instance::{QemuInstance, Start};
use super::{Accel, Programs, ProviderError, args};
use crate::digest::Description;
use crate::provider::{AGENT, Instance, Launch, Lines, Offline, Place, initramfs};

/// How long an appliance may take to boot; emulated it takes about three
/// seconds.
const BOOT: Duration = Duration::from_secs(180);
/// How long a fork may take to run.
const RESUME: Duration = Duration::from_secs(30);
/// How long saving its devices may take.
const SAVE: Duration = Duration::from_secs(60);

/// How many appliances are kept, of about 130 MB each.
const KEPT: usize = 4;

/// The files of an appliance.
struct Kept {
    memory: PathBuf,
    devices: PathBuf,
}

impl Kept {
    fn in_dir(dir: &Path) -> Self {
        Self { memory: dir.join("memory"), devices: dir.join("devices") }
    }
}

/// Starts an appliance on a disk. `appliances` is where they are kept.
pub(super) async fn start(
    programs: &Programs,
    accel: Accel,
    launch: &Launch,
    offline: &Offline,
    appliances: &Path,
    notice: &Lines,
) -> Result<QemuInstance, ProviderError> {
    let (kernel, modules) = offline
        .appliance
        .as_ref()
        .ok_or_else(|| ProviderError::new("there is no kernel to run an appliance with"))?;
    let network =
        offline.network.then(|| Network { resolv_conf: format!("nameserver {}\n", card::RESOLVER) });
    let way = |how: &str| format!("qemu {} {}, appliance{how}", programs.version, accel.name());
    let dir = appliances.join(name(programs, accel, kernel, modules));
    let kept = Kept::in_dir(&dir);
    let place = Place::Outside(network);
    let forked = async {
        if !kept.devices.exists() {
            // One process, and one run of it, makes it; the others wait.
            std::fs::create_dir_all(appliances)
                .map_err(|e| ProviderError::new(format!("{}: {e}", appliances.display())))?;
            let _lock = exclusive(&dir.with_extension("lock"))
                .await
                .map_err(|e| ProviderError::new(format!("{}: {e}", appliances.display())))?;
            if !kept.devices.exists() {
                make(programs, accel, kernel, modules, &dir, &launch.scratch).await?;
            }
        }
        fork(programs, accel, launch, &kept, way(""), place.clone()).await
    };
    match forked.await {
        Ok(mut instance) => {
            instance.forked_from(&dir);
            Ok(instance)
        }
        Err(error) => {
            // Memory is only a shortcut. It is made anew next time.
            let _ = std::fs::remove_dir_all(&dir);
            notice(&format!("{error}; the appliance boots"));
            cold(programs, accel, launch, (kernel, modules), way(" booted anew"), place).await
        }
    }
}

/// Waits until nobody else has the lock. It is let go with the file, whatever
/// becomes of its holder.
async fn exclusive(path: &Path) -> std::io::Result<std::fs::File> {
    let file = std::fs::File::create(path)?;
    loop {
        match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
            Err(rustix::io::Errno::WOULDBLOCK) => tokio::time::sleep(Duration::from_millis(20)).await,
            result => return result.map(|()| file).map_err(Into::into),
        }
    }
}

/// Everything that a kept appliance depends on.
fn name(programs: &Programs, accel: Accel, kernel: &Path, modules: &Path) -> String {
    let mut d = Description::default();
    d.value("qemu", &programs.version);
    if let Ok(meta) = std::fs::metadata(&programs.system) {
        d.value("qemu file", format_args!("{}:{}:{}", meta.len(), meta.mtime(), meta.ino()));
    }
    // Files of the store are named by their digests.
    for file in [kernel, modules] {
        d.value("file", file.file_name().unwrap_or_default().to_string_lossy());
    }
    d.content("agent", crate::digest::Digest::of(AGENT));
    d.value("arguments", arguments(accel, Path::new("memory"), false).join(" "));
    d.value("boot", args::appliance_boot(Path::new("k"), Path::new("i")).join(" "));
    if accel == Accel::Kvm {
        // The guest has seen this processor and this kernel's idea of it.
        d.value("host", std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default());
        let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let same = |line: &&str| !line.contains("MHz") && !line.contains("bogomips");
        d.value("processor", cpu.lines().take_while(|l| !l.is_empty()).filter(same).collect::<String>());
    }
    d.key().short()
}

fn arguments(accel: Accel, memory: &Path, fork: bool) -> Vec<String> {
    let mut all = args::base();
    all.extend(args::appliance(accel, memory, fork));
    all.extend(args::channels());
    all.extend(args::network());
    all
}

/// Boots an appliance and keeps it.
async fn make(
    programs: &Programs,
    accel: Accel,
    kernel: &Path,
    modules: &Path,
    dir: &Path,
    scratch: &Path,
) -> Result<(), ProviderError> {
    let fail = |e: std::io::Error| ProviderError::new(format!("the appliance can't be kept: {e}"));
    // Whoever left one of this name is dead: the lock was free.
    let new = tempdir(&dir.with_extension("new")).map_err(fail)?;
    let kept = Kept::in_dir(&new.0);
    let initrd = scratch.join("appliance.cpio");
    std::fs::write(&initrd, initrd_of(modules).map_err(fail)?).map_err(fail)?;
    let mut all = arguments(accel, &kept.memory, false);
    all.extend(args::appliance_boot(kernel, &initrd));
    let start =
        Start { scratch, disks: Disks::none(programs), way: String::new(), place: Place::Outside(None) };
    let mut instance = QemuInstance::start(programs, &all, start).await?;
    tokio::time::timeout(BOOT, instance.agent_opens()).await.map_err(|_| {
        ProviderError::new(format!("the appliance did not come up within {} s", BOOT.as_secs()))
    })??;
    let listener = super::instance::listen(scratch, "devices").map_err(fail)?;
    let receive = async {
        let (mut stream, _) = listener.accept().await?;
        let mut bytes = Vec::new();
        // Devices only: a megabyte. The memory stays where it is.
        (&mut stream).take(64 << 20).read_to_end(&mut bytes).await?;
        Ok::<_, std::io::Error>(bytes)
    };
    // QEMU stops the machine itself, and notes that it ran: whoever takes it
    // over from here has it running at once.
    share_memory(&mut instance).await?;
    let save = async {
        instance.execute("migrate", json!({ "uri": "unix:devices" })).await?;
        loop {
            let status = instance.execute("query-migrate", json!({})).await?;
            match status["status"].as_str() {
                Some("completed") => return Ok(()),
                Some("failed" | "cancelled") => {
                    return Err(ProviderError::new(format!(
                        "QEMU can't save the appliance: {}",
                        status["error-desc"].as_str().unwrap_or("no reason given")
                    )));
                }
                _ => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        }
    };
    let receive = async { receive.await.map_err(fail) };
    let (bytes, ()) = tokio::time::timeout(SAVE, async { tokio::try_join!(receive, save) })
        .await
        .map_err(|_| ProviderError::new("QEMU does not save the appliance"))??;
    std::fs::write(&kept.devices, bytes).map_err(fail)?;
    instance.stop().await;
    // What is only half on disk after a power cut must not be taken for whole.
    for file in [&kept.memory, &kept.devices] {
        std::fs::File::open(file).and_then(|f| f.sync_all()).map_err(fail)?;
    }
    let _ = std::fs::remove_file(scratch.join("devices"));
    forget_old(dir.parent().unwrap_or(dir));
    match std::fs::rename(&new.0, dir) {
        Ok(()) => {
            std::mem::forget(new);
            Ok(())
        }
        Err(error) => Err(fail(error)),
    }
}

/// Removes appliances but for the newest few: other kernels, other versions of
/// QEMU or of the agent. Who runs a fork of one has its files open.
fn forget_old(appliances: &Path) {
    let Ok(entries) = std::fs::read_dir(appliances) else { return };
    let mut kept: Vec<_> = entries
        .flatten()
        .filter_map(|entry| {
            Some((entry.path().join("devices").metadata().ok()?.modified().ok()?, entry.path()))
        })
        .collect();
    kept.sort();
    let surplus = kept.len().saturating_sub(KEPT - 1);
    for (_, dir) in kept.drain(..surplus) {
        let _ = std::fs::remove_dir_all(dir);
    }
}

/// Forks a kept appliance.
async fn fork(
    programs: &Programs,
    accel: Accel,
    launch: &Launch,
    kept: &Kept,
    way: String,
    place: Place,
) -> Result<QemuInstance, ProviderError> {
    let disks = Disks::new(programs, launch).await?;
    let mut all = arguments(accel, &kept.memory, true);
    all.extend(args::disks(&disks.nodes(launch)));
    all.extend(["-incoming".into(), "defer".into()]);
    let start = Start { scratch: &launch.scratch, disks, way, place };
    let mut instance = QemuInstance::start(programs, &all, start).await?;
    match resume(&mut instance, launch, kept).await {
        Ok(()) => Ok(instance),
        Err(error) => {
            // It holds the disk.
            instance.stop().await;
            Err(error)
        }
    }
}

async fn resume(instance: &mut QemuInstance, launch: &Launch, kept: &Kept) -> Result<(), ProviderError> {
    share_memory(instance).await?;
    let fail = |e: std::io::Error| ProviderError::new(format!("the appliance can't be resumed: {e}"));
    let devices = std::fs::read(&kept.devices).map_err(fail)?;
    instance.execute("migrate-incoming", json!({ "uri": "unix:devices" })).await?;
    let mut stream = super::instance::connect(&launch.scratch, "devices").await.map_err(fail)?;
    let _ = std::fs::remove_file(launch.scratch.join("devices"));
    stream.write_all(&devices).await.map_err(fail)?;
    stream.shutdown().await.map_err(fail)?;
    tokio::time::timeout(RESUME, instance.resumed())
        .await
        .map_err(|_| ProviderError::new("the appliance does not resume"))?
}

/// Boots an appliance for one use.
async fn cold(
    programs: &Programs,
    accel: Accel,
    launch: &Launch,
    (kernel, modules): (&Path, &Path),
    way: String,
    place: Place,
) -> Result<QemuInstance, ProviderError> {
    let fail = |e: std::io::Error| ProviderError::new(format!("the appliance can't be started: {e}"));
    let initrd = launch.scratch.join("appliance.cpio");
    std::fs::write(&initrd, initrd_of(modules).map_err(fail)?).map_err(fail)?;
    let memory = launch.scratch.join("memory");
    let disks = Disks::new(programs, launch).await?;
    let mut all = arguments(accel, &memory, false);
    all.extend(args::disks(&disks.nodes(launch)));
    all.extend(args::direct(kernel, &initrd));
    let start = Start { scratch: &launch.scratch, disks, way, place };
    let mut instance = QemuInstance::start(programs, &all, start).await?;
    tokio::time::timeout(BOOT, instance.agent_opens()).await.map_err(|_| {
        ProviderError::new(format!("the appliance did not come up within {} s", BOOT.as_secs()))
    })??;
    Ok(instance)
}

/// Memory is shared with its file, and no part of the stream.
async fn share_memory(instance: &mut QemuInstance) -> Result<(), ProviderError> {
    let capabilities = json!({ "capabilities": [{ "capability": "x-ignore-shared", "state": true }] });
    instance.execute("migrate-set-capabilities", capabilities).await.map(|_| ())
}

/// The agent as `/init` and the modules: the kernel takes several archives
/// one after the other.
fn initrd_of(modules: &Path) -> std::io::Result<Vec<u8>> {
    let mut initrd = initramfs::with_init(AGENT);
    initrd.extend(std::fs::read(modules)?);
    Ok(initrd)
}

/// A directory that goes away unless it is renamed.
struct Temporary(PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn tempdir(path: &Path) -> std::io::Result<Temporary> {
    let _ = std::fs::remove_dir_all(path);
    std::fs::create_dir(path)?;
    Ok(Temporary(path.to_owned()))
}

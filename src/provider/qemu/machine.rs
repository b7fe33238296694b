//! Machines that boot, and forks of what they were.
//!
//! A machine whose memory may be kept has it in a file. When it has booted, or
//! when a state was taken of it, it can be kept under a name that says what it
//! depends on: the disk below, QEMU, accelerator, devices, and this boot of
//! the host, because nothing of it is synced. Whoever then wants that machine
//! forks it.

use std::fs::File;
use std::path::{Path, PathBuf};

use super::disks::Disks;
use super::instance::{QemuInstance, Start};
use super::kept::{self, Kept};
use super::{Accel, Programs, ProviderError, args};
use crate::digest::Description;
use crate::provider::{Instance, Launch, Lines, Memory, Place};
use crate::sparse;

/// The share of the free disk, one in so many, that kept machines may take.
const SHARE: u64 = 4;
/// How much of a disk must stay free, in bytes.
const FREE: u64 = 2 << 30;

/// What it takes to keep a machine that runs.
pub(super) struct Keeping {
    home: PathBuf,
    scratch: PathBuf,
    overlay: PathBuf,
    /// All that its name depends on but its disk.
    facts: Description,
    /// The name of what it was started from.
    of: String,
    /// Whether it is as it has booted, and nobody has kept that yet.
    booted: bool,
    /// Held by who boots what others want to fork.
    _lock: Option<File>,
}

impl Keeping {
    fn dir(&self, of: &str) -> PathBuf {
        let mut facts = self.facts.clone();
        facts.value("disk", of);
        self.home.join(facts.key().short())
    }

    /// The memory of the machine while it runs.
    fn running(&self) -> PathBuf {
        self.scratch.join("memory")
    }

    /// Whether it is as it has booted.
    pub(super) fn has_booted(&self) -> bool {
        self.booted
    }
}

/// Starts a machine: forks it if it was kept, otherwise boots it.
pub(super) async fn start(
    programs: &Programs,
    accel: Accel,
    launch: &Launch,
    home: &Path,
    notice: &Lines,
) -> Result<QemuInstance, ProviderError> {
    let Some(memory) = &launch.memory else { return boot(programs, accel, launch, None).await };
    let fail = |e: std::io::Error| ProviderError::new(format!("{}: {e}", home.display()));
    std::fs::create_dir_all(home).map_err(fail)?;
    let mut facts = kept::facts(programs, accel);
    facts
        .value("host's boot", std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default());
    facts.value("arguments", arguments(accel, launch, Some((Path::new("memory"), true))).join(" "));
    facts.value("boot", args::boot(launch.boot.as_ref()).join(" "));
    let mut keeping = Keeping {
        home: home.to_owned(),
        scratch: launch.scratch.clone(),
        overlay: launch.overlay.clone(),
        facts,
        of: memory.of.clone(),
        booted: false,
        _lock: None,
    };
    let dir = keeping.dir(&memory.of);
    let kept = Kept::at(&dir);
    if !kept.is_there() {
        // One boots it, the others wait and fork.
        keeping._lock = Some(kept::exclusive(&dir.with_extension("lock")).await.map_err(fail)?);
    }
    if kept.is_there() {
        keeping._lock = None;
        match fork(programs, accel, launch, memory, &kept).await {
            Ok(mut instance) => {
                kept.touch();
                instance.forked_from(&dir);
                instance.keeping = memory.again.then_some(keeping);
                return Ok(instance);
            }
            Err(error) => {
                kept.remove();
                notice(&format!("{error}; the machine boots"));
                let _ = std::fs::remove_file(&launch.overlay);
            }
        }
    }
    if !has_room(home, launch.machine.memory) {
        return boot(programs, accel, launch, None).await;
    }
    keeping.booted = true;
    let ram = keeping.running();
    let mut instance = boot(programs, accel, launch, Some(&ram)).await?;
    instance.keeping = Some(keeping);
    Ok(instance)
}

/// Whether the disk has room for a machine's memory.
fn has_room(home: &Path, memory: u64) -> bool {
    free(home) > FREE + memory
}

fn free(home: &Path) -> u64 {
    rustix::fs::statvfs(home).map_or(0, |s| s.f_bavail * s.f_frsize)
}

/// Everything but disks, and where the kernel comes from.
fn arguments(accel: Accel, launch: &Launch, memory: Option<(&Path, bool)>) -> Vec<String> {
    let mut all = args::base();
    all.extend(args::machine(accel, &launch.machine, memory));
    all.extend(args::channels());
    all.extend(args::devices());
    all.extend(args::network());
    all
}

async fn boot(
    programs: &Programs,
    accel: Accel,
    launch: &Launch,
    memory: Option<&Path>,
) -> Result<QemuInstance, ProviderError> {
    let disks = Disks::new(programs, launch).await?;
    let mut all = arguments(accel, launch, memory.map(|path| (path, true)));
    all.extend(args::disks(&disks.nodes(launch)));
    all.extend(args::boot(launch.boot.as_ref()));
    let way = format!("qemu {} {}", programs.version, accel.name());
    let start = Start { scratch: &launch.scratch, disks, way, place: Place::Machine };
    QemuInstance::start(programs, &all, start).await
}

async fn fork(
    programs: &Programs,
    accel: Accel,
    launch: &Launch,
    memory: &Memory,
    kept: &Kept,
) -> Result<QemuInstance, ProviderError> {
    let fail = |e: std::io::Error| ProviderError::new(format!("the machine can't be forked: {e}"));
    // What it wrote before it was kept is not in the disks below.
    let written = kept.disk();
    let disks = if written.exists() {
        sparse::copy(&File::open(&written).map_err(fail)?, &File::create(&launch.overlay).map_err(fail)?)
            .map_err(fail)?;
        Disks::on(programs, launch)?
    } else {
        Disks::new(programs, launch).await?
    };
    // One that is to be kept again writes to a file of its own.
    let own = launch.scratch.join("memory");
    let (ram, shared) = if memory.again {
        let (from, to) = (kept.memory(), own.clone());
        let copied =
            tokio::task::spawn_blocking(move || sparse::copy(&File::open(from)?, &File::create(to)?));
        copied.await.map_err(|e| ProviderError::new(e.to_string()))?.map_err(fail)?;
        (own, true)
    } else {
        (kept.memory(), false)
    };
    let mut all = arguments(accel, launch, Some((&ram, shared)));
    all.extend(args::disks(&disks.nodes(launch)));
    all.extend(kept::incoming());
    let way = format!("qemu {} {}, forked", programs.version, accel.name());
    let start = Start { scratch: &launch.scratch, disks, way, place: Place::Forked };
    let mut instance = QemuInstance::start(programs, &all, start).await?;
    match kept.resume(&mut instance, &launch.scratch).await {
        Ok(()) => Ok(instance),
        Err(error) => {
            // It holds the disk.
            instance.stop().await;
            Err(error)
        }
    }
}

/// Keeps a machine whose writes are held, and ends it. `of` names the disk
/// that was taken of it last; `None` says that it has just booted.
pub(super) async fn keep(mut instance: QemuInstance, of: Option<&str>) -> Result<(), ProviderError> {
    let fail = |e: std::io::Error| ProviderError::new(format!("the machine can't be kept: {e}"));
    let keeping =
        instance.keeping.take().ok_or_else(|| ProviderError::new("the machine's memory has no file"))?;
    let new = Kept::new(keeping.scratch.join("kept")).map_err(fail)?;
    new.save(&mut instance, &keeping.scratch).await?;
    instance.stop().await;
    std::fs::rename(keeping.running(), new.memory()).map_err(fail)?;
    if of.is_none() {
        std::fs::rename(&keeping.overlay, new.disk()).map_err(fail)?;
    }
    kept::forget_old(&keeping.home, free(&keeping.home) / SHARE);
    new.rename(&keeping.dir(of.unwrap_or(&keeping.of))).map_err(fail)
}

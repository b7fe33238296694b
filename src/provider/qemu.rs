//! QEMU on this host: x86_64, with KVM where it works and TCG elsewhere.

use std::fs::File;
use std::path::{Path, PathBuf};

use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::OnceCell;
use vimg_lang::model::{DiskFormat, Machine};

use super::{
    Created, Exported, Launch, Lines, Made, OFFLINE_MEMORY, Provider, ProviderError, Retargeted, Source,
    debian, difference,
};
use crate::host::network::Access;
use crate::qcow2;

mod programs;
mod args;
mod image;
mod qmp;
mod disks;
mod snapshot;
mod retarget;
mod snapshots;
mod hang;
mod instance;
mod save;
mod appliance;
mod control;
mod machine;
mod probe;

pub(super) use disks::{Disks, Monitor};
pub use image::sha256_of;
pub use instance::QemuInstance;
pub use probe::Kvm;
use programs::Rig;
pub use programs::{Accel, Programs};

/// Where a provider stores what saves time.
#[derive(Debug, Clone)]
pub struct Dirs {
    /// What is known of the host's programs.
    pub probes: PathBuf,
    /// Memory snapshots of appliances.
    pub appliances: PathBuf,
    /// Memory snapshots of machines.
    pub snapshots: PathBuf,
}

/// The QEMU provider.
pub struct Qemu {
    /// The accelerator that the user chose, if any.
    wanted: Option<Accel>,
    probes: PathBuf,
    appliances: PathBuf,
    snapshots: Arc<snapshots::Snapshots>,
    notice: Lines,
    access: Access,
    programs: OnceCell<Programs>,
    accel: OnceCell<Accel>,
    /// Why it is not KVM, until the user has been told.
    why: Mutex<Option<String>>,
}

impl Qemu {
    /// Makes a provider that looks for programs when it is first used. `notice`
    /// prints to the user; `access` is what guests may reach.
    pub fn new(wanted: Option<Accel>, dirs: Dirs, access: Access, notice: Lines) -> Self {
        Self {
            wanted,
            probes: dirs.probes,
            appliances: dirs.appliances,
            snapshots: Arc::new(snapshots::Snapshots::new(dirs.snapshots)),
            notice,
            access,
            programs: OnceCell::new(),
            accel: OnceCell::new(),
            why: Mutex::default(),
        }
    }

    /// Returns what guests may reach.
    pub(super) fn access(&self) -> &Access {
        &self.access
    }

    /// Returns programs, accelerator and network access for a machine with this
    /// kernel.
    async fn rig(&self, kernel: Option<&Path>) -> Result<Rig<'_>, ProviderError> {
        let (programs, accel) = (self.programs().await?, self.accel(kernel).await?);
        Ok(Rig { programs, accel, access: &self.access })
    }

    pub(super) async fn programs(&self) -> Result<&Programs, ProviderError> {
        self.programs.get_or_try_init(|| Programs::find_knowing(&self.probes)).await
    }

    /// Returns the accelerator. Prints once why it is not KVM.
    async fn accel(&self, kernel: Option<&Path>) -> Result<Accel, ProviderError> {
        let accel = self.accel_quietly(kernel).await?;
        if let Some(why) = self.why.lock().unwrap_or_else(PoisonError::into_inner).take() {
            (self.notice)(&why);
        }
        Ok(accel)
    }

    async fn rig_of(&self, launch: &Launch) -> Result<Rig<'_>, ProviderError> {
        self.rig(launch.boot.as_ref().map(|(kernel, _)| kernel.as_path())).await
    }

    /// Returns the accelerator without printing anything.
    pub(super) async fn accel_quietly(&self, kernel: Option<&Path>) -> Result<Accel, ProviderError> {
        let tell = |text: String| {
            *self.why.lock().unwrap_or_else(PoisonError::into_inner) = Some(text);
        };
        if let Some(accel) = self.accel.get() {
            return Ok(*accel);
        }
        let programs = self.programs().await?;
        let accel = match self.wanted {
            Some(accel) => Some(accel),
            None => probe::choose(programs, kernel, &self.probes, &tell).await?,
        };
        let Some(accel) = accel else {
            // Without a kernel KVM can't be tested. A later machine may have
            // one.
            tell("KVM was not tested yet on this host, so this machine is emulated".into());
            return Ok(Accel::Tcg);
        };
        let _ = self.accel.set(accel);
        Ok(accel)
    }
}

/// Reports what is known about KVM without starting a machine, for `vimg
/// doctor`.
pub fn kvm_report(programs: &Programs, probes: &Path) -> Kvm {
    probe::report(programs, probes)
}

impl Provider for Qemu {
    type Instance = QemuInstance;

    fn name(&self) -> String {
        self.programs.get().map_or_else(|| "qemu".into(), |p| format!("qemu {}", p.version))
    }

    async fn create(&self, source: &Source, dir: &Path, lines: &Lines) -> Result<Created, ProviderError> {
        let programs = self.programs().await?;
        let disk = dir.join("disk.qcow2");
        match source {
            Source::Bootstrap(bootstrap, size) => {
                let made = debian::bootstrap(bootstrap, *size, dir, &self.access, lines).await?;
                image::convert(
                    programs,
                    &[image::raw(&made.disk)],
                    DiskFormat::Qcow2,
                    image::Compress::No,
                    &disk,
                )
                .await?;
                let _ = std::fs::remove_file(&made.disk);
                Ok(Created { disk, boot: Some((made.kernel, made.initrd)), modules: Some(made.modules) })
            }
            Source::Import(path, sha256) => {
                image::check_import(path, sha256).await?;
                let source = if qcow2::is_qcow2(path) { image::standalone(path) } else { image::raw(path) };
                image::convert(programs, &[source], DiskFormat::Qcow2, image::Compress::No, &disk).await?;
                let _ = std::fs::remove_file(path);
                Ok(Created { disk, boot: None, modules: None })
            }
        }
    }

    async fn launch(&self, launch: &Launch) -> Result<QemuInstance, ProviderError> {
        // An offline layer uses an appliance. The kernel comes from the base;
        // an imported disk has none, and its machine boots instead.
        if let Some(offline) = &launch.offline
            && let Some((kernel, _)) = &offline.appliance
        {
            let rig = self.rig(Some(kernel)).await?;
            return appliance::start(rig, launch, offline, &self.appliances, &self.notice).await;
        }
        let rig = self.rig_of(launch).await?;
        if launch.offline.is_some() {
            // The kernel is no longer in the store. The layer is applied in its
            // machine, with the size of an appliance.
            let machine = Machine { cpus: 2, memory: OFFLINE_MEMORY, ..launch.machine };
            let launch = Launch { machine, memory: None, ..launch.clone() };
            return machine::start(rig, &launch, &self.snapshots, &self.notice).await;
        }
        machine::start(rig, launch, &self.snapshots, &self.notice).await
    }

    async fn prewarm(&self, launch: &Launch) -> Option<QemuInstance> {
        machine::prewarm(self.rig_of(launch).await.ok()?, launch, &self.snapshots).await
    }

    async fn retargeted(&self, launch: &Launch, fork: &QemuInstance) -> Option<Retargeted> {
        machine::retarget_fork(self.rig_of(launch).await.ok()?, launch, fork).await
    }

    async fn find(&self, scratch: &Path) -> Result<Option<QemuInstance>, ProviderError> {
        QemuInstance::find(self.programs().await?, scratch, &self.access).await
    }

    async fn alike(&self, below: &[PathBuf], a: &Made, b: &Made) -> bool {
        // Reading disks blocks the thread.
        let (below, a, b) = (below.to_vec(), a.clone(), b.clone());
        let alike = tokio::task::spawn_blocking(move || difference::alike(&below, &a, &b)).await;
        matches!(alike, Ok(Ok(true)))
    }

    async fn flatten(&self, chain: &[PathBuf], to: &Path) -> Result<(), ProviderError> {
        image::convert(
            self.programs().await?,
            &image::qcow2s(chain),
            DiskFormat::Qcow2,
            image::Compress::No,
            to,
        )
        .await
    }

    async fn export(&self, chain: &[PathBuf], format: DiskFormat, to: &Path) -> Result<(), ProviderError> {
        image::convert(self.programs().await?, &image::qcow2s(chain), format, image::Compress::Yes, to).await
    }

    async fn revise(&self, chain: &[PathBuf], earlier: &Exported, copies: Vec<File>) -> Option<Vec<File>> {
        // Reading disks blocks the thread.
        let (chain, earlier) = (chain.to_vec(), earlier.clone());
        let revise = move || difference::revise(&chain, &earlier, &copies).map(|()| copies);
        tokio::task::spawn_blocking(revise).await.ok()?.ok()
    }
}

//! QEMU on this host: x86_64, with KVM where it works and TCG elsewhere.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use futures_util::future::BoxFuture;
use serde_json::json;
use tokio::sync::OnceCell;
use vimg_lang::model::{Forward, Machine};

use super::{Launch, OFFLINE_MEMORY, Provider, Retargeted, Servers, Snapshots};
use crate::host::network::Access;
use crate::host::{HostError, Lines};

mod programs;
mod args;
mod qmp;
mod disks;
mod hang;
mod snapshot;
mod retarget;
mod snapshots;
mod instance;
mod save;
mod appliance;
mod control;
mod machine;
mod probe;

pub(super) use disks::{Disks, Monitor};
pub use instance::QemuInstance;
pub use probe::Kvm;
use programs::Rig;
pub use programs::{Accel, Programs};

/// Where a provider stores what saves time.
#[derive(Debug, Clone)]
pub struct Dirs {
    /// The directory with the results of probes of the host's programs.
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
    async fn rig(&self, kernel: Option<&Path>) -> Result<Rig<'_>, HostError> {
        let (programs, accel) = (self.programs().await?, self.accel(kernel).await?);
        Ok(Rig { programs, accel, access: &self.access })
    }

    pub(super) async fn programs(&self) -> Result<&Programs, HostError> {
        self.programs.get_or_try_init(|| Programs::find(Some(&self.probes))).await
    }

    /// Returns the accelerator. Prints once why it is not KVM.
    async fn accel(&self, kernel: Option<&Path>) -> Result<Accel, HostError> {
        let accel = self.accel_quietly(kernel).await?;
        if let Some(why) = self.why.lock().unwrap_or_else(PoisonError::into_inner).take() {
            (self.notice)(&why);
        }
        Ok(accel)
    }

    /// Prints a text, once a day.
    pub(super) fn tell_once(&self, about: &str, text: &str) {
        probe::tell_once(&self.probes.join(format!("{about}.told")), text, &|text| (self.notice)(&text));
    }

    async fn rig_of(&self, launch: &Launch) -> Result<Rig<'_>, HostError> {
        self.rig(launch.boot.as_ref().map(|(kernel, _)| kernel.as_path())).await
    }

    /// Returns the accelerator without printing anything.
    pub(super) async fn accel_quietly(&self, kernel: Option<&Path>) -> Result<Accel, HostError> {
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

    async fn launch(&self, launch: &Launch) -> Result<QemuInstance, HostError> {
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

    fn snapshots(&self) -> Option<&dyn Snapshots<QemuInstance>> {
        Some(self)
    }

    fn servers(&self) -> Option<&dyn Servers<QemuInstance>> {
        Some(self)
    }
}

impl Snapshots<QemuInstance> for Qemu {
    fn prewarm<'a>(&'a self, launch: &'a Launch) -> BoxFuture<'a, Option<QemuInstance>> {
        Box::pin(
            async move { machine::prewarm(self.rig_of(launch).await.ok()?, launch, &self.snapshots).await },
        )
    }

    fn retargeted<'a>(
        &'a self,
        launch: &'a Launch,
        fork: &'a QemuInstance,
    ) -> BoxFuture<'a, Option<Retargeted>> {
        Box::pin(async move { machine::retarget_fork(self.rig_of(launch).await.ok()?, launch, fork).await })
    }

    fn can_save(&self, instance: &QemuInstance) -> bool {
        instance.pending.is_some()
    }

    fn save(&self, instance: QemuInstance) -> BoxFuture<'_, Result<(), HostError>> {
        Box::pin(save::save(instance))
    }

    fn boot_reason(&self, instance: &QemuInstance) -> Option<String> {
        instance.pending.as_ref()?.why.clone()
    }

    fn pause<'a>(&'a self, instance: &'a mut QemuInstance) -> BoxFuture<'a, Result<(), HostError>> {
        Box::pin(async move { instance.execute("stop", json!({})).await.map(|_| ()) })
    }

    fn resume<'a>(&'a self, instance: &'a mut QemuInstance) -> BoxFuture<'a, Result<(), HostError>> {
        Box::pin(instance.go_on())
    }

    fn distrust(&self, instance: &mut QemuInstance) {
        instance.distrust();
    }
}

impl Servers<QemuInstance> for Qemu {
    fn find<'a>(&'a self, scratch: &'a Path) -> BoxFuture<'a, Result<Option<QemuInstance>, HostError>> {
        Box::pin(async move { QemuInstance::find(self.programs().await?, scratch, &self.access).await })
    }

    fn forward<'a>(
        &'a self,
        server: &'a mut QemuInstance,
        before: &'a [Forward],
        after: &'a [Forward],
    ) -> BoxFuture<'a, Result<(), HostError>> {
        Box::pin(server.forward(before, after))
    }

    fn leave(&self, server: QemuInstance) {
        server.leave();
    }
}

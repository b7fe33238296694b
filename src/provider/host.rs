//! Chooses between the runners of this host: QEMU's machines and appliances,
//! and containers where they are allowed.

use std::fs::File;
use std::path::{Path, PathBuf};

use tokio::sync::OnceCell;
use vimg_lang::model::{DiskFormat, Forward};

use super::container::{self, ContainerInstance, Engine};
use super::qemu::{Accel, Kvm, Qemu, QemuInstance};
use super::{
    Created, Ended, Exported, Instance, Launch, Lines, Made, Place, Provider, ProviderError, Retargeted,
    Source,
};
use crate::host::network::WayOut;

/// How offline layers are applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    /// In an appliance if KVM works, else in a container if allowed, else in an
    /// emulated appliance.
    Auto,
    /// In an appliance under QEMU.
    Qemu,
    /// In a container, except for disks that the host's kernel should not
    /// mount.
    Container,
}

/// The provider.
pub struct Host {
    choice: Choice,
    qemu: Qemu,
    notice: Lines,
    /// Whether only root can write to the store, so that its records can be
    /// trusted.
    owned: bool,
    /// What runs containers, or why they are not possible.
    engine: OnceCell<Result<Engine, ProviderError>>,
}

impl Host {
    /// Makes a provider that looks for programs when it is first used. `store`
    /// is the directory with disks and records.
    pub fn new(choice: Choice, qemu: Qemu, store: &Path, notice: Lines) -> Self {
        Self { choice, qemu, notice, owned: owned(store), engine: OnceCell::new() }
    }

    async fn engine(&self) -> Result<&Engine, ProviderError> {
        self.engine.get_or_init(|| Engine::allowed(self.owned)).await.as_ref().map_err(Clone::clone)
    }

    /// Returns what runs the offline layers of a launch in a container; `None`
    /// for an appliance.
    async fn contained(&self, launch: &Launch) -> Result<Option<&Engine>, ProviderError> {
        let Some(offline) = &launch.offline else { return Ok(None) };
        if self.choice == Choice::Qemu {
            return Ok(None);
        }
        let asked = self.choice == Choice::Container;
        let engine = match self.engine().await {
            Ok(engine) => engine,
            Err(e) if asked => {
                let message = format!("containers don't work here: {}", e.message);
                let help = e.help.unwrap_or_else(|| "use `--provider auto`".into());
                return Err(ProviderError::new(message).help(help));
            }
            Err(_) => return Ok(None),
        };
        // The probe of KVM takes time, so it comes last.
        let kernel = launch.boot.as_ref().or(offline.appliance.as_ref()).map(|(k, _)| k.as_path());
        let better = !asked && self.qemu.accel_quietly(kernel).await.is_ok_and(|accel| accel == Accel::Kvm);
        Ok((offline.ours && !better).then_some(engine))
    }
}

/// Whether only root can write to the store, or replace it. Another user who
/// owns a directory above could replace the store before its disks are mounted.
/// In a sticky directory such as `/tmp`, other users can't move what root owns.
fn owned(store: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let Ok(store) = store.canonicalize() else { return false };
    let roots = |dir: &Path, sticky: bool| {
        dir.metadata()
            .is_ok_and(|m| m.uid() == 0 && (m.mode() & 0o022 == 0 || sticky && m.mode() & 0o1000 != 0))
    };
    roots(&store, false) && store.ancestors().skip(1).all(|dir| roots(dir, true))
}

/// Describes how layers will be applied, and why, without starting anything.
pub async fn explain(choice: Choice, kvm: &Kvm, store: &Path) -> String {
    let engine = Engine::allowed(owned(store)).await;
    let container = |engine: &Engine| format!("in a {} ", engine.name());
    match (choice, engine) {
        (Choice::Qemu, _) => "in an appliance under QEMU (as asked)".into(),
        (Choice::Container, Ok(engine)) => container(&engine) + "(as asked)",
        (Choice::Container, Err(why)) => format!("not at all: containers don't work here: {why}"),
        (Choice::Auto, _) if *kvm == Kvm::Works => "in an appliance under QEMU (KVM works)".into(),
        (Choice::Auto, Ok(engine)) if *kvm == Kvm::Unknown => container(&engine) + "(unless KVM works)",
        (Choice::Auto, Ok(engine)) => container(&engine) + "(KVM does not work)",
        (Choice::Auto, Err(why)) => format!("in an appliance under QEMU (no containers: {why})"),
    }
}

/// Describes the isolation of containers; `None` if there are no containers on
/// this host.
pub async fn isolation(store: &Path) -> Option<String> {
    Engine::allowed(owned(store)).await.ok().map(|engine| engine.isolation())
}

impl Provider for Host {
    type Instance = HostInstance;

    fn name(&self) -> String {
        self.qemu.name()
    }

    async fn create(&self, source: &Source, dir: &Path, lines: &Lines) -> Result<Created, ProviderError> {
        self.qemu.create(source, dir, lines).await
    }

    async fn launch(&self, launch: &Launch) -> Result<HostInstance, ProviderError> {
        if let Some(engine) = self.contained(launch).await? {
            let started =
                container::start(engine, self.qemu.programs().await?, launch, self.qemu.access()).await;
            match (started, self.choice) {
                (Ok(instance), _) => return Ok(HostInstance::Container(Box::new(instance))),
                (Err(error), Choice::Container) => return Err(error),
                (Err(error), _) => {
                    (self.notice)(&format!("{error}; using an appliance instead"));
                    let _ = std::fs::remove_file(&launch.overlay);
                }
            }
        }
        self.qemu.launch(launch).await.map(|i| HostInstance::Qemu(Box::new(i)))
    }

    async fn prewarm(&self, launch: &Launch) -> Option<HostInstance> {
        self.qemu.prewarm(launch).await.map(|i| HostInstance::Qemu(Box::new(i)))
    }

    async fn retargeted(&self, launch: &Launch, fork: &HostInstance) -> Option<Retargeted> {
        match fork {
            HostInstance::Qemu(fork) => self.qemu.retargeted(launch, fork).await,
            HostInstance::Container(_) => None,
        }
    }

    async fn find(&self, scratch: &Path) -> Result<Option<HostInstance>, ProviderError> {
        Ok(self.qemu.find(scratch).await?.map(|i| HostInstance::Qemu(Box::new(i))))
    }

    async fn alike(&self, below: &[PathBuf], a: &Made, b: &Made) -> bool {
        self.qemu.alike(below, a, b).await
    }

    async fn flatten(&self, chain: &[PathBuf], to: &Path) -> Result<(), ProviderError> {
        self.qemu.flatten(chain, to).await
    }

    async fn export(&self, chain: &[PathBuf], format: DiskFormat, to: &Path) -> Result<(), ProviderError> {
        self.qemu.export(chain, format, to).await
    }

    async fn revise(&self, chain: &[PathBuf], earlier: &Exported, copies: Vec<File>) -> Option<Vec<File>> {
        self.qemu.revise(chain, earlier, copies).await
    }
}

/// An instance on this host.
pub enum HostInstance {
    /// A machine or an appliance.
    Qemu(Box<QemuInstance>),
    /// A container.
    Container(Box<ContainerInstance>),
}

impl Instance for HostInstance {
    type Channel = tokio::net::UnixStream;

    fn way(&self) -> String {
        match self {
            Self::Qemu(i) => i.way(),
            Self::Container(i) => i.way(),
        }
    }

    fn place(&self) -> Place {
        match self {
            Self::Qemu(i) => i.place(),
            Self::Container(i) => i.place(),
        }
    }

    fn channel(&mut self) -> Option<Self::Channel> {
        match self {
            Self::Qemu(i) => i.channel(),
            Self::Container(i) => i.channel(),
        }
    }

    async fn snapshot(&mut self, next: &Path) -> Result<(), ProviderError> {
        match self {
            Self::Qemu(i) => i.snapshot(next).await,
            Self::Container(i) => i.snapshot(next).await,
        }
    }

    fn guards_disk(&self) -> bool {
        matches!(self, Self::Container(_))
    }

    fn way_out(&self) -> WayOut {
        match self {
            Self::Qemu(i) => i.way_out(),
            Self::Container(i) => i.way_out(),
        }
    }

    fn trim(&self) {
        match self {
            Self::Qemu(i) => i.trim(),
            Self::Container(i) => i.trim(),
        }
    }

    fn can_save_memory(&self) -> bool {
        matches!(self, Self::Qemu(i) if i.can_save_memory())
    }

    fn boot_reason(&self) -> Option<&str> {
        match self {
            Self::Qemu(i) => i.boot_reason(),
            Self::Container(_) => None,
        }
    }

    async fn pause(&mut self) -> Result<(), ProviderError> {
        match self {
            Self::Qemu(i) => i.pause().await,
            Self::Container(i) => i.pause().await,
        }
    }

    async fn resume(&mut self) -> Result<(), ProviderError> {
        match self {
            Self::Qemu(i) => i.resume().await,
            Self::Container(i) => i.resume().await,
        }
    }

    async fn save_memory(self) -> Result<(), ProviderError> {
        match self {
            Self::Qemu(i) => i.save_memory().await,
            Self::Container(i) => i.save_memory().await,
        }
    }

    fn distrust(&mut self) {
        match self {
            Self::Qemu(i) => i.distrust(),
            Self::Container(i) => i.distrust(),
        }
    }

    async fn ended(&mut self) -> Ended {
        match self {
            Self::Qemu(i) => i.ended().await,
            Self::Container(i) => i.ended().await,
        }
    }

    fn console_since(&self, seen: u64) -> (u64, Vec<u8>) {
        match self {
            Self::Qemu(i) => i.console_since(seen),
            Self::Container(i) => i.console_since(seen),
        }
    }

    fn console(&self) -> String {
        match self {
            Self::Qemu(i) => i.console(),
            Self::Container(i) => i.console(),
        }
    }

    async fn forward(&mut self, before: &[Forward], after: &[Forward]) -> Result<(), ProviderError> {
        match self {
            Self::Qemu(i) => i.forward(before, after).await,
            Self::Container(i) => i.forward(before, after).await,
        }
    }

    fn leave(self) {
        match self {
            Self::Qemu(i) => i.leave(),
            Self::Container(i) => i.leave(),
        }
    }

    async fn stop(self) {
        match self {
            Self::Qemu(i) => i.stop().await,
            Self::Container(i) => i.stop().await,
        }
    }
}

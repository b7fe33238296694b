//! Chooses between the runners of this host: QEMU's machines and appliances,
//! and containers where they are allowed.

use std::path::Path;

use futures_util::future::BoxFuture;
use tokio::io::AsyncWrite;
use tokio::sync::OnceCell;
use vimg_lang::model::Forward;

use super::container::{self, ContainerInstance, Engine};
use super::qemu::{Accel, Kvm, Qemu, QemuInstance};
use super::{Ended, Instance, Launch, Place, Provider, Retargeted, Servers, Snapshots};
use crate::host::network::WayOut;
use crate::host::{HostError, Lines};

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

/// What it costs to apply layers without KVM and without containers: measured
/// with a recipe that installs 400 packages.
pub const SLOWER: &str = "about six times slower than in a container";

/// The provider.
pub struct Host {
    choice: Choice,
    qemu: Qemu,
    notice: Lines,
    /// Whether only root can write to the store, so that its records can be
    /// trusted.
    owned: bool,
    /// What runs containers, or why they are not possible.
    engine: OnceCell<Result<Engine, HostError>>,
}

impl Host {
    /// Makes a provider that looks for programs when it is first used. `store`
    /// is the directory with disks and records.
    pub fn new(choice: Choice, qemu: Qemu, store: &Path, notice: Lines) -> Self {
        Self { choice, qemu, notice, owned: owned(store), engine: OnceCell::new() }
    }

    async fn engine(&self) -> Result<&Engine, HostError> {
        self.engine.get_or_init(|| Engine::allowed(self.owned)).await.as_ref().map_err(Clone::clone)
    }

    /// Returns what runs the offline layers of a launch in a container; `None`
    /// for an appliance.
    async fn contained(&self, launch: &Launch) -> Result<Option<&Engine>, HostError> {
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
                return Err(HostError::new(message).help(help));
            }
            Err(why) => {
                self.tell_cost(&why, launch).await;
                return Ok(None);
            }
        };
        // The probe of KVM takes time, so it comes last.
        let kernel = launch.boot.as_ref().or(offline.appliance.as_ref()).map(|(k, _)| k.as_path());
        let better = !asked && self.qemu.accel_quietly(kernel).await.is_ok_and(|accel| accel == Accel::Kvm);
        Ok((offline.trusted_filesystem && !better).then_some(engine))
    }
}

impl Host {
    /// Tells once a day what it costs that there are no containers, if the user
    /// can change that and KVM does not make up for it.
    async fn tell_cost(&self, why: &HostError, launch: &Launch) {
        let Some(help) = &why.help else { return };
        let kernel = launch.boot.as_ref().map(|(kernel, _)| kernel.as_path());
        if self.qemu.accel_quietly(kernel).await.is_ok_and(|accel| accel == Accel::Tcg) {
            let text = format!("layers run in an emulated appliance, {SLOWER} ({why}); {help}");
            self.qemu.tell_once("containers", &text);
        }
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

/// How offline layers will be applied.
#[derive(Debug, Clone)]
pub struct Offline {
    /// How, and why, for people.
    pub text: String,
    /// What makes this slow or impossible, if the user can change it, with its
    /// help text.
    pub trouble: Option<HostError>,
}

/// Describes how layers will be applied, and why, without starting anything.
pub async fn explain(choice: Choice, kvm: &Kvm, store: &Path) -> Offline {
    let engine = Engine::allowed(owned(store)).await;
    let container = |engine: &Engine| format!("in a {} ", engine.name());
    let text = match (choice, &engine) {
        (Choice::Qemu, _) => "in an appliance under QEMU (as asked)".into(),
        (Choice::Container, Ok(engine)) => container(engine) + "(as asked)",
        (Choice::Container, Err(why)) => format!("not at all: containers don't work here: {why}"),
        (Choice::Auto, _) if *kvm == Kvm::Works => "in an appliance under QEMU (KVM works)".into(),
        (Choice::Auto, Ok(engine)) if *kvm == Kvm::Unknown => container(engine) + "(unless KVM works)",
        (Choice::Auto, Ok(engine)) => container(engine) + "(KVM is not used)",
        (Choice::Auto, Err(why)) => format!("in an appliance under QEMU (no containers: {why})"),
    };
    let trouble = match choice {
        Choice::Qemu => None,
        Choice::Container => engine.err(),
        Choice::Auto => engine.err().filter(|why| matches!(kvm, Kvm::Fails(_)) && why.help.is_some()),
    };
    Offline { text, trouble }
}

/// Describes the isolation of containers; `None` if there are no containers on
/// this host.
pub async fn isolation(store: &Path) -> Option<String> {
    Engine::allowed(owned(store)).await.ok().map(|engine| engine.isolation())
}

impl Provider for Host {
    type Instance = HostInstance;

    async fn launch(&self, launch: &Launch) -> Result<HostInstance, HostError> {
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

    fn snapshots(&self) -> Option<&dyn Snapshots<HostInstance>> {
        Some(self)
    }

    fn servers(&self) -> Option<&dyn Servers<HostInstance>> {
        Some(self)
    }
}

/// The error for a container where only a machine will do.
fn no_machine<'a, T>() -> BoxFuture<'a, Result<T, HostError>>
where
    T: Send + 'a,
{
    Box::pin(std::future::ready(Err(HostError::new("a container has no memory snapshot and no ports"))))
}

impl Snapshots<HostInstance> for Host {
    fn prewarm<'a>(&'a self, launch: &'a Launch) -> BoxFuture<'a, Option<HostInstance>> {
        Box::pin(async { self.qemu.prewarm(launch).await.map(|i| HostInstance::Qemu(Box::new(i))) })
    }

    fn retargeted<'a>(
        &'a self,
        launch: &'a Launch,
        fork: &'a HostInstance,
    ) -> BoxFuture<'a, Option<Retargeted>> {
        match fork {
            HostInstance::Qemu(fork) => self.qemu.retargeted(launch, fork),
            HostInstance::Container(_) => Box::pin(std::future::ready(None)),
        }
    }

    fn can_save(&self, instance: &HostInstance) -> bool {
        matches!(instance, HostInstance::Qemu(i) if self.qemu.can_save(i))
    }

    fn save(&self, instance: HostInstance) -> BoxFuture<'_, Result<(), HostError>> {
        match instance {
            HostInstance::Qemu(i) => self.qemu.save(*i),
            HostInstance::Container(_) => no_machine(),
        }
    }

    fn boot_reason(&self, instance: &HostInstance) -> Option<String> {
        match instance {
            HostInstance::Qemu(i) => self.qemu.boot_reason(i),
            HostInstance::Container(_) => None,
        }
    }

    fn pause<'a>(&'a self, instance: &'a mut HostInstance) -> BoxFuture<'a, Result<(), HostError>> {
        match instance {
            HostInstance::Qemu(i) => self.qemu.pause(i),
            HostInstance::Container(_) => no_machine(),
        }
    }

    fn resume<'a>(&'a self, instance: &'a mut HostInstance) -> BoxFuture<'a, Result<(), HostError>> {
        match instance {
            HostInstance::Qemu(i) => self.qemu.resume(i),
            HostInstance::Container(_) => no_machine(),
        }
    }

    fn distrust(&self, instance: &mut HostInstance) {
        if let HostInstance::Qemu(i) = instance {
            self.qemu.distrust(i);
        }
    }
}

impl Servers<HostInstance> for Host {
    fn find<'a>(&'a self, scratch: &'a Path) -> BoxFuture<'a, Result<Option<HostInstance>, HostError>> {
        Box::pin(async { Ok(self.qemu.find(scratch).await?.map(|i| HostInstance::Qemu(Box::new(i)))) })
    }

    fn forward<'a>(
        &'a self,
        server: &'a mut HostInstance,
        before: &'a [Forward],
        after: &'a [Forward],
    ) -> BoxFuture<'a, Result<(), HostError>> {
        match server {
            HostInstance::Qemu(i) => Servers::forward(&self.qemu, i, before, after),
            HostInstance::Container(_) => no_machine(),
        }
    }

    fn leave(&self, server: HostInstance) {
        if let HostInstance::Qemu(i) = server {
            Servers::leave(&self.qemu, *i);
        }
    }
}

/// An instance on this host.
pub enum HostInstance {
    /// A machine or an appliance.
    Qemu(Box<QemuInstance>),
    /// A container.
    Container(Box<ContainerInstance>),
}

/// Calls a method of the instance, whichever it is.
macro_rules! either {
    ($instance:expr, $i:ident => $call:expr) => {
        match $instance {
            HostInstance::Qemu($i) => $call,
            HostInstance::Container($i) => $call,
        }
    };
}

impl Instance for HostInstance {
    type Channel = tokio::net::UnixStream;

    fn runner(&self) -> String {
        either!(self, i => i.runner())
    }

    fn place(&self) -> Place {
        either!(self, i => i.place())
    }

    fn channel(&mut self) -> Option<Self::Channel> {
        either!(self, i => i.channel())
    }

    fn keyboard(&mut self) -> Option<Box<dyn AsyncWrite + Send + Sync + Unpin>> {
        either!(self, i => i.keyboard())
    }

    async fn snapshot(&mut self, next: &Path) -> Result<(), HostError> {
        either!(self, i => i.snapshot(next).await)
    }

    async fn ended(&mut self) -> Ended {
        either!(self, i => i.ended().await)
    }

    fn console_since(&self, seen: u64) -> (u64, Vec<u8>) {
        either!(self, i => i.console_since(seen))
    }

    async fn stop(self) {
        either!(self, i => i.stop().await)
    }

    fn guards_disk(&self) -> bool {
        either!(self, i => i.guards_disk())
    }

    fn way_out(&self) -> WayOut {
        either!(self, i => i.way_out())
    }

    fn trim(&self) {
        either!(self, i => i.trim())
    }
}

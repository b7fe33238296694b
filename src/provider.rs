//! Runs machines, appliances and containers.
//!
//! A provider knows disks, machines and their consoles. It knows nothing of
//! recipes, nodes, keys and the store: callers give it paths. The traits are
//! not modelled on QEMU, their first implementation.

use std::fs::File;
use std::future::Future;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncWrite};
use vimg_agent::protocol::Network;
use vimg_lang::model::{Bootstrap, DiskFormat, Forward, Machine};

use crate::ext4::Altered;
use crate::host::network::{Unreachable, WayOut};

mod gpt;
mod initramfs;
pub mod debian;
mod difference;
pub mod qemu;
pub mod container;
pub mod host;

/// The agent's program, which is put into base images.
pub static AGENT: &[u8] = include_bytes!(env!("VIMG_AGENT"));

/// The source of a base disk.
#[derive(Debug, Clone)]
pub enum Source {
    /// The packages of a distribution, on a disk of this many bytes.
    Bootstrap(Bootstrap, u64),
    /// A copy of a disk file, and its expected SHA-256 in hexadecimal. The
    /// provider may remove the copy.
    Import(PathBuf, String),
}

/// The files of a new base, all in the given directory.
#[derive(Debug, Clone)]
pub struct Created {
    /// A qcow2 disk without a backing file.
    pub disk: PathBuf,
    /// Kernel and initrd, if they are known without a boot.
    pub boot: Option<(PathBuf, PathBuf)>,
    /// Modules of the same kernel, for an appliance.
    pub modules: Option<PathBuf>,
}

/// A request to start an instance.
#[derive(Debug, Clone)]
pub struct Launch {
    /// Read-only disks, the lowest first.
    pub chain: Vec<PathBuf>,
    /// The disk that takes the writes; the provider creates it.
    pub overlay: PathBuf,
    /// The overlay exists already: its machine was switched off, and boots
    /// again.
    pub again: bool,
    /// The machine.
    pub machine: Machine,
    /// Kernel and initrd for a direct boot; `None` boots with the disk's own
    /// loader.
    pub boot: Option<(PathBuf, PathBuf)>,
    /// The layer is offline: an appliance or a container can work on the disk,
    /// if the provider has one.
    pub offline: Option<Offline>,
    /// Whether the instance may need a network. Its way out stays closed until
    /// it is opened; see [`Instance::way_out`].
    pub network: bool,
    /// Identifies the disk below in the snapshot store: one name never means
    /// two contents. `None` stores and uses no snapshot, and the machine boots.
    pub memory: Option<String>,
    /// Whether a snapshot of a near-identical disk may be used.
    pub retarget: Retarget,
    /// A directory for sockets and other temporary files. It is on the disk
    /// that the store is on.
    pub scratch: PathBuf,
    /// Set for a server: it continues when vimg ends.
    pub lasting: Option<Lasting>,
}

/// The options of a server.
#[derive(Debug, Clone)]
pub struct Lasting {
    /// Ports that are forwarded into it.
    pub forwards: Vec<Forward>,
}

/// What an offline layer needs.
#[derive(Debug, Clone)]
pub struct Offline {
    /// A kernel and its modules, for an appliance.
    pub appliance: Option<(PathBuf, PathBuf)>,
    /// Whether its filesystem was made on this host, and only a kernel's own
    /// filesystem code has written to it since. Only then can the host's kernel
    /// mount it.
    pub ours: bool,
}

/// Whether a snapshot of a near-identical disk may be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retarget {
    /// Never.
    Never,
    /// If only files differ that the boot has not read, and the notes of
    /// earlier boots are equal: the machine's writes are stored.
    Stored,
    /// Also if the notes of earlier boots differ: the machine's writes are
    /// thrown away.
    Discarded,
}

/// How a snapshot is retargeted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Retargeted {
    /// The files that differ on the wanted disk.
    pub altered: Arc<[Altered]>,
    /// The disks that the machine booted from, the lowest first. Its writes go
    /// on top of these.
    pub chain: Vec<PathBuf>,
}

/// Where the agent of an instance runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// In the machine, which boots.
    Machine,
    /// In a fork of a snapshot of this disk.
    Forked,
    /// In a fork of a snapshot of another disk. The agent must retarget it; if
    /// it refuses, the fork is of no use.
    Retargeted(Retargeted),
    /// Outside the machine: in an appliance or container, which must be told to
    /// prepare, with this network.
    Outside(Option<Network>),
}

/// The memory of an appliance or container, in bytes.
pub const OFFLINE_MEMORY: u64 = 1 << 30;

/// Why an instance ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ended {
    /// The machine switched itself off or rebooted.
    Off,
    /// Its kernel panicked.
    Panic,
    /// Its kernel says that its processors have not moved for so many seconds.
    Hangs(u64),
    /// The host's disk is full; the machine is paused.
    HostDiskFull,
    /// Reading or writing its disk failed; the machine is paused.
    DiskError(String),
    /// The agent closed its port.
    AgentGone,
    /// The program that runs the machine has ended; its last output.
    Killed(String),
}

/// The disk of a built layer.
#[derive(Debug, Clone)]
pub struct Made {
    /// Its file, which is not written to any more.
    pub disk: PathBuf,
    /// When the layer was applied, in seconds since 1970.
    pub during: Range<i64>,
    /// Whether it was applied in a booted machine, which writes notes such as a
    /// journal.
    pub booted: bool,
}

/// A previous output, as qcow2.
#[derive(Debug, Clone)]
pub struct Exported {
    /// Its file.
    pub disk: PathBuf,
    /// The chain that it was exported from, the lowest first.
    pub chain: Vec<PathBuf>,
}

/// An error of a provider.
#[derive(Debug, Clone)]
pub struct ProviderError {
    /// What failed.
    pub message: String,
    /// What to do about it.
    pub help: Option<String>,
}

impl ProviderError {
    /// Makes an error without a help text.
    pub fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), help: None }
    }

    /// Adds a help text.
    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }
}

impl std::fmt::Display for ProviderError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl From<Unreachable> for ProviderError {
    fn from(error: Unreachable) -> Self {
        Self::new(format!("the network: {}", error.message)).help(error.help)
    }
}

/// Receives the lines that a program prints while it makes a base.
pub type Lines = Arc<dyn Fn(&str) + Send + Sync>;

/// Runs instances, and works on disks.
pub trait Provider: Send + Sync + 'static {
    /// The type of its instances.
    type Instance: Instance;

    /// Its name in the records of states that need no instance.
    fn name(&self) -> String;

    /// Makes a base disk in `dir`.
    fn create(
        &self,
        source: &Source,
        dir: &Path,
        lines: &Lines,
    ) -> impl Future<Output = Result<Created, ProviderError>> + Send;

    /// Starts an instance. A machine may still be booting when this returns.
    fn launch(&self, launch: &Launch) -> impl Future<Output = Result<Self::Instance, ProviderError>> + Send;

    /// Prewarms: forks a snapshot for `launch`, whose disk is not ready yet and
    /// will be near-identical. `None` if no snapshot fits, or prewarming gains
    /// nothing.
    fn prewarm(&self, launch: &Launch) -> impl Future<Output = Option<Self::Instance>> + Send {
        let _ = launch;
        std::future::ready(None)
    }

    /// Compares the disk of a prewarmed fork with the disk of `launch`; `None`
    /// if the fork can't be retargeted.
    fn retargeted(
        &self,
        launch: &Launch,
        fork: &Self::Instance,
    ) -> impl Future<Output = Option<Retargeted>> + Send {
        let _ = (launch, fork);
        std::future::ready(None)
    }

    /// Finds a running server by its scratch directory; `None` if it does not
    /// run.
    fn find(
        &self,
        scratch: &Path,
    ) -> impl Future<Output = Result<Option<Self::Instance>, ProviderError>> + Send;

    /// Whether two disks on top of the same ones are identical, apart from the
    /// times at which they were made. `false` if that is unclear.
    fn alike(&self, below: &[PathBuf], a: &Made, b: &Made) -> impl Future<Output = bool> + Send;

    /// Flattens a chain of disks into one disk.
    fn flatten(&self, chain: &[PathBuf], to: &Path)
    -> impl Future<Output = Result<(), ProviderError>> + Send;

    /// Converts a chain of disks to one file of another format.
    fn export(
        &self,
        chain: &[PathBuf],
        format: DiskFormat,
        to: &Path,
    ) -> impl Future<Output = Result<(), ProviderError>> + Send;

    /// Changes copies of a previous output so that they hold another chain.
    /// `None` if that is not possible or not worth it; the copies are then
    /// useless.
    fn revise(
        &self,
        chain: &[PathBuf],
        earlier: &Exported,
        copies: Vec<File>,
    ) -> impl Future<Output = Option<Vec<File>>> + Send {
        let _ = (chain, earlier, copies);
        std::future::ready(None)
    }
}

/// A running instance. Dropping it kills it.
pub trait Instance: Send {
    /// The type of the stream to the agent.
    type Channel: AsyncRead + AsyncWrite + Unpin + Send;

    /// Its runner as records name it, for instance `qemu 7.2.22 tcg`.
    fn way(&self) -> String;

    /// Where its agent runs.
    fn place(&self) -> Place;

    /// Takes the stream to the agent; `None` after the first call.
    fn channel(&mut self) -> Option<Self::Channel>;

    /// Switches to a new disk file at `next` for writes; the previous one stays
    /// as it is. The agent must hold all writes.
    fn snapshot(&mut self, next: &Path) -> impl Future<Output = Result<(), ProviderError>> + Send;

    /// Whether its programs can write to the disk only through the filesystem
    /// code of the host's own kernel.
    fn guards_disk(&self) -> bool {
        false
    }

    /// Its way out to the network.
    fn way_out(&self) -> WayOut {
        WayOut::default()
    }

    /// Discards unused blocks of the disk that takes the writes, where the
    /// agent can't.
    fn trim(&self) {}

    /// Whether it boots now and its memory can be saved afterwards.
    fn can_save_memory(&self) -> bool {
        false
    }

    /// Why it boots although there is a snapshot of a similar disk.
    fn boot_reason(&self) -> Option<&str> {
        None
    }

    /// Pauses it, if it can, so that it takes no CPU time from others.
    fn pause(&mut self) -> impl Future<Output = Result<(), ProviderError>> + Send {
        std::future::ready(Ok(()))
    }

    /// Continues after [`Self::pause`], with normal priority.
    fn resume(&mut self) -> impl Future<Output = Result<(), ProviderError>> + Send {
        std::future::ready(Ok(()))
    }

    /// Saves a memory snapshot of the booted machine, and stops it. The agent
    /// must have been told.
    fn save_memory(self) -> impl Future<Output = Result<(), ProviderError>> + Send;

    /// Removes the snapshot that it was forked from, because the fork did not
    /// start.
    fn distrust(&mut self) {}

    /// Waits until the machine can't continue. May be dropped and called again.
    fn ended(&mut self) -> impl Future<Output = Ended> + Send;

    /// Returns the last lines of its console.
    fn console(&self) -> String;

    /// Returns the number of bytes that its console has printed in all, and
    /// what came after the first `seen` bytes, as far as it is remembered.
    fn console_since(&self, seen: u64) -> (u64, Vec<u8>);

    /// Changes the forwarded ports of a server from `before` to `after`.
    fn forward(
        &mut self,
        before: &[Forward],
        after: &[Forward],
    ) -> impl Future<Output = Result<(), ProviderError>> + Send;

    /// Drops the handle of a server, which keeps running.
    fn leave(self);

    /// Switches the machine off, without a shutdown.
    fn stop(self) -> impl Future<Output = ()> + Send;
}

//! Virtual servers: where machines are started, and how they are talked to.
//!
//! A provider knows disks, machines and their consoles. It knows nothing of
//! recipes, nodes, keys and the store: it is given paths. The traits are not
//! QEMU's shape; QEMU is their first implementation.

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

/// The agent's program, as it is put into base images.
pub static AGENT: &[u8] = include_bytes!(env!("VIMG_AGENT"));

/// Where a disk comes from.
#[derive(Debug, Clone)]
pub enum Source {
    /// A distribution's packages, on a disk of this many bytes.
    Bootstrap(Bootstrap, u64),
    /// A copy of a disk file, with the SHA-256 in hexadecimal that it must
    /// have. The provider may remove it.
    Import(PathBuf, String),
}

/// The files of a new base: all in the directory that was given.
#[derive(Debug, Clone)]
pub struct Created {
    /// A qcow2 disk that stands alone.
    pub disk: PathBuf,
    /// Kernel and initrd, if they are known without booting.
    pub boot: Option<(PathBuf, PathBuf)>,
    /// Modules of the same kernel, for an appliance.
    pub modules: Option<PathBuf>,
}

/// What to start.
#[derive(Debug, Clone)]
pub struct Launch {
    /// Read-only disks, the lowest first.
    pub chain: Vec<PathBuf>,
    /// The disk that takes the writes; made by the provider.
    pub overlay: PathBuf,
    /// The overlay is there already: its machine was switched off, and boots
    /// again.
    pub again: bool,
    /// The machine.
    pub machine: Machine,
    /// Kernel and initrd for a direct boot; otherwise the disk's own loader.
    pub boot: Option<(PathBuf, PathBuf)>,
    /// The machine need not run: its disk is worked on from outside, if the
    /// provider knows a way.
    pub offline: Option<Offline>,
    /// Whether something in it may want the network. Its way out is closed
    /// until it is opened; see [`Instance::way_out`].
    pub network: bool,
    /// Names the disk below, for who keeps memories of machines: one name never
    /// means two contents. Without it nothing is kept, and a machine boots.
    pub memory: Option<String>,
    /// Whether a machine will do which booted from a disk that is almost the
    /// same.
    pub retarget: Retarget,
    /// A directory for sockets and the like. It lies on the disk that the
    /// store is on.
    pub scratch: PathBuf,
    /// It goes on when this program ends.
    pub lasting: Option<Lasting>,
}

/// What a machine that goes on has besides others.
#[derive(Debug, Clone)]
pub struct Lasting {
    /// What leads into it.
    pub forwards: Vec<Forward>,
}

/// What there is to work on a disk from outside of its machine.
#[derive(Debug, Clone)]
pub struct Offline {
    /// A kernel and its modules, for an appliance.
    pub appliance: Option<(PathBuf, PathBuf)>,
    /// Whether its filesystem was made here, and nothing but a kernel's own
    /// filesystem code has written to it since. Only then a host's kernel may
    /// be trusted with it.
    pub ours: bool,
}

/// Whether a machine will do which booted from a disk that is almost the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retarget {
    /// It won't.
    Never,
    /// If only files differ that no boot has read, and all else is the same:
    /// what it writes is kept.
    Stored,
    /// Also if the disks were written to by machines that ran, and took notes
    /// of that: what it writes is thrown away.
    Discarded,
}

/// What a machine is carried over from, and by what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Retargeted {
    /// What is otherwise on the disk that is wanted.
    pub altered: Arc<[Altered]>,
    /// The disks that the machine booted from, the lowest first: what it
    /// writes lies on these.
    pub chain: Vec<PathBuf>,
}

/// Where an instance's agent is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// In the machine itself, which boots.
    Machine,
    /// In the machine, which booted before and was kept.
    Forked,
    /// In a machine that booted from another disk, and was kept. It must be
    /// carried over, unless its agent refuses: then it is of no use.
    Retargeted(Retargeted),
    /// Outside of it: it must be told to prepare, with this network.
    Outside(Option<Network>),
}

/// The memory that work on a disk from outside of its machine may take, in
/// bytes.
pub const OFFLINE_MEMORY: u64 = 1 << 30;

/// How an instance came to its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ended {
    /// The machine switched itself off or rebooted.
    Off,
    /// Its kernel panicked.
    Panic,
    /// The host's disk is full; the machine is held.
    HostDiskFull,
    /// Reading or writing its disk failed; the machine is held.
    DiskError(String),
    /// The agent closed its port.
    AgentGone,
    /// The program that runs the machine is gone; its last words.
    Killed(String),
}

/// A disk that a layer left on others.
#[derive(Debug, Clone)]
pub struct Made {
    /// Its file, which nobody writes to.
    pub disk: PathBuf,
    /// When that was made, in seconds since 1970.
    pub during: Range<i64>,
    /// In a machine that ran, and took notes of that.
    pub booted: bool,
}

/// A disk that was exported before, as qcow2.
#[derive(Debug, Clone)]
pub struct Exported {
    /// Its file.
    pub disk: PathBuf,
    /// The chain that it was written from, the lowest first.
    pub chain: Vec<PathBuf>,
}

/// Why a provider could not do something.
#[derive(Debug, Clone)]
pub struct ProviderError {
    /// What happened, in a sentence.
    pub message: String,
    /// What to do about it.
    pub help: Option<String>,
}

impl ProviderError {
    /// An error without advice.
    pub fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), help: None }
    }

    /// Adds advice.
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

/// Lines that a program of the host prints while a base is made.
pub type Lines = Arc<dyn Fn(&str) + Send + Sync>;

/// A virtual server service.
pub trait Provider: Send + Sync + 'static {
    /// Its instances.
    type Instance: Instance;

    /// Names the provider for the records of what it made without an instance.
    fn name(&self) -> String;

    /// Makes a base disk in `dir`.
    fn create(
        &self,
        source: &Source,
        dir: &Path,
        lines: &Lines,
    ) -> impl Future<Output = Result<Created, ProviderError>> + Send;

    /// Starts an instance. It may still be booting when this returns.
    fn launch(&self, launch: &Launch) -> impl Future<Output = Result<Self::Instance, ProviderError>> + Send;

    /// Forks a kept machine that would do for `launch`, for a disk that is not
    /// there yet and will be like that one; `None` if there is none, or nothing
    /// is gained.
    fn prewarm(&self, launch: &Launch) -> impl Future<Output = Option<Self::Instance>> + Send {
        let _ = launch;
        std::future::ready(None)
    }

    /// How such a fork is carried over to the disk of `launch`; `None` if it
    /// can't be.
    fn retargeted(
        &self,
        launch: &Launch,
        fork: &Self::Instance,
    ) -> impl Future<Output = Option<Retargeted>> + Send {
        let _ = (launch, fork);
        std::future::ready(None)
    }

    /// Finds a machine again that was launched to last, by its scratch
    /// directory; `None` if it does not run.
    fn find(
        &self,
        scratch: &Path,
    ) -> impl Future<Output = Result<Option<Self::Instance>, ProviderError>> + Send;

    /// Whether two disks that lie on the same ones hold the same, but for the
    /// times at which they were made. If that can't be told they don't.
    fn alike(&self, below: &[PathBuf], a: &Made, b: &Made) -> impl Future<Output = bool> + Send;

    /// Joins a chain of disks into one that stands alone.
    fn flatten(&self, chain: &[PathBuf], to: &Path)
    -> impl Future<Output = Result<(), ProviderError>> + Send;

    /// Writes a chain of disks as one disk of another format.
    fn export(
        &self,
        chain: &[PathBuf],
        format: DiskFormat,
        to: &Path,
    ) -> impl Future<Output = Result<(), ProviderError>> + Send;

    /// Changes copies of a disk that was exported before, so that they hold
    /// another chain. `None` if that can't be, or is not worth it: they are of
    /// no use then.
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

/// A running virtual server. Dropping it kills it.
pub trait Instance: Send {
    /// The stream to the agent.
    type Channel: AsyncRead + AsyncWrite + Unpin + Send;

    /// Names the way it runs for records, for instance `qemu 7.2.22 tcg`.
    fn way(&self) -> String;

    /// Where its agent is.
    fn place(&self) -> Place;

    /// The stream to the agent; it can be taken once.
    fn channel(&mut self) -> Option<Self::Channel>;

    /// Leaves the disk that takes the writes as it is, for good, and goes on
    /// with a new one at `next`. The agent must hold all writes.
    fn snapshot(&mut self, next: &Path) -> impl Future<Output = Result<(), ProviderError>> + Send;

    /// Whether what runs in it can change its disk only by way of a kernel's
    /// filesystem code that is the host's own.
    fn guards_disk(&self) -> bool {
        false
    }

    /// What it has of a network.
    fn way_out(&self) -> WayOut {
        WayOut::default()
    }

    /// Tells the disk that takes the writes what is not used of it, where the
    /// agent can't.
    fn trim(&self) {}

    /// Whether it boots, and can be kept when it has: others then fork it.
    fn can_save_memory(&self) -> bool {
        false
    }

    /// Why it boots although a machine was kept of a disk that comes close, in
    /// a sentence.
    fn boot_reason(&self) -> Option<&str> {
        None
    }

    /// Has it stand still, if it can, until it is told to go on: what waits
    /// takes nothing from who works.
    fn pause(&mut self) -> impl Future<Output = Result<(), ProviderError>> + Send {
        std::future::ready(Ok(()))
    }

    /// Has it go on that stood still, and no longer yield to others.
    fn resume(&mut self) -> impl Future<Output = Result<(), ProviderError>> + Send {
        std::future::ready(Ok(()))
    }

    /// Keeps it as it has booted, and ends it. The agent must have been told.
    fn save_memory(self) -> impl Future<Output = Result<(), ProviderError>> + Send;

    /// It did not come up: what it was started from is not to be used again,
    /// if it is only a shortcut.
    fn distrust(&mut self) {}

    /// Waits until the machine can't go on. May be dropped and called again.
    fn ended(&mut self) -> impl Future<Output = Ended> + Send;

    /// The last lines of its console.
    fn console(&self) -> String;

    /// What its console said after the first `seen` bytes, as far as that is
    /// still known, and how many bytes it has said in all.
    fn console_since(&self, seen: u64) -> (u64, Vec<u8>);

    /// Changes what leads into a machine that was launched to last from
    /// `before` to `after`.
    fn forward(
        &mut self,
        before: &[Forward],
        after: &[Forward],
    ) -> impl Future<Output = Result<(), ProviderError>> + Send;

    /// Lets go of a machine that was launched to last: it goes on.
    fn leave(self);

    /// Switches the machine off without asking it.
    fn stop(self) -> impl Future<Output = ()> + Send;
}

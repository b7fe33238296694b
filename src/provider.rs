//! Runs machines, appliances and containers.
//!
//! A provider knows machines and their consoles. It knows nothing of recipes,
//! nodes, keys and the store: callers give it paths. The traits are not
//! modelled on QEMU, their first implementation.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures_util::future::BoxFuture;
use tokio::io::{AsyncRead, AsyncWrite};
use vimg_agent::protocol::Network;
use vimg_lang::model::{Forward, Machine};

use crate::disk::ext4::Altered;
use crate::host::HostError;
use crate::host::network::WayOut;

pub mod qemu;
pub mod container;
pub mod host;

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
    /// Words for the kernel's command line of a direct boot, besides those of
    /// the provider, with spaces between them.
    pub parameters: String,
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
    /// Whether a person watches the console: it shows the boot then, and root is
    /// logged in there.
    pub watched: bool,
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
    pub trusted_filesystem: bool,
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

/// Runs instances. A provider must have [`Provider::launch`] and the methods of
/// [`Instance`]; what only some can do is in parts of their own.
pub trait Provider: Send + Sync + 'static {
    /// The type of its instances.
    type Instance: Instance;

    /// Starts an instance. A machine may still be booting when this returns.
    fn launch(&self, launch: &Launch) -> impl Future<Output = Result<Self::Instance, HostError>> + Send;

    /// Saves and forks the memory of machines, if it can.
    fn snapshots(&self) -> Option<&dyn Snapshots<Self::Instance>> {
        None
    }

    /// Runs machines that outlive vimg, if it can.
    fn servers(&self) -> Option<&dyn Servers<Self::Instance>> {
        None
    }
}

/// A running instance. Dropping it kills it.
pub trait Instance: Send + Sync {
    /// The type of the stream to the agent.
    type Channel: AsyncRead + AsyncWrite + Unpin + Send;

    /// Its runner as records name it, for instance `qemu 7.2.22 tcg`.
    fn runner(&self) -> String;

    /// Where its agent runs.
    fn place(&self) -> Place;

    /// Takes the stream to the agent; `None` after the first call.
    fn channel(&mut self) -> Option<Self::Channel>;

    /// Takes the stream to what reads the serial console; `None` after the first
    /// call, or if nothing does.
    fn keyboard(&mut self) -> Option<Box<dyn AsyncWrite + Send + Sync + Unpin>> {
        None
    }

    /// Switches to a new disk file at `next` for writes; the previous one stays
    /// as it is. The agent must hold all writes.
    fn snapshot(&mut self, next: &Path) -> impl Future<Output = Result<(), HostError>> + Send;

    /// Waits until the machine can't continue. May be dropped and called again.
    fn ended(&mut self) -> impl Future<Output = Ended> + Send;

    /// Returns the number of bytes that its console has printed in all, and
    /// what came after the first `seen` bytes, as far as it is remembered.
    fn console_since(&self, seen: u64) -> (u64, Vec<u8>);

    /// Switches the machine off, without a shutdown.
    fn stop(self) -> impl Future<Output = ()> + Send;

    /// Returns the last lines of its console.
    fn console(&self) -> String {
        String::from_utf8_lossy(&self.console_since(0).1).into_owned()
    }

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
}

/// Memory snapshots: the optional part of a provider that saves booted machines
/// and forks them.
pub trait Snapshots<I>: Send + Sync {
    /// Prewarms: forks a snapshot for `launch`, whose disk is not ready yet and
    /// will be near-identical. `None` if no snapshot fits, or prewarming gains
    /// nothing.
    fn prewarm<'a>(&'a self, launch: &'a Launch) -> BoxFuture<'a, Option<I>>;

    /// Compares the disk of a prewarmed fork with the disk of `launch`; `None`
    /// if the fork can't be retargeted.
    fn retargeted<'a>(&'a self, launch: &'a Launch, fork: &'a I) -> BoxFuture<'a, Option<Retargeted>>;

    /// Whether an instance boots now and its memory can be saved afterwards.
    fn can_save(&self, instance: &I) -> bool;

    /// Saves the memory of a booted machine, and stops it. The agent must have
    /// been told.
    fn save(&self, instance: I) -> BoxFuture<'_, Result<(), HostError>>;

    /// Says why an instance boots although there is a snapshot of a similar
    /// disk.
    fn boot_reason(&self, instance: &I) -> Option<String>;

    /// Pauses an instance, so that it takes no CPU time from others.
    fn pause<'a>(&'a self, instance: &'a mut I) -> BoxFuture<'a, Result<(), HostError>>;

    /// Continues after [`Self::pause`], with normal priority.
    fn resume<'a>(&'a self, instance: &'a mut I) -> BoxFuture<'a, Result<(), HostError>>;

    /// Removes the snapshot that an instance was forked from, because the fork
    /// did not start.
    fn distrust(&self, instance: &mut I);
}

/// Servers: the optional part of a provider whose machines can outlive vimg.
pub trait Servers<I>: Send + Sync {
    /// Finds a running server by its scratch directory; `None` if it does not
    /// run.
    fn find<'a>(&'a self, scratch: &'a Path) -> BoxFuture<'a, Result<Option<I>, HostError>>;

    /// Changes the forwarded ports of a server from `before` to `after`.
    fn forward<'a>(
        &'a self,
        server: &'a mut I,
        before: &'a [Forward],
        after: &'a [Forward],
    ) -> BoxFuture<'a, Result<(), HostError>>;

    /// Drops the handle of a server, which keeps running.
    fn leave(&self, server: I);
}

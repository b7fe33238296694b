//! The messages between host and agent.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use vimg_model::Probe;

use super::blob::Digest;
use super::change::Change;
use super::order::Order;

/// What sealing a machine did.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sealed {
    /// The removed paths, for people.
    pub removed: Vec<String>,
    /// Files with private keys that no layer declares: all machines of the image will have
    /// the same.
    pub private_keys: Vec<String>,
}

/// From the host to the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ToAgent {
    /// Apply steps, in order. Answered by `Done`, `RebootDue` or `Failed`.
    Apply(Apply),
    /// Mount the disk of another machine, in an appliance or container. Answered by
    /// `Prepared`.
    Prepare(Prepare),
    /// Run probes, in order, up to the first that fails. Answered by `Passed` or
    /// `Failed`.
    Check {
        /// The probes.
        probes: Vec<Probe>,
        /// Environment variables of scripts: the user's proxies, if the check has a
        /// network.
        variables: Vec<(String, String)>,
    },
    /// Resume from a memory snapshot. Answered by `Resumed`.
    Resume(Resume),
    /// Resume from a memory snapshot, and change files, as if the machine had booted with
    /// the changed files. Their contents follow as frames of data. Answered by
    /// `Retargeted`, or by `Refused` if the boot may have depended on the old files; the
    /// machine is then unusable.
    Retarget {
        /// The time and randomness of the fork.
        resume: Resume,
        /// The files to change.
        changes: Vec<Change>,
    },
    /// Do the work of `Retarget` without changing anything: in an emulated machine, the
    /// first run of any code is slow. Answered by `Rehearsed`.
    Rehearse {
        /// Typical changes.
        changes: Vec<Change>,
    },
    /// Run a program for the user. The agent sends `Wrote` for its output, and `Exited` at
    /// the end. Frames of data are its input.
    Exec(Exec),
    /// The terminal of the program has another size.
    Resize(Size),
    /// The program's input ends.
    EndInput,
    /// Write everything to disk and record what the boot has read, because the host is
    /// going to take a memory snapshot. Answered by `SnapshotReady`.
    PrepareSnapshot,
    /// Write everything to disk and block all writes. Answered by `Frozen`.
    Freeze,
    /// Allow writes again. Answered by `Thawed`.
    Thaw,
    /// Remove what two machines must not share. Answered by `Sealed`.
    Seal {
        /// Whether the installed agent stays in the image.
        agent: bool,
    },
    /// Send the list of installed packages (one per line: name and architecture, version,
    /// `auto` or `manual`), and then the list of all files (one [`Listed`] as JSON per
    /// line), each followed by an empty frame of data.
    List,
    /// Compute digests of files. Answered by `Digests`.
    Digests {
        /// Paths, escaped as in [`Listed`].
        paths: Vec<String>,
    },
    /// The reply to [`FromAgent::Network`].
    Network {
        /// Environment variables that name the user's proxies.
        variables: Vec<(String, String)>,
    },
    /// Stop all services and switch the machine off. Answered by `GoingOff`.
    SwitchOff,
    /// Send the kernel and then the initrd that the machine would boot, each followed by
    /// an empty frame of data.
    SendBootFiles,
}

/// A request to apply steps.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Apply {
    /// The layer of the steps, up to a step that names another layer.
    pub layer: Option<String>,
    /// The steps.
    pub steps: Vec<Order>,
    /// The index of the first step that is not applied yet.
    pub from: usize,
    /// Whether to start nothing, as if the machine were switched off.
    pub offline: bool,
    /// Whether an entry of the ledger must be on disk before its change is made, because
    /// the machine may stop at any time. Not needed if the disk is thrown away after a
    /// failure.
    pub durable: bool,
    /// The address of `host.vimg.internal`, if the user allows guests to reach the host.
    pub host: Option<String>,
}

/// A program to run for the user.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exec {
    /// The program and its arguments. If empty, root's login shell.
    pub command: Vec<String>,
    /// The terminal that it runs on, if any.
    pub terminal: Option<Terminal>,
}

/// The user's terminal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Terminal {
    /// Its kind, as in `TERM`.
    pub kind: String,
    /// Its size.
    pub size: Size,
}

/// The size of a terminal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    /// Number of rows.
    pub rows: u16,
    /// Number of columns.
    pub columns: u16,
}

/// An output stream of a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stream {
    /// Standard output, or the terminal.
    Output,
    /// Standard error.
    Error,
}

/// The time and randomness of a fork: two forks of a snapshot must not share them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resume {
    /// The time in nanoseconds since 1970: the machine's own clock has stopped.
    pub time: u64,
    /// Random bytes, unique to this fork: all forks have the same entropy pool.
    pub seed: Vec<u8>,
}

/// A request to prepare for the disk of another machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prepare {
    /// Time and randomness: the appliance may be a fork.
    pub resume: Resume,
    /// The network, if there is one.
    pub network: Option<Network>,
}

/// The network of an appliance or container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// The text of `/etc/resolv.conf` while layers are applied.
    pub resolv_conf: String,
}

/// An entry of the list of files on a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listed {
    /// Its path. `\\` and bytes that are not UTF-8 are written as `\\xNN`.
    pub path: String,
    /// Its kind.
    pub kind: Kind,
    /// Permission bits.
    pub mode: u32,
    /// Ids of user and group.
    pub owner: (u32, u32),
    /// Size in bytes; 0 unless it is a regular file.
    pub size: u64,
    /// Extended attributes, with values in hexadecimal.
    pub attributes: BTreeMap<String, String>,
    /// Its inode number, and the time of the last change of the inode: seconds and
    /// nanoseconds.
    pub stamp: (u64, i64, i64),
}

/// A kind of file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// A directory.
    Dir,
    /// A file.
    File,
    /// A symbolic link with its target.
    Link(String),
    /// `fifo`, `socket` or `device`.
    Other(String),
}

/// From the agent to the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FromAgent {
    /// The first message.
    Hello {
        /// [`PROTOCOL`](super::PROTOCOL) of the agent.
        protocol: u32,
        /// [`BEHAVIOUR`](super::BEHAVIOUR) of the agent.
        behaviour: u32,
        /// The kernel's boot id, which differs from boot to boot.
        boot_id: String,
    },
    /// The machine has booted.
    Ready {
        /// Names of units that failed to start.
        failed_units: Vec<String>,
    },
    /// Send blobs, in this order, as frames of data.
    Fetch {
        /// Their digests.
        digests: Vec<Digest>,
    },
    /// Send a secret as frames of data, followed by an empty frame of data. The agent
    /// requests it by name for each script, and stores no digest of it.
    FetchSecret {
        /// Its name.
        name: String,
    },
    /// Enable or disable the network. Answered by [`ToAgent::Network`] once that is done.
    Network {
        /// `true` to enable it.
        open: bool,
    },
    /// A step begins.
    Started {
        /// Its index.
        step: usize,
    },
    /// Output of a step.
    Output {
        /// Its index.
        step: usize,
        /// The text. Bytes that are not UTF-8 are replaced.
        text: String,
    },
    /// A step is applied.
    Finished {
        /// Its index.
        step: usize,
        /// Whether it changed anything.
        changed: bool,
    },
    /// All steps are applied.
    Done {
        /// Whether the kernel or initrd differs from when the agent started or last
        /// reported it.
        boot_changed: bool,
    },
    /// The next step is a reboot. The host switches the machine off, boots it, and sends
    /// the rest of the steps again.
    RebootDue {
        /// The index of the reboot.
        step: usize,
        /// As in `Done`.
        boot_changed: bool,
    },
    /// The requested digests.
    Digests {
        /// Digests in the order of the request; `None` for a file that can't be read.
        digests: Vec<Option<Digest>>,
    },
    /// The machine switches itself off.
    GoingOff,
    /// A step failed; later ones were not tried.
    Failed {
        /// Its index.
        step: usize,
        /// The reason, in a sentence.
        message: String,
        /// The exit code of the program that failed.
        exit: Option<i32>,
        /// The layer that caused the failure, if it is another one.
        layer: Option<String>,
    },
    /// All probes have succeeded.
    Passed,
    /// A program has written output, which is in the next frame of data.
    Wrote(Stream),
    /// A program has ended, with an exit code or by a signal.
    Exited {
        /// Its exit code.
        code: Option<i32>,
        /// The signal that killed it.
        signal: Option<i32>,
    },
    /// The disk is mounted, and layers can be applied.
    Prepared,
    /// The fork has its own time and randomness.
    Resumed,
    /// The machine is as if it had booted with the changed files.
    Retargeted,
    /// The reply to `Rehearse`.
    Rehearsed,
    /// Everything is on disk, and the host can take a memory snapshot.
    SnapshotReady,
    /// Everything is on disk, and writes are blocked.
    Frozen,
    /// Writes are allowed again.
    Thawed,
    /// The machine is sealed.
    Sealed(Sealed),
    /// A request failed.
    Refused {
        /// What failed, and why.
        message: String,
    },
    /// The agent is alive. Sent every few seconds, unless the kernel blocks the agent.
    Heartbeat,
}

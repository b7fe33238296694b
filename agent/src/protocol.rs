//! The protocol between host and agent.
//!
//! After the handshake, both sides send frames: a little-endian `u32` with the length of
//! the rest, a byte with the kind, and the payload. Both sides treat input as hostile:
//! they check a length before they allocate memory, and invalid input ends the session.

mod blob;
mod change;
mod order;
mod tree;

use std::collections::BTreeMap;
use std::io::{self, Read, Write};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

pub use blob::{Blob, CHUNK, Digest};
pub use change::{Change, Inode, MAX_RETARGETED, Time};
pub use order::{Order, Primitive, Run, Script};
pub use tree::{Entry, Manifest, Node};
pub use vimg_model::{Around, Owner, Probe, ServiceState, User, When};

/// The version of the protocol. Host and agent must have the same version.
pub const PROTOCOL: u32 = 14;

/// The behaviour version of the agent. It enters the keys of layers, checks and sealed
/// disks, so raising it rebuilds all but the bases. Raise it when the same layer would
/// now give another machine. `agent/behaviour.lock` has the digest of the sources for
/// which this was last decided.
pub const BEHAVIOUR: u32 = 7;

/// The path of the agent in a machine. Its first argument is a command; see `hooks`.
pub const AGENT: &str = "/usr/lib/vimg/agent";

/// The path of the agent in vimg's initramfs, and of the kernel's first process
/// (`rdinit=`). An initramfs of a distribution has its own `/init`.
pub const EARLY: &str = "/vimg-init";

/// The name of the virtio-serial port.
pub const PORT: &str = "vimg.agent";

/// The largest frame in bytes, including the kind.
pub const MAX_FRAME: usize = 1 << 20;

/// The start of the handshake. Its first four bytes are not a valid length, so an agent
/// that waits for a frame recognises a new handshake.
pub const SYNC: [u8; 16] = *b"\xff\xff\xff\xffvimg-sync-1\n";

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
    Seal,
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

/// The addresses of an appliance: the defaults of QEMU's user-mode network (QEMU's
/// documentation, "Using the user mode network stack").
pub mod card {
    /// The address of the appliance.
    pub const ADDRESS: [u8; 4] = [10, 0, 2, 15];
    /// The netmask.
    pub const NETMASK: [u8; 4] = [255, 255, 255, 0];
    /// The gateway.
    pub const GATEWAY: [u8; 4] = [10, 0, 2, 2];
    /// The DNS server.
    pub const RESOLVER: &str = "10.0.2.3";
}

/// The capabilities of root's programs in an offline layer, in an appliance and in a
/// container: they can change owners and modes, become other users, and use chroots.
/// `docs/explanation/isolation.md` lists them.
pub const CAPABILITIES: [&str; 13] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "SETFCAP",
    "NET_BIND_SERVICE",
    "SYS_CHROOT",
    "AUDIT_WRITE",
];

/// The word on the kernel's command line that makes the first process serve as an
/// appliance.
pub const APPLIANCE: &str = "vimg.appliance";

/// The word that makes a machine record which files its boot opens.
pub const WATCHED: &str = "vimg.watched";

/// The word that turns address randomisation off. An emulator caches translated code by
/// its address: it then translates a library only once for all programs.
pub const FIXED: &str = "vimg.fixed";

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
        /// [`PROTOCOL`] of the agent.
        protocol: u32,
        /// [`BEHAVIOUR`] of the agent.
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
    Sealed,
    /// A request failed.
    Refused {
        /// What failed, and why.
        message: String,
    },
    /// The agent is alive. Sent every few seconds, unless the kernel blocks the agent.
    Heartbeat,
}

/// The interval of `Heartbeat` messages, in seconds.
pub const HEARTBEAT_EVERY: u64 = 5;

/// A frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// A message as JSON.
    Message(Vec<u8>),
    /// Bytes of a file or stream.
    Data(Vec<u8>),
}

const MESSAGE: u8 = 0;
const DATA: u8 = 1;

/// Why a frame is invalid.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Malformed(pub String);

impl From<Malformed> for io::Error {
    fn from(malformed: Malformed) -> Self {
        io::Error::new(io::ErrorKind::InvalidData, malformed.0)
    }
}

impl Frame {
    /// Decodes and checks the length, the first four bytes of a frame.
    pub fn length(header: [u8; 4]) -> Result<usize, Malformed> {
        let length = u32::from_le_bytes(header) as usize;
        if length == 0 || length > MAX_FRAME {
            return Err(Malformed(format!("invalid frame of {length} bytes")));
        }
        Ok(length)
    }

    /// Decodes a frame from the bytes after the length.
    pub fn from_body(mut body: Vec<u8>) -> Result<Self, Malformed> {
        match body.first() {
            Some(&MESSAGE) => Ok(Self::Message(body.split_off(1))),
            Some(&DATA) => Ok(Self::Data(body.split_off(1))),
            Some(kind) => Err(Malformed(format!("unknown kind of frame: {kind}"))),
            None => Err(Malformed("empty frame".into())),
        }
    }

    /// Decodes the message of a frame.
    pub fn message<M: DeserializeOwned>(&self) -> Result<M, Malformed> {
        match self {
            Self::Message(bytes) => {
                serde_json::from_slice(bytes).map_err(|e| Malformed(format!("invalid message: {e}")))
            }
            Self::Data(_) => Err(Malformed("unexpected data: expected a message".into())),
        }
    }
}

/// Encodes a message as a frame.
pub fn encode_message<M: Serialize>(message: &M) -> io::Result<Vec<u8>> {
    encode(MESSAGE, &serde_json::to_vec(message)?)
}

/// Encodes a frame of data.
pub fn encode_data(bytes: &[u8]) -> io::Result<Vec<u8>> {
    encode(DATA, bytes)
}

fn encode(kind: u8, payload: &[u8]) -> io::Result<Vec<u8>> {
    let length = payload.len() + 1;
    if length > MAX_FRAME {
        return Err(Malformed(format!("invalid frame of {length} bytes")).into());
    }
    let mut out = Vec::with_capacity(length + 4);
    out.extend((length as u32).to_le_bytes());
    out.push(kind);
    out.extend(payload);
    Ok(out)
}

/// Reads a frame; `None` at the end of the stream.
pub fn read_frame(reader: &mut impl Read) -> io::Result<Option<Frame>> {
    let mut header = [0; 4];
    if let Err(error) = reader.read_exact(&mut header) {
        return match error.kind() {
            io::ErrorKind::UnexpectedEof => Ok(None),
            _ => Err(error),
        };
    }
    let mut body = vec![0; Frame::length(header)?];
    reader.read_exact(&mut body)?;
    Ok(Some(Frame::from_body(body)?))
}

/// Writes a message.
pub fn write_message<M: Serialize>(writer: &mut impl Write, message: &M) -> io::Result<()> {
    writer.write_all(&encode_message(message)?)?;
    writer.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_survive_the_wire() {
        let message = FromAgent::Output { step: 3, text: "é".into() };
        let mut wire = encode_message(&message).unwrap();
        wire.extend(encode_data(b"abc").unwrap());
        let mut reader = wire.as_slice();
        assert_eq!(read_frame(&mut reader).unwrap().unwrap().message(), Ok(message));
        assert_eq!(read_frame(&mut reader).unwrap(), Some(Frame::Data(b"abc".to_vec())));
        assert_eq!(read_frame(&mut reader).unwrap(), None);
    }

    #[test]
    fn lengths_are_checked_before_allocation() {
        assert!(Frame::length(u32::MAX.to_le_bytes()).is_err());
        assert!(Frame::length(0_u32.to_le_bytes()).is_err());
        assert!(Frame::length([SYNC[0], SYNC[1], SYNC[2], SYNC[3]]).is_err());
        assert!(read_frame(&mut [5, 0, 0, 0, 0, 1].as_slice()).is_err());
        assert!(read_frame(&mut [1, 0, 0, 0, 9].as_slice()).is_err());
    }

    const _: () = assert!(CHUNK < MAX_FRAME);

    #[test]
    fn every_frame_within_the_cap_is_legal() {
        assert!(encode_data(&vec![0; MAX_FRAME]).is_err());
        assert!(encode_data(&vec![0; MAX_FRAME - 1]).is_ok());
    }
}

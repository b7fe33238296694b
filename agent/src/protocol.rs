//! What host and agent say to each other.
//!
//! After the handshake both sides send frames: a little-endian `u32` with the
//! length of what follows, a byte with its kind, the payload. Both sides treat
//! what they read as hostile: a length is checked before anything is
//! allocated, and what does not parse ends the conversation.

mod blob;
mod change;
mod resource;

use std::collections::BTreeMap;
use std::io::{self, Read, Write};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

pub use blob::{Blob, CHUNK, Digest};
pub use change::{Change, Inode, MAX_RETARGETED, Time};
pub use resource::{Around, Entry, Manifest, Node, Owner, Primitive, Probe, Run, Script, ServiceState, User};

/// The version of these messages. Host and agent must have the same.
pub const PROTOCOL: u32 = 13;

/// The version of what the agent does to a machine. It enters every key, so
/// raising it rebuilds everything: raise it when the same layer would now
/// give another machine. `agent/behaviour.lock` holds the digest of the
/// sources that it was last looked at for.
pub const BEHAVIOUR: u32 = 7;

/// Where the agent is in a machine. Its first argument says what it is for;
/// see `hooks`.
pub const AGENT: &str = "/usr/lib/vimg/agent";

/// The name of the virtio-serial port.
pub const PORT: &str = "vimg.agent";

/// The largest frame in bytes, kind included.
pub const MAX_FRAME: usize = 1 << 20;

/// Opens the handshake. Its first four bytes can be no frame's length, so an
/// agent that waits for a frame recognises a host that starts anew.
pub const SYNC: [u8; 16] = *b"\xff\xff\xff\xffvimg-sync-1\n";

/// From the host to the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ToAgent {
    /// Make these true, in order. Answered by `Done`, `RebootDue` or `Failed`.
    Apply(Apply),
    /// Bring the disk of another machine up, where the agent is no part of
    /// that machine. Answered by `Prepared`.
    Prepare(Prepare),
    /// Ask these of the machine, in order, up to the first no. Answered by
    /// `Passed` or `Failed`.
    Check {
        /// What is asked.
        probes: Vec<Probe>,
        /// Variables for its scripts: the user's proxies, if the check has a
        /// network.
        variables: Vec<(String, String)>,
    },
    /// The machine runs on from where its memory was kept. Answered by `Resumed`.
    Resume(Resume),
    /// The same with these files changed, as if the machine had booted with
    /// them so. Their contents follow as frames of data. Answered by
    /// `Retargeted`, or by `Refused` if the boot may have depended on what they
    /// were; the machine is of no use then.
    Retarget {
        /// What makes it a machine of its own.
        resume: Resume,
        /// What is to change.
        changes: Vec<Change>,
    },
    /// Go through the motions of `Retarget` and change nothing: where a machine is
    /// emulated, what is done for the first time takes longest. Answered by
    /// `Rehearsed`.
    Rehearse {
        /// What changes may be like.
        changes: Vec<Change>,
    },
    /// Run a program for a person. `Wrote` comes as it writes, and `Exited`
    /// in the end. Frames of data are its input.
    Exec(Exec),
    /// The terminal of the program has another size.
    Resize(Size),
    /// The program's input ends.
    EndInput,
    /// The machine has booted and is to be kept as it is: write everything to
    /// disk, and look back at the boot. Answered by `Kept`.
    PrepareSnapshot,
    /// Write everything to disk and hold all writes. Answered by `Frozen`.
    Freeze,
    /// Let writes go on. Answered by `Thawed`.
    Thaw,
    /// Take out what must not be the same in two machines. Answered by
    /// `Sealed`.
    Seal,
    /// Send the list of installed packages (a line for each: name and
    /// architecture, version, `auto` or `manual`), then what is on the disk (a
    /// [`Listed`] as JSON on each line), each followed by an empty frame of
    /// data.
    List,
    /// Answered by `Digests`.
    Digests {
        /// As in [`Listed`].
        paths: Vec<String>,
    },
    /// The reply to [`FromAgent::Network`].
    Network {
        /// Variables that lead programs to the user's proxies.
        variables: Vec<(String, String)>,
    },
    /// Stop all services and switch the machine off. Answered by `GoingOff`.
    SwitchOff,
    /// Send the kernel, then the initrd, that the machine would boot, each
    /// followed by an empty frame of data.
    SendBootFiles,
}

/// What is to be made true.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Apply {
    /// The layer that the steps are of, up to one that names another.
    pub layer: Option<String>,
    /// What is to be.
    pub steps: Vec<Primitive>,
    /// The first of them that is not so yet.
    pub from: usize,
    /// Nothing is to be started: the machine is taken for one that is switched
    /// off, even where it runs.
    pub offline: bool,
    /// The machine may stop at any time and is to know then what was done:
    /// what is noted is on its disk before anything changes. A disk that is
    /// kept whole or not at all needs no such care.
    pub durable: bool,
    /// The address at which the host is `host.vimg.internal`, where its user
    /// lets guests reach it.
    pub host: Option<String>,
}

/// A program that a person runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exec {
    /// The program and its arguments; root's login shell if it is empty.
    pub command: Vec<String>,
    /// The terminal that it runs on, if any.
    pub terminal: Option<Terminal>,
}

/// A person's terminal.
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
    /// Characters from top to bottom.
    pub rows: u16,
    /// Characters in a line.
    pub columns: u16,
}

/// Where a program writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stream {
    /// Standard output, or its terminal.
    Output,
    /// Standard error.
    Error,
}

/// What two forks of one memory must not share.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resume {
    /// Nanoseconds since 1970: the machine's own clock stood still.
    pub time: u64,
    /// Bytes that nobody else gets: both have the same pool of randomness.
    pub seed: Vec<u8>,
}

/// What an agent needs to know that works on a disk from outside of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prepare {
    /// The appliance may be a fork.
    pub resume: Resume,
    /// How the network is reached, if it is to be.
    pub network: Option<Network>,
}

/// How the network is reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// What stands in `/etc/resolv.conf` while layers are applied.
    pub resolv_conf: String,
}

/// The card of an appliance, as QEMU's own NAT gives addresses by default
/// (QEMU's documentation, "Using the user mode network stack").
pub mod card {
    /// The machine's own address.
    pub const ADDRESS: [u8; 4] = [10, 0, 2, 15];
    /// Its network.
    pub const NETMASK: [u8; 4] = [255, 255, 255, 0];
    /// The way out.
    pub const GATEWAY: [u8; 4] = [10, 0, 2, 2];
    /// Who knows names.
    pub const RESOLVER: &str = "10.0.2.3";
}

/// What programs of a layer may do as root while its machine is switched off:
/// change owners and modes, become other users, use chroots. The same in an
/// appliance and in a container; `docs/explanation/isolation.md` lists them.
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

/// The word on the kernel's command line that makes an agent with the process
/// id 1 serve as an appliance.
pub const APPLIANCE: &str = "vimg.appliance";

/// The word that has a machine note what it opens of its disk while it boots.
pub const WATCHED: &str = "vimg.watched";

/// The word that has all programs lie at the same addresses. An emulator knows
/// what it has translated by its address: it need not translate a library
/// again for each program that starts.
pub const FIXED: &str = "vimg.fixed";

/// Something on a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listed {
    /// Where. What is no UTF-8, and `\\`, is written `\\xNN`.
    pub path: String,
    /// What.
    pub kind: Kind,
    /// Permission bits.
    pub mode: u32,
    /// Numbers of user and group.
    pub owner: (u32, u32),
    /// Of a file, in bytes.
    pub size: u64,
    /// Extended attributes, their values in hexadecimal.
    pub attributes: BTreeMap<String, String>,
    /// The number of its inode and when that was last changed: seconds and
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
    /// A symbolic link, and what it points to.
    Link(String),
    /// Something else.
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
        /// Differs from boot to boot.
        boot_id: String,
    },
    /// The machine has booted. Units that failed to start are named.
    Ready {
        /// Names of units.
        failed_units: Vec<String>,
    },
    /// Send these blobs, in this order, as frames of data.
    Fetch {
        /// What is wanted.
        digests: Vec<Digest>,
    },
    /// Send this secret as frames of data with an empty one at its end. It is
    /// asked for anew each time, and known by its name alone.
    FetchSecret {
        /// Its name.
        name: String,
    },
    /// Enable or disable the network. Answered by
    /// [`ToAgent::Network`] once that holds.
    Network {
        /// `true` to enable it.
        open: bool,
    },
    /// A step begins.
    Started {
        /// Its index.
        step: usize,
    },
    /// What a step prints.
    Output {
        /// Its index.
        step: usize,
        /// Bytes that are no UTF-8 are replaced.
        text: String,
    },
    /// A step is true.
    Finished {
        /// Its index.
        step: usize,
        /// Whether anything had to be changed.
        changed: bool,
    },
    /// All steps are true.
    Done {
        /// The kernel or the initrd is another one than when the agent started
        /// or last said so.
        boot_changed: bool,
    },
    /// The next step is to switch the machine off and boot it again, which is
    /// the host's part; what follows is to be asked for anew.
    RebootDue {
        /// The step's index.
        step: usize,
        /// As in `Done`.
        boot_changed: bool,
    },
    /// The digests of files that were asked for; none of what can't be read.
    Digests {
        /// In the order of the question.
        digests: Vec<Option<Digest>>,
    },
    /// The machine switches itself off.
    GoingOff,
    /// A step could not be made true; later ones were not tried.
    Failed {
        /// Its index.
        step: usize,
        /// What happened, in a sentence.
        message: String,
        /// The exit code of the program that failed.
        exit: Option<i32>,
        /// The layer that is in the way.
        layer: Option<String>,
    },
    /// All that was asked is so.
    Passed,
    /// A program wrote what the next frame of data holds.
    Wrote(Stream),
    /// A program ended, with a code or by a signal.
    Exited {
        /// Its exit code.
        code: Option<i32>,
        /// The signal that killed it.
        signal: Option<i32>,
    },
    /// The disk is mounted and layers may come.
    Prepared,
    /// The clock and the randomness are the machine's own.
    Resumed,
    /// The machine is as if it had booted with the changed files.
    Retargeted,
    /// Nothing was changed.
    Rehearsed,
    /// All is on disk, and the boot is over.
    SnapshotReady,
    /// All is on disk and writes are held.
    Frozen,
    /// Writes go on.
    Thawed,
    /// The machine is sealed.
    Sealed,
    /// The answer to a question failed.
    Refused {
        /// Why.
        message: String,
    },
    /// The agent is alive. Sent every few seconds, unless the kernel does not
    /// let it go on.
    Heartbeat,
}

/// How often an agent that does not say anything else says `Heartbeat`, in seconds.
pub const HEARTBEAT_EVERY: u64 = 5;

/// A frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// A message as JSON.
    Message(Vec<u8>),
    /// A piece of a file.
    Data(Vec<u8>),
}

const MESSAGE: u8 = 0;
const DATA: u8 = 1;

/// Why a frame can't be understood.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Malformed(pub String);

impl From<Malformed> for io::Error {
    fn from(malformed: Malformed) -> Self {
        io::Error::new(io::ErrorKind::InvalidData, malformed.0)
    }
}

impl Frame {
    /// The length from a frame's first four bytes, checked.
    pub fn length(header: [u8; 4]) -> Result<usize, Malformed> {
        let length = u32::from_le_bytes(header) as usize;
        if length == 0 || length > MAX_FRAME {
            return Err(Malformed(format!("a frame of {length} bytes")));
        }
        Ok(length)
    }

    /// The frame from its bytes after the length.
    pub fn from_body(mut body: Vec<u8>) -> Result<Self, Malformed> {
        match body.first() {
            Some(&MESSAGE) => Ok(Self::Message(body.split_off(1))),
            Some(&DATA) => Ok(Self::Data(body.split_off(1))),
            Some(kind) => Err(Malformed(format!("a frame of the unknown kind {kind}"))),
            None => Err(Malformed("an empty frame".into())),
        }
    }

    /// A message's meaning.
    pub fn message<M: DeserializeOwned>(&self) -> Result<M, Malformed> {
        match self {
            Self::Message(bytes) => serde_json::from_slice(bytes)
                .map_err(|e| Malformed(format!("a message that does not parse: {e}"))),
            Self::Data(_) => Err(Malformed("data where a message was due".into())),
        }
    }
}

/// The bytes of a message's frame.
pub fn encode_message<M: Serialize>(message: &M) -> io::Result<Vec<u8>> {
    encode(MESSAGE, &serde_json::to_vec(message)?)
}

/// The bytes of a frame of data.
pub fn encode_data(bytes: &[u8]) -> io::Result<Vec<u8>> {
    encode(DATA, bytes)
}

fn encode(kind: u8, payload: &[u8]) -> io::Result<Vec<u8>> {
    let length = payload.len() + 1;
    if length > MAX_FRAME {
        return Err(Malformed(format!("a frame of {length} bytes")).into());
    }
    let mut out = Vec::with_capacity(length + 4);
    out.extend((length as u32).to_le_bytes());
    out.push(kind);
    out.extend(payload);
    Ok(out)
}

/// Reads a frame; `None` if the stream ends before one begins.
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

//! The protocol between host and agent.
//!
//! After the handshake, both sides send frames: a little-endian `u32` with the length of
//! the rest, a byte with the kind, and the payload. Both sides treat input as hostile:
//! they check a length before they allocate memory, and invalid input ends the session.

mod blob;
mod change;
mod frame;
mod order;
mod message;
mod tree;

pub use blob::{Blob, CHUNK, Digest};
pub use change::{Change, Inode, MAX_RETARGETED, Time};
pub use frame::{Frame, MAX_FRAME, Malformed, SYNC, encode_data, encode_message, read_frame, write_message};
pub use message::{
    Apply, Exec, FromAgent, Kind, Listed, Network, Prepare, Resume, Sealed, Size, Stream, Terminal, ToAgent,
};
pub use order::{Order, Primitive, Run, Script};
pub use tree::{Entry, Manifest, Node};
pub use vimg_model::{Around, Owner, Probe, ServiceState, User, When, unit};

/// The version of the protocol. Host and agent must have the same version.
pub const PROTOCOL: u32 = 15;

/// The behaviour version of the agent. It enters the keys of layers, checks and sealed
/// disks, so raising it rebuilds all but the bases. Raise it when the same layer would
/// now give another machine. `agent/behaviour.lock` has the digest of the sources for
/// which this was last decided.
pub const BEHAVIOUR: u32 = 8;

/// The path of the agent in a machine. Its first argument is a command; see `hooks`.
pub const AGENT: &str = "/usr/lib/vimg/agent";

/// The path of the agent in vimg's initramfs, and of the kernel's first process
/// (`rdinit=`). An initramfs of a distribution has its own `/init`.
pub const EARLY: &str = "/vimg-init";

/// The name of the virtio-serial port.
pub const PORT: &str = "vimg.agent";

/// The interval of `Heartbeat` messages, in seconds.
pub const HEARTBEAT_EVERY: u64 = 5;

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

/// The word of a machine that only shows that machines work here, and switches itself off.
pub const PROBE: &str = "vimg.probe";

/// The word that makes a machine record which files its boot opens.
pub const WATCHED: &str = "vimg.watched";

/// The word of a machine whose console a person watches: root is logged in there.
pub const CONSOLE: &str = "vimg.console";

/// The word that turns address randomisation off. An emulator caches translated code by
/// its address: it then translates a library only once for all programs.
pub const FIXED: &str = "vimg.fixed";

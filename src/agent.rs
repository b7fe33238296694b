//! The agent's program, and the initramfs that starts machines with it: the
//! agent as the first process, and a console. Format: the kernel's
//! `Documentation/driver-api/early-userspace/buffer-format.rst`.

use vimg_agent::protocol::{EARLY, PROBE};

/// The agent: a static program for x86-64.
pub static PROGRAM: &[u8] = include_bytes!(env!("VIMG_AGENT"));

/// The kernel argument that makes the agent the first process.
pub const RDINIT: &str = "rdinit=/vimg-init";

/// Returns the kernel's command line of the machine that shows whether machines work.
pub fn probe_line() -> String {
    format!("console=ttyS0 quiet panic=-1 {RDINIT} {PROBE}")
}

/// Makes an initramfs of the agent and of other archives: modules for it, or
/// the initrd of a distribution. The kernel accepts several archives, one after
/// the other.
pub fn initramfs(more: &[u8]) -> Vec<u8> {
    let mut initramfs = with_init(PROGRAM);
    initramfs.extend(more);
    initramfs
}

/// Makes a newc archive with the agent as its only program.
fn with_init(init: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(init.len() + 1024);
    entry(&mut out, "dev", 0o40755, (0, 0), &[]);
    // Major 5, minor 1 is /dev/console.
    entry(&mut out, "dev/console", 0o20600, (5, 1), &[]);
    entry(&mut out, "proc", 0o40755, (0, 0), &[]);
    entry(&mut out, "sys", 0o40755, (0, 0), &[]);
    entry(&mut out, "root", 0o40755, (0, 0), &[]);
    entry(&mut out, &EARLY[1..], 0o100_755, (0, 0), init);
    entry(&mut out, "TRAILER!!!", 0, (0, 0), &[]);
    out
}

fn entry(out: &mut Vec<u8>, name: &str, mode: u32, device: (u32, u32), data: &[u8]) {
    let fields = [
        0, // inode; the kernel only needs it for hard links
        mode,
        0,
        0,
        1,
        0,
        data.len() as u32,
        0,
        0,
        device.0,
        device.1,
        name.len() as u32 + 1,
        0,
    ];
    out.extend(b"070701");
    for field in fields {
        out.extend(format!("{field:08X}").as_bytes());
    }
    out.extend(name.as_bytes());
    out.push(0);
    pad(out);
    out.extend(data);
    pad(out);
}

fn pad(out: &mut Vec<u8>) {
    out.resize(out.len().next_multiple_of(4), 0);
}

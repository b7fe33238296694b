//! QEMU's command line, a function for each group of arguments.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use vimg_agent::protocol::{APPLIANCE, FIXED, PORT, WATCHED};
use vimg_lang::model::Machine;

use super::programs::Accel;
use crate::host::keeper::CONSOLE;
use crate::provider::OFFLINE_MEMORY;

/// The name of the block node that takes the writes first.
pub(super) const TOP: &str = "top0";

/// Kernel arguments of a direct boot. `cryptomgr.notests` and `noreplace-smp`
/// save 0.3-0.6 s each under TCG (measured, kernel 6.1); `panic=-1` with
/// `-no-reboot` ends a panicked machine at once. Not waiting for grace periods
/// takes more than half of the time that a snapshot took.
const CMDLINE: &str = "root=/dev/vda3 rootfstype=ext4 ro console=ttyS0 quiet panic=-1 \
                       cryptomgr.notests noreplace-smp net.ifnames=0 rcupdate.rcu_expedited=1";

/// An emulated processor's time stamps are the host's, and the same on all
/// processors. A kernel that is not told so doubts them, and asks a device for
/// the time, which takes QEMU's big lock: a third more for each look at the
/// clock.
const TSC: &str = "tsc=reliable";

/// Kernel arguments of an appliance, which lives for seconds and has one user.
/// Not waiting for grace periods halves the time of a snapshot.
const APPLIANCE_CMDLINE: &str = "console=ttyS0 quiet panic=-1 cryptomgr.notests noreplace-smp \
                                 mitigations=off init_on_alloc=0 rcupdate.rcu_expedited=1 audit=0";

/// Everything that does not differ between machines: nothing by default,
/// nothing from configuration files, no way to start programs.
pub(super) fn base() -> Vec<String> {
    words(
        "-nodefaults -no-user-config -display none -no-reboot \
         -sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny \
         -action panic=shutdown -rtc base=utc,clock=host",
    )
}

/// Processor, memory and how they are run. `ram` is a file that the memory is
/// in, and whether it is written to, or only copied from where it is changed.
pub(super) fn machine(accel: Accel, machine: &Machine, ram: Option<(&Path, bool)>) -> Vec<String> {
    let cpu = match accel {
        Accel::Kvm => "host",
        Accel::Tcg => "max",
    };
    computer(accel, cpu, machine.cpus, machine.memory, ram)
}

/// An appliance: its memory is a file, and a fork of it writes to a copy of
/// its own. Emulated, it has one processor, and lacks what costs more than it
/// gives: vectors that are emulated element by element, and guards that end a
/// translated block at each system call: a tenth of a small layer, measured.
pub(super) fn appliance(accel: Accel, memory: &Path, fork: bool) -> Vec<String> {
    let (cpu, cpus) = match accel {
        Accel::Kvm => ("host", 2),
        Accel::Tcg => ("max,avx=off,avx2=off,smap=off,smep=off", 1),
    };
    computer(accel, cpu, cpus, OFFLINE_MEMORY, Some((memory, !fork)))
}

fn computer(accel: Accel, cpu: &str, cpus: u32, memory: u64, ram: Option<(&Path, bool)>) -> Vec<String> {
    let mut args = Vec::new();
    let mut backend = "";
    if let Some((path, shared)) = ram {
        let ram = json!({
            "qom-type": "memory-backend-file",
            "id": "ram0",
            "size": memory,
            "mem-path": path,
            "share": shared,
        });
        args.extend(["-object".into(), ram.to_string()]);
        backend = ",memory-backend=ram0";
    }
    let accel = match accel {
        Accel::Kvm => "kvm",
        Accel::Tcg => "tcg,thread=multi",
    };
    let memory = memory >> 20;
    args.extend(words(&format!(
        "-machine q35,dump-guest-core=off{backend} -accel {accel} -cpu {cpu} -smp {cpus} -m {memory}M"
    )));
    args
}

/// What an appliance's kernel starts from, and what its disk is before there
/// is one.
pub(super) fn appliance_boot(accel: Accel, kernel: &Path, initrd: &Path) -> Vec<String> {
    let mut args = vec!["-blockdev".into(), json!({ "driver": "null-co", "node-name": TOP }).to_string()];
    args.extend(drive());
    args.extend(direct(accel, kernel, initrd));
    args
}

/// What an appliance boots.
pub(super) fn direct(accel: Accel, kernel: &Path, initrd: &Path) -> Vec<String> {
    linux(accel, kernel, initrd, &format!("{APPLIANCE_CMDLINE} {APPLIANCE}"))
}

/// A kernel that is started without a boot loader. Where it lies in memory
/// changes nothing for who emulates it, but the time that it takes to move
/// there; under KVM a server may run for months.
fn linux(accel: Accel, kernel: &Path, initrd: &Path, cmdline: &str) -> Vec<String> {
    let (kernel, initrd) = (kernel.display().to_string(), initrd.display().to_string());
    let cmdline = match accel {
        Accel::Kvm => cmdline.to_owned(),
        Accel::Tcg => format!("{cmdline} nokaslr {TSC} {FIXED}"),
    };
    ["-kernel", &kernel, "-initrd", &initrd, "-append", &cmdline].map(str::to_owned).to_vec()
}

/// Sockets in the working directory: short names, whatever the store's path.
pub(super) fn channels() -> Vec<String> {
    let mut args = words(
        "-chardev socket,id=qmp,path=qmp,server=on,wait=off -mon chardev=qmp,mode=control \
         -chardev socket,id=console,path=console,server=on,wait=off -serial chardev:console \
         -device virtio-serial-pci \
         -chardev socket,id=agent,path=agent,server=on,wait=off",
    );
    args.extend(["-device".into(), format!("virtserialport,chardev=agent,id=agent,name={PORT}")]);
    args
}

/// The same for a machine that goes on: what its console says goes to who keeps
/// it.
pub(super) fn with_log(args: &mut [String]) {
    for arg in args.iter_mut().filter(|arg| arg.starts_with("socket,id=console,")) {
        arg.push_str(&format!(",logfile={CONSOLE},logappend=on"));
    }
}

/// Randomness, and a voice for a panicking kernel.
pub(super) fn devices() -> Vec<String> {
    words(
        "-object rng-random,id=rng0,filename=/dev/urandom -device virtio-rng-pci,rng=rng0 \
         -device vmgenid,guid=auto -device pvpanic-pci",
    )
}

/// A network behind the host's, by QEMU's own NAT. Nobody there has to learn
/// that a machine goes on elsewhere: a fork would announce it five times, and
/// all services of its network would hear of it. (A migration's parameter
/// `announce-cutoff` of 0 does the same, and QEMU 7.2 crashes when such a
/// device is reset.)
/// One that is cut off answers for addresses and leads nowhere; a fork may be
/// of a machine that was not.
pub(super) fn network(cut_off: bool) -> Vec<String> {
    let restrict = if cut_off { ",restrict=on" } else { "" };
    words(&format!(
        "-netdev user,id=net0{restrict} -device virtio-net-pci,netdev=net0,romfile=,guest_announce=off"
    ))
}

/// The graph of disks: read-only parents, and the one that takes the writes.
pub(super) fn nodes(chain: &[PathBuf], overlay: &Path, lasting: bool) -> Vec<Value> {
    let mut nodes = Vec::new();
    let mut below = Value::Null;
    for (n, disk) in chain.iter().enumerate() {
        let node = format!("base{n}");
        nodes.push(json!({
            "driver": "qcow2",
            "node-name": node,
            "read-only": true,
            "backing": below,
            "file": { "driver": "file", "filename": disk, "read-only": true },
        }));
        below = Value::String(node);
    }
    nodes.push(writable(TOP, overlay, &below, lasting));
    nodes
}

/// The graph of disks and the drive on top of it.
pub(super) fn disks(nodes: &[Value]) -> Vec<String> {
    let mut args: Vec<String> = nodes.iter().flat_map(|n| ["-blockdev".into(), n.to_string()]).collect();
    args.extend(drive());
    args
}

/// The drive that takes the writes.
fn drive() -> Vec<String> {
    words(&format!("-device virtio-blk-pci,drive={TOP},id=disk0,discard=on,werror=stop,rerror=stop"))
}

/// A disk that takes writes. They are flushed only if it is to outlive this
/// program: while a layer is made they are not; the store syncs the file once,
/// when the layer is done. The file node stands inside, so that it becomes
/// read-only together with the disk.
pub(super) fn writable(node: &str, file: &Path, backing: &Value, lasting: bool) -> Value {
    json!({
        "driver": "qcow2",
        "node-name": node,
        "backing": backing,
        "discard": "unmap",
        "detect-zeroes": "unmap",
        "cache": { "no-flush": !lasting, "direct": false },
        "file": {
            "driver": "file",
            "filename": file,
            "discard": "unmap",
            "cache": { "no-flush": !lasting, "direct": false },
        },
    })
}

/// A direct boot, of a machine that notes what it opens of its disk if that
/// is of use later.
pub(super) fn boot(accel: Accel, boot: Option<&(PathBuf, PathBuf)>, watched: bool) -> Vec<String> {
    let cmdline = if watched { format!("{CMDLINE} {WATCHED}") } else { CMDLINE.to_owned() };
    boot.map_or_else(Vec::new, |(kernel, initrd)| linux(accel, kernel, initrd, &cmdline))
}

pub(super) fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_emulated_machine_is_told_what_holds_of_emulators() {
        let files = (PathBuf::from("kernel"), PathBuf::from("initrd"));
        for (accel, told) in [(Accel::Tcg, true), (Accel::Kvm, false)] {
            let both = [boot(accel, Some(&files), true), appliance_boot(accel, &files.0, &files.1)];
            for args in both {
                let cmdline = args.last().unwrap();
                assert_eq!(cmdline.contains(FIXED), told, "{cmdline}");
                assert_eq!(cmdline.contains(TSC), told, "{cmdline}");
            }
        }
    }

    #[test]
    fn parents_are_read_only_and_explicit() {
        let blockdevs = nodes(&["/a".into(), "/b,c".into()], Path::new("/top"), false);
        assert_eq!(blockdevs.len(), 3);
        assert_eq!(blockdevs[0]["backing"], Value::Null);
        assert_eq!(blockdevs[1]["backing"], "base0");
        assert_eq!(blockdevs[1]["file"]["filename"], "/b,c");
        assert_eq!(blockdevs[1]["read-only"], true);
        assert_eq!(blockdevs[2]["backing"], "base1");
        assert_eq!(blockdevs[2]["node-name"], TOP);
    }
}

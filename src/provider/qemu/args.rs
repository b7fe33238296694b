//! QEMU's command line, one function for each group of arguments.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use vimg_agent::protocol::{APPLIANCE, CONSOLE, FIXED, PORT, WATCHED};
use vimg_lang::model::Machine;

use super::programs::Accel;
use crate::agent::RDINIT;
use crate::host::keeper;
use crate::provider::OFFLINE_MEMORY;

/// The name of the first block node that takes the writes.
pub(super) const TOP: &str = "top0";

/// Units that must not change the disk, or take the package manager's lock,
/// behind a layer's back, and those that would ask the network for the time: the
/// machine's clock is the host's. They are masked on this kernel command line
/// only. Nothing of that is on the disk, so a machine that boots by itself has
/// them as its distribution does. The agent knows them by this line.
const HELD_BACK: [&str; 9] = [
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "fstrim.timer",
    "systemd-repart.service",
    "systemd-growfs-root.service",
    "systemd-timesyncd.service",
    // The agent of the initramfs speaks, not the one that is installed.
    "vimg-agent.service",
];

/// Kernel arguments of a direct boot. `cryptomgr.notests` and `noreplace-smp`
/// save 0.3-0.6 s each under TCG (measured, kernel 6.1). `panic=-1` with
/// `-no-reboot` ends a panicked machine at once. Expedited RCU grace periods
/// save more than half of the time for the switch to a new disk after a layer.
/// cloud-init has its own switch.
const CMDLINE: &str = "rootfstype=ext4 ro console=ttyS0 quiet panic=-1 \
                       cryptomgr.notests noreplace-smp net.ifnames=0 rcupdate.rcu_expedited=1 \
                       cloud-init=disabled";

/// Parameters that a recipe can't take from vimg: it reads the last console,
/// and notices a panic by the end of the machine.
const KEPT: &str = "console=ttyS0 panic=-1";

/// Tells the kernel that the time stamp counter is reliable: under emulation it
/// is the host's, and the same on all processors. Otherwise the kernel reads
/// the time from a device, which takes QEMU's big lock, and each read of the
/// clock takes a third longer.
const TSC: &str = "tsc=reliable";

/// Kernel arguments of an appliance, which lives for seconds and has one user.
/// Expedited RCU grace periods halve the time for the switch to a new disk
/// after a layer.
const APPLIANCE_CMDLINE: &str = "console=ttyS0 quiet panic=-1 cryptomgr.notests noreplace-smp \
                                 mitigations=off init_on_alloc=0 rcupdate.rcu_expedited=1 audit=0";

/// Arguments of all machines: no default devices, no configuration files, no
/// way to start programs.
pub(super) fn base() -> Vec<String> {
    words(
        "-nodefaults -no-user-config -display none -no-reboot \
         -sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny \
         -action panic=shutdown -rtc base=utc,clock=host",
    )
}

/// Processor, memory and accelerator. `ram` is the file of the memory, and
/// whether it is shared: `false` maps it copy-on-write.
pub(super) fn machine(accel: Accel, machine: &Machine, ram: Option<(&Path, bool)>) -> Vec<String> {
    let cpu = match accel {
        Accel::Kvm => "host",
        Accel::Tcg => "max",
    };
    computer(accel, cpu, machine.cpus, machine.memory, ram)
}

/// An appliance. Its memory is a file, and a fork maps it copy-on-write. An
/// emulated one has one processor, without features that cost more than they
/// give: AVX is emulated element by element, and SMAP and SMEP end a translated
/// block at each system call. This saves a tenth of the time of a small layer
/// (measured).
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

/// The boot of an appliance whose snapshot is made: it has no disk yet.
pub(super) fn appliance_boot(accel: Accel, kernel: &Path, initrd: &Path) -> Vec<String> {
    let mut args = vec!["-blockdev".into(), json!({ "driver": "null-co", "node-name": TOP }).to_string()];
    args.extend(drive());
    args.extend(direct(accel, kernel, initrd));
    args
}

/// Kernel and initrd of an appliance.
pub(super) fn direct(accel: Accel, kernel: &Path, initrd: &Path) -> Vec<String> {
    linux(accel, kernel, initrd, &format!("{APPLIANCE_CMDLINE} {APPLIANCE}"))
}

/// A direct boot of a kernel. Under emulation the kernel's address is fixed,
/// because the address has no security value there and moving the kernel takes
/// time. Under KVM it is random: a server may run for months.
fn linux(accel: Accel, kernel: &Path, initrd: &Path, cmdline: &str) -> Vec<String> {
    let (kernel, initrd) = (kernel.display().to_string(), initrd.display().to_string());
    let cmdline = match accel {
        Accel::Kvm => format!("{cmdline} {RDINIT}"),
        Accel::Tcg => format!("{cmdline} {RDINIT} nokaslr {TSC} {FIXED}"),
    };
    ["-kernel", &kernel, "-initrd", &initrd, "-append", &cmdline].map(str::to_owned).to_vec()
}

/// Sockets in the working directory, so that their paths are short.
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

/// Copies the console of a server to its companion process.
pub(super) fn with_log(args: &mut [String]) {
    for arg in args.iter_mut().filter(|arg| arg.starts_with("socket,id=console,")) {
        arg.push_str(&format!(",logfile={},logappend=on", keeper::CONSOLE));
    }
}

/// Devices for randomness and for reporting a kernel panic.
pub(super) fn devices() -> Vec<String> {
    words(
        "-object rng-random,id=rng0,filename=/dev/urandom -device virtio-rng-pci,rng=rng0 \
         -device vmgenid,guid=auto -device pvpanic-pci",
    )
}

/// A network card behind QEMU's own NAT. A fork does not announce itself: it is
/// alone on its network, would announce itself five times, and all its network
/// services would react. (The migration parameter `announce-cutoff=0` does the
/// same, but QEMU 7.2 crashes when such a device is reset.) A card that is
/// `cut_off` gets an address, but no packet leaves it. A fork may be of a
/// machine that was not cut off.
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

/// A disk that takes writes. They are flushed only on a server: while a layer
/// is built they are not, and the store syncs the file once at the end. The
/// file node is defined inside, so that it becomes read-only together with the
/// disk.
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

/// What a direct boot is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    Work,
    /// It becomes a snapshot, and records what it opens on its disk.
    Snapshot,
    /// A person watches the console: kernel and init show what they do, as on a
    /// disk that ships, and root is logged in.
    Console,
}

/// The variable parts of the kernel's command line of a direct boot.
pub(super) struct Line<'a> {
    /// The device of the root filesystem.
    pub(super) root: &'a str,
    /// The words that the recipe declares.
    pub(super) parameters: &'a str,
    pub(super) purpose: Purpose,
}

/// A direct boot. Where the recipe and vimg set the same parameter, the recipe's
/// comes later and is in effect, except for [`KEPT`].
pub(super) fn boot(accel: Accel, kernel: &Path, initrd: &Path, line: Line<'_>) -> Vec<String> {
    let Line { root, parameters, purpose } = line;
    let own = match purpose {
        Purpose::Work => CMDLINE.to_owned(),
        Purpose::Snapshot => format!("{CMDLINE} {WATCHED}"),
        Purpose::Console => format!("{} {CONSOLE}", CMDLINE.replacen("quiet ", "", 1)),
    };
    let mut cmdline = format!("root={root} {own}");
    for unit in HELD_BACK {
        cmdline.push_str(&format!(" systemd.mask={unit}"));
    }
    if !parameters.is_empty() {
        cmdline.push_str(&format!(" {parameters} {KEPT}"));
    }
    linux(accel, kernel, initrd, &cmdline)
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
            let line = Line { root: "/dev/vda3", parameters: "", purpose: Purpose::Snapshot };
            let both = [boot(accel, &files.0, &files.1, line), appliance_boot(accel, &files.0, &files.1)];
            for args in both {
                let cmdline = args.last().unwrap();
                assert_eq!(cmdline.contains(FIXED), told, "{cmdline}");
                assert_eq!(cmdline.contains(TSC), told, "{cmdline}");
            }
        }
    }

    #[test]
    fn only_a_console_that_is_watched_shows_the_boot() {
        let shows = |purpose| {
            let line = Line { root: "/dev/vda3", parameters: "", purpose };
            let cmdline = boot(Accel::Kvm, Path::new("k"), Path::new("i"), line).pop();
            cmdline.is_some_and(|line| !line.contains("quiet") && line.contains(CONSOLE))
        };
        assert_eq!([Purpose::Work, Purpose::Snapshot, Purpose::Console].map(shows), [false, false, true]);
    }

    #[test]
    fn words_of_the_recipe_come_after_those_of_vimg_but_for_the_console() {
        let files = (PathBuf::from("kernel"), PathBuf::from("initrd"));
        let line = |parameters| {
            let line = Line { root: "/dev/vda3", parameters, purpose: Purpose::Snapshot };
            boot(Accel::Kvm, &files.0, &files.1, line).pop().unwrap()
        };
        let cmdline = line("net.ifnames=1 console=tty1 panic=10");
        let last = |name: &str| cmdline.split(' ').rfind(|word| word.starts_with(name)).unwrap();
        assert_eq!(last("net.ifnames="), "net.ifnames=1");
        assert_eq!((last("console="), last("panic=")), ("console=ttyS0", "panic=-1"));
        assert!(cmdline.contains(WATCHED));
        assert!(!line("").contains("  ") && !line("").contains(KEPT));
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

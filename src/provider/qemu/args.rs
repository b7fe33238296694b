//! QEMU's command line, a function for each group of arguments.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use vimg_agent::protocol::PORT;
use vimg_lang::model::Machine;

use super::Accel;

/// The name of the block node that takes the writes first.
pub(super) const TOP: &str = "top0";

/// Kernel arguments of a direct boot. `cryptomgr.notests` and `noreplace-smp`
/// save 0.3-0.6 s each under TCG (measured, kernel 6.1); `panic=-1` with
/// `-no-reboot` ends a panicked machine at once.
const CMDLINE: &str = "root=/dev/vda3 rootfstype=ext4 ro console=ttyS0 quiet panic=-1 \
                       cryptomgr.notests noreplace-smp nokaslr net.ifnames=0";

/// Everything that does not differ between machines: nothing by default,
/// nothing from configuration files, no way to start programs.
pub(super) fn base() -> Vec<String> {
    words(
        "-nodefaults -no-user-config -display none -no-reboot \
         -sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny \
         -action panic=shutdown -rtc base=utc,clock=host",
    )
}

/// Processor, memory and how they are run.
pub(super) fn machine(accel: Accel, machine: &Machine) -> Vec<String> {
    let (accel, cpu) = match accel {
        Accel::Kvm => ("kvm", "host"),
        Accel::Tcg => ("tcg,thread=multi", "max"),
    };
    let memory = machine.memory >> 20;
    words(&format!("-machine q35 -accel {accel} -cpu {cpu} -smp {} -m {memory}M", machine.cpus))
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

/// Randomness, and a voice for a panicking kernel.
pub(super) fn devices() -> Vec<String> {
    words(
        "-object rng-random,id=rng0,filename=/dev/urandom -device virtio-rng-pci,rng=rng0 \
         -device vmgenid,guid=auto -device pvpanic-pci",
    )
}

/// A network behind the host's, by QEMU's own NAT.
pub(super) fn network() -> Vec<String> {
    words("-netdev user,id=net0 -device virtio-net-pci,netdev=net0,romfile=")
}

/// The graph of disks: read-only parents, and the one that takes the writes.
pub(super) fn disks(chain: &[PathBuf], overlay: &Path) -> Vec<String> {
    let mut args = Vec::new();
    let mut below = Value::Null;
    for (n, disk) in chain.iter().enumerate() {
        let node = format!("base{n}");
        let options = json!({
            "driver": "qcow2",
            "node-name": node,
            "read-only": true,
            "backing": below,
            "file": { "driver": "file", "filename": disk, "read-only": true },
        });
        args.extend(["-blockdev".into(), options.to_string()]);
        below = Value::String(node);
    }
    args.extend(["-blockdev".into(), writable(TOP, overlay, &below).to_string()]);
    args.extend(words(&format!(
        "-device virtio-blk-pci,drive={TOP},id=disk0,discard=on,werror=stop,rerror=stop"
    )));
    args
}

/// A disk that takes writes. They are not flushed while a layer is made; the
/// store syncs the file once, when the layer is done. The file node stands
/// inside, so that it becomes read-only together with the disk.
pub(super) fn writable(node: &str, file: &Path, backing: &Value) -> Value {
    json!({
        "driver": "qcow2",
        "node-name": node,
        "backing": backing,
        "discard": "unmap",
        "detect-zeroes": "unmap",
        "cache": { "no-flush": true, "direct": false },
        "file": {
            "driver": "file",
            "filename": file,
            "discard": "unmap",
            "cache": { "no-flush": true, "direct": false },
        },
    })
}

/// A direct boot.
pub(super) fn boot(boot: Option<&(PathBuf, PathBuf)>) -> Vec<String> {
    let Some((kernel, initrd)) = boot else { return Vec::new() };
    vec![
        "-kernel".into(),
        kernel.display().to_string(),
        "-initrd".into(),
        initrd.display().to_string(),
        "-append".into(),
        words(CMDLINE).join(" "),
    ]
}

pub(super) fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parents_are_read_only_and_explicit() {
        let args = disks(&["/a".into(), "/b,c".into()], Path::new("/top"));
        let blockdevs: Vec<Value> =
            args.iter().filter(|a| a.starts_with('{')).map(|a| serde_json::from_str(a).unwrap()).collect();
        assert_eq!(blockdevs.len(), 3);
        assert_eq!(blockdevs[0]["backing"], Value::Null);
        assert_eq!(blockdevs[1]["backing"], "base0");
        assert_eq!(blockdevs[1]["file"]["filename"], "/b,c");
        assert_eq!(blockdevs[1]["read-only"], true);
        assert_eq!(blockdevs[2]["backing"], "base1");
        assert_eq!(blockdevs[2]["node-name"], TOP);
    }
}

//! The first process of a machine. With modules beside it, it loads them,
//! mounts the root filesystem and hands over to its init: a direct boot that
//! spares the distribution's own initrd (3 s and more under TCG). Told so by
//! the kernel's command line it stays, and serves the host as an appliance.
//! Without modules it says hello and switches off: the probe for an
//! accelerator that works.

use std::convert::Infallible;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, mount};

use crate::protocol::{APPLIANCE, FIXED, WATCHED};
use crate::{modules, opened, system};

/// How long the disk may take to appear.
const DISK_WAIT: Duration = Duration::from_secs(30);

/// Does what the initramfs is for. Returns only if that fails.
pub fn main() -> io::Result<()> {
    let result = if modules::any() { start() } else { probe() };
    if let Err(error) = &result {
        say(&format!("vimg-init: {error}\n"));
    }
    result
}

fn say(text: &str) {
    if let Ok(mut console) = OpenOptions::new().write(true).open("/dev/console") {
        let _ = console.write_all(text.as_bytes());
    }
}

fn probe() -> io::Result<()> {
    say("vimg-probe-hello\n");
    rustix::system::reboot(rustix::system::RebootCommand::PowerOff)?;
    Ok(())
}

fn start() -> io::Result<()> {
    mount("devtmpfs", "/dev", "devtmpfs", MountFlags::empty(), None)?;
    mount("proc", "/proc", "proc", MountFlags::empty(), None)?;
    let cmdline = fs::read_to_string("/proc/cmdline")?;
    if cmdline.split_whitespace().any(|word| word == FIXED) {
        system::fix_addresses();
    }
    if cmdline.split_whitespace().any(|word| word == APPLIANCE) {
        mount("sysfs", "/sys", "sysfs", MountFlags::empty(), None)?;
        modules::load("console")?;
        // Whether a fork of this will want it is not known yet, but each would
        // take its time to load it.
        modules::load("network")?;
        // Who is root in a namespace of users could mount a /proc of its own,
        // and with it reach the kernel and the disk.
        let _ = fs::write("/proc/sys/user/max_user_namespaces", "0");
        return attend();
    }
    boot(&cmdline).map(|never| match never {})
}

/// Runs the agent and buries whoever is left without a parent.
fn attend() -> io::Result<()> {
    let agent = std::process::Command::new("/init").arg("appliance").spawn()?;
    let agent = rustix::process::Pid::from_child(&agent);
    loop {
        match rustix::process::wait(rustix::process::WaitOptions::empty()) {
            Ok(Some((pid, _))) if pid == agent => return Err(io::Error::other("the agent ended")),
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn boot(cmdline: &str) -> io::Result<Infallible> {
    let root = cmdline
        .split_whitespace()
        .find_map(|word| word.strip_prefix("root="))
        .ok_or_else(|| io::Error::other("the command line names no root"))?
        .to_owned();
    modules::load("disk")?;
    let start = Instant::now();
    while !Path::new(&root).exists() {
        if start.elapsed() > DISK_WAIT {
            return Err(io::Error::other(format!("{root} does not appear")));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    mount(root.as_str(), "/root", "ext4", MountFlags::RDONLY, None)?;
    if cmdline.split_whitespace().any(|word| word == WATCHED)
        && let Err(error) = opened::watch("/root")
    {
        // A kernel may lack it; the machine can do without.
        say(&format!("vimg-init: what is opened is not noted: {error}\n"));
    }
    rustix::mount::mount_move("/dev", "/root/dev")?;
    rustix::mount::mount_move("/proc", "/root/proc")?;
    system::switch_root("/root")?;
    Err(std::process::Command::new("/sbin/init").exec())
}

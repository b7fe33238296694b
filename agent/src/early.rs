//! The first process of a machine. It loads the modules of the initramfs, mounts the
//! root filesystem and starts the init of the distribution: a direct boot without the
//! distribution's own initrd, which takes 3 s and more under TCG. If the kernel's
//! command line says so, it serves the host as an appliance instead. In an initramfs
//! without modules, it prints a greeting and switches the machine off: the probe for a
//! working accelerator.

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

/// Runs as the first process. Returns only after an error.
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
        // A fork may need the network, and loading the driver in each fork takes time.
        modules::load("network")?;
        // A program with root rights in a user namespace could mount its own /proc,
        // and reach the kernel and the disk through it.
        let _ = fs::write("/proc/sys/user/max_user_namespaces", "0");
        return attend();
    }
    boot(&cmdline).map(|never| match never {})
}

/// Runs the agent, and reaps orphaned processes.
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
        .ok_or_else(|| io::Error::other("the kernel's command line has no `root=`"))?
        .to_owned();
    modules::load("disk")?;
    let start = Instant::now();
    while !Path::new(&root).exists() {
        if start.elapsed() > DISK_WAIT {
            return Err(io::Error::other(format!("timed out waiting for {root}")));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    mount(root.as_str(), "/root", "ext4", MountFlags::RDONLY, None)?;
    if cmdline.split_whitespace().any(|word| word == WATCHED)
        && let Err(error) = opened::watch("/root")
    {
        // The kernel may lack fanotify. Then snapshots of the machine can't be retargeted.
        say(&format!("vimg-init: opened files are not recorded: {error}\n"));
    }
    rustix::mount::mount_move("/dev", "/root/dev")?;
    rustix::mount::mount_move("/proc", "/root/proc")?;
    system::switch_root("/root")?;
    Err(std::process::Command::new("/sbin/init").exec())
}

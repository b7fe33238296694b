//! The first process of a machine. With modules beside it, it loads them,
//! mounts the root filesystem and hands over to its init: a direct boot that
//! spares the distribution's own initrd (3 s and more under TCG). Without, it
//! says hello and switches off: the probe for an accelerator that works.

use std::convert::Infallible;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, mount, mount_move};

/// How long the disk may take to appear.
const DISK_WAIT: Duration = Duration::from_secs(30);

/// Does what the initramfs is for. Returns only if that fails.
pub fn main() -> io::Result<()> {
    let result = if Path::new("/modules").is_dir() { boot().map(|never| match never {}) } else { probe() };
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

fn boot() -> io::Result<Infallible> {
    mount("devtmpfs", "/dev", "devtmpfs", MountFlags::empty(), None)?;
    mount("proc", "/proc", "proc", MountFlags::empty(), None)?;
    let cmdline = fs::read_to_string("/proc/cmdline")?;
    let root = cmdline
        .split_whitespace()
        .find_map(|word| word.strip_prefix("root="))
        .ok_or_else(|| io::Error::other("the command line names no root"))?
        .to_owned();
    let mut modules: Vec<_> = fs::read_dir("/modules")?.flatten().map(|e| e.path()).collect();
    // Their names start with their turn.
    modules.sort();
    for module in modules {
        match rustix::system::finit_module(File::open(&module)?, c"", 0) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(error) => return Err(io::Error::other(format!("{}: {error}", module.display()))),
        }
    }
    let start = Instant::now();
    while !Path::new(&root).exists() {
        if start.elapsed() > DISK_WAIT {
            return Err(io::Error::other(format!("{root} does not appear")));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    mount(root.as_str(), "/root", "ext4", MountFlags::RDONLY, None)?;
    mount_move("/dev", "/root/dev")?;
    mount_move("/proc", "/root/proc")?;
    std::env::set_current_dir("/root")?;
    mount_move(".", "/")?;
    rustix::process::chroot(".")?;
    std::env::set_current_dir("/")?;
    Err(std::process::Command::new("/sbin/init").exec())
}

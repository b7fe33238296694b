//! The first process of a machine. It loads the modules of the initramfs, mounts the
//! root filesystem and starts the init of the distribution: a direct boot without the
//! distribution's own initrd, which takes 3 s and more under TCG. If the kernel's
//! command line says so, it serves the host as an appliance instead. In an initramfs
//! without modules, it prints a greeting and switches the machine off: the probe for a
//! working accelerator.
//!
//! It also starts the agent that serves the host: a process that stays when the root
//! changes, so that nothing in the image decides which agent speaks. systemd leaves such a
//! process alone if its first argument begins with `@` (systemd's
//! `ROOT_STORAGE_DAEMONS`). Where the distribution's own initrd must run first, the process
//! waits for the root that this initrd mounts.

use std::convert::Infallible;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, mount};

use crate::protocol::{APPLIANCE, CONSOLE, EARLY, FIXED, PROBE, WATCHED};
use crate::{modules, opened, system};

/// A drop-in for systemd's unit of the serial console. The other options are the unit's own.
const LOG_IN: &str = "[Service]\nExecStart=\n\
    ExecStart=-/sbin/agetty --autologin root --keep-baud 115200,57600,38400,9600 - $TERM\n";
/// The init of a distribution's initrd.
const INIT: &str = "/init";
/// The first argument of the agent's process. systemd spares it for the `@`.
const NAME: &str = "@vimg-agent";
/// Where [`follow`] mounts /proc.
const OWN_PROC: &str = "/vimg-proc";
/// How long the disk may take to appear.
const DISK_WAIT: Duration = Duration::from_secs(30);

/// Runs as the first process. Returns only after an error.
pub fn main() -> io::Result<()> {
    let result = if Path::new(INIT).exists() { hand_over().map(|never| match never {}) } else { start() };
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

fn start() -> io::Result<()> {
    mount("devtmpfs", "/dev", "devtmpfs", MountFlags::empty(), None)?;
    mount("proc", "/proc", "proc", MountFlags::empty(), None)?;
    let cmdline = fs::read_to_string("/proc/cmdline")?;
    if cmdline.split_whitespace().any(|word| word == PROBE) {
        say("vimg-probe-hello\n");
        rustix::system::reboot(rustix::system::RebootCommand::PowerOff)?;
    }
    if !modules::any() {
        return Err(io::Error::other("the initial RAM disk of the image has no /init"));
    }
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
    let agent = Command::new(EARLY).arg("appliance").spawn()?;
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
    if cmdline.split_whitespace().any(|word| word == CONSOLE)
        && let Err(error) = log_in("/root/run")
    {
        say(&format!("vimg-init: root is not logged in: {error}\n"));
    }
    rustix::mount::mount_move("/dev", "/root/dev")?;
    rustix::mount::mount_move("/proc", "/root/proc")?;
    serve_in("/root")?;
    system::switch_root("/root")?;
    Err(Command::new("/sbin/init").exec())
}

/// Has systemd log root in on the serial console, in a filesystem that systemd keeps and
/// that is gone when the machine is.
fn log_in(run: &str) -> io::Result<()> {
    mount("tmpfs", run, "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, c"mode=0755")?;
    let dir = Path::new(run).join("systemd/system/serial-getty@ttyS0.service.d");
    fs::create_dir_all(&dir)?;
    fs::write(dir.join("vimg.conf"), LOG_IN)
}

/// Starts the agent in the filesystem at `root`, which becomes that of all processes.
fn serve_in(root: &'static str) -> io::Result<()> {
    let device = |name: &str| OpenOptions::new().read(true).write(true).open(format!("{root}/dev/{name}"));
    // The path leads to the program from any root that has /proc.
    let program = File::open(EARLY)?;
    let mut agent = Command::new(format!("/proc/self/fd/{}", program.as_raw_fd()));
    agent.arg0(NAME).arg("serve").env_clear().stdin(device("null")?).stdout(device("null")?);
    agent.stderr(device("kmsg").or_else(|_| device("null"))?);
    // SAFETY: the closure makes system calls only.
    unsafe {
        agent.pre_exec(move || {
            rustix::process::setsid()?;
            rustix::process::chroot(root)?;
            rustix::process::chdir("/")?;
            Ok(())
        });
    }
    // The distribution's init is its parent, and reaps it.
    agent.spawn().map(|_| ())
}

/// Continues with the init of the distribution's initrd, after starting a process that
/// waits for the end of it.
fn hand_over() -> io::Result<Infallible> {
    if let Err(error) = Command::new(EARLY).arg0(NAME).arg("follow").spawn() {
        say(&format!("vimg-init: the agent can't start: {error}\n"));
    }
    Err(Command::new(INIT).args(std::env::args_os().skip(1)).exec())
}

/// Waits until the first process has another root, goes there, and becomes the agent that
/// serves the host.
pub fn follow() -> io::Result<Infallible> {
    rustix::process::setsid()?;
    let program = File::open(EARLY)?;
    // The initrd moves its own /proc away.
    fs::create_dir(OWN_PROC)?;
    mount("proc", OWN_PROC, "proc", MountFlags::empty(), None)?;
    let there = format!("{OWN_PROC}/1/root");
    let here = fs::metadata("/")?.dev();
    while fs::metadata(format!("{there}/")).map_or(true, |root| root.dev() == here)
        || !Path::new(&there).join("proc/self").exists()
    {
        std::thread::sleep(Duration::from_millis(20));
    }
    rustix::process::chroot(there.as_str())?;
    rustix::process::chdir("/")?;
    let null = OpenOptions::new().read(true).write(true).open("/dev/null")?;
    let mut agent = Command::new(format!("/proc/self/fd/{}", program.as_raw_fd()));
    agent.arg0(NAME).arg("serve").env_clear().stdin(null.try_clone()?).stdout(null.try_clone()?).stderr(null);
    Err(agent.exec())
}

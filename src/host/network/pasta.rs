//! pasta: the program that opens the connections of a namespace on the host.

use std::io;
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::process::{Child, Command};

use super::reach::Reach;
use super::tools::Tools;
use crate::host::namespaces::Namespaces;
use crate::host::{self, child};

/// The address of the namespace, in a network that no host has (RFC 5737).
const OWN: &str = "198.51.100.2";
/// The gateway; also the host itself, if that is allowed.
pub const HOST: &str = "198.51.100.1";
/// The DNS resolver.
pub const RESOLVER: &str = "198.51.100.3";

/// Timeout for the start of pasta, which takes some milliseconds.
const OPENING: Duration = Duration::from_secs(20);

/// The first port that needs no privilege (ip(7)).
const FREE: u16 = 1024;

/// A port of the host that is forwarded into a namespace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inward {
    /// An address of the host.
    pub address: String,
    /// The host's port.
    pub host: u16,
    /// The port inside.
    pub inside: u16,
}

impl Inward {
    /// Whether another one has the same host port.
    pub fn is_at(&self, other: &Self) -> bool {
        (&self.address, self.host) == (&other.address, other.host)
    }
}

/// Starts pasta in a namespace that has no network yet. Returns when its network
/// card is there and it listens on all ports; with the card's name.
pub(super) async fn start(
    namespaces: &Namespaces,
    tools: &Tools,
    reach: &Reach,
    inward: &[Inward],
) -> io::Result<(Child, String)> {
    let mut command = host::command(&tools.pasta);
    let paths = ["user", "net"].map(|kind| format!("/proc/{}/ns/{kind}", namespaces.holder()));
    command
        .args(["-f", "-q", "-4", "--config-net", "-a", OWN, "-n", "24", "-g", HOST])
        .args(["--dns-forward", RESOLVER, "-u", "none", "-U", "none"])
        .args(["--userns", &paths[0], "--netns", &paths[1]]);
    let ports: Vec<String> = reach.ports.iter().map(u16::to_string).collect();
    command.args(["-T", if ports.is_empty() { "none".into() } else { ports.join(",") }.as_str()]);
    for Inward { address, host, inside } in inward {
        command.args(["-t", &format!("{address}/{host}:{inside}")]);
    }
    if inward.is_empty() {
        command.args(["-t", "none"]);
    }
    if !reach.host {
        command.arg("--no-map-gw");
    }
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
    command.process_group(0);
    own_tun(&mut command);
    namespaces.own(command.as_std_mut(), inward.iter().any(|way| way.host < FREE));
    child::die_with_us(&mut command);
    let mut pasta = command.spawn()?;
    let card = card(&mut pasta, namespaces.holder(), &reach.ports).await?;
    if let Some(err) = pasta.stderr.take() {
        // A pipe that is not read would block pasta once it is full.
        child::Tail::of(err, 4096);
    }
    Ok((pasta, card))
}

/// Tests whether all of `ports` have a listener in the namespace of `holder`.
fn listens(holder: u32, ports: &[u16]) -> bool {
    // "sl local_address rem_address st ..."; 0A is LISTEN (proc(5)).
    let table = std::fs::read_to_string(format!("/proc/{holder}/net/tcp")).unwrap_or_default();
    ports.iter().all(|port| {
        let end = format!(":{port:04X}");
        table.lines().any(|line| {
            let words: Vec<&str> = line.split_whitespace().take(4).collect();
            words.get(1).is_some_and(|local| local.ends_with(&end)) && words.get(3) == Some(&"0A")
        })
    })
}

/// Waits until pasta has made its network card in the namespace and listens on
/// `ports` there. Returns the card's name.
async fn card(pasta: &mut Child, holder: u32, ports: &[u16]) -> io::Result<String> {
    let start = Instant::now();
    loop {
        // "Iface Destination Gateway Flags RefCnt Use Metric Mask ..."; both
        // are 0 in the default route, and a rejecting route has no card.
        let routes = std::fs::read_to_string(format!("/proc/{holder}/net/route")).unwrap_or_default();
        let default = routes.lines().skip(1).find_map(|line| {
            let words: Vec<&str> = line.split_whitespace().take(8).collect();
            let (card, to, mask) = (*words.first()?, *words.get(1)?, *words.get(7)?);
            ((to, mask) == ("00000000", "00000000") && card != "*").then(|| card.to_owned())
        });
        if let Some(card) = default.filter(|_| listens(holder, ports)) {
            return Ok(card);
        }
        if !matches!(pasta.try_wait(), Ok(None)) || start.elapsed() > OPENING {
            let _ = pasta.start_kill();
            let mut words = String::new();
            if let Some(mut err) = pasta.stderr.take() {
                let read = tokio::io::AsyncReadExt::read_to_string(&mut err, &mut words);
                let _ = tokio::time::timeout(Duration::from_secs(1), read).await;
            }
            // Messages about a missing syslog are ignored.
            let words: Vec<&str> = words.lines().filter(|line| !line.contains("syslog")).collect();
            return Err(io::Error::other(format!("pasta: {}", words.join("; "))));
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Gives root's pasta, which runs without privileges, its own `/dev/net/tun`.
fn own_tun(command: &mut Command) {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    // SAFETY: the closure makes system calls only.
    unsafe {
        command.pre_exec(|| {
            host::own_mounts()?;
            let made = (|| {
                // The directory exists only if the kernel module is loaded.
                let dir = rustix::fs::Mode::from_raw_mode(0o755);
                match rustix::fs::mkdirat(rustix::fs::CWD, c"/dev/net", dir) {
                    Ok(()) | Err(rustix::io::Errno::EXIST) => {}
                    Err(e) => return Err(e),
                }
                rustix::mount::mount(
                    "tmpfs",
                    c"/dev/net",
                    c"tmpfs",
                    rustix::mount::MountFlags::NOSUID,
                    c"mode=0755",
                )?;
                let (mode, device) = (rustix::fs::Mode::from_raw_mode(0o666), rustix::fs::makedev(10, 200));
                let node = c"/dev/net/tun";
                rustix::fs::mknodat(
                    rustix::fs::CWD,
                    node,
                    rustix::fs::FileType::CharacterDevice,
                    mode,
                    device,
                )?;
                rustix::fs::chmodat(rustix::fs::CWD, node, mode, rustix::fs::AtFlags::empty())
            })();
            made.map_err(Into::into)
        });
    }
}

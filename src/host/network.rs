//! Internet access for guests, without access to the host, private networks and
//! a cloud's metadata service.
//!
//! The guests are in a network namespace whose only way out is `pasta`, a
//! program that opens ordinary connections on the host. Routes in the namespace
//! decide what can be reached, and only its owner can change them: blocked
//! addresses have no route. pasta forwards DNS queries to the host's own
//! resolver.

use std::io;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::io::AsyncWriteExt;
use tokio::process::{Child, Command};
use tokio::sync::Mutex;

use super::child;
use super::error::HostError;
use super::namespaces::{self, Ids, Namespaces};

/// The address of the namespace, in a network that no host has (RFC 5737).
const OWN: &str = "198.51.100.2";
/// The gateway; also the host itself, if that is allowed.
pub const HOST: &str = "198.51.100.1";
/// The DNS resolver.
pub const RESOLVER: &str = "198.51.100.3";

/// Networks that guests can't reach unless the user allows them: this network,
/// private networks (RFC 1918), carrier-grade NAT (RFC 6598), loopback,
/// link-local (RFC 3927; clouds serve credentials there), Azure's host
/// (WireServer), special purposes (RFC 6890), benchmarks (RFC 2544), this
/// module's own, multicast and everything above.
const BLOCKED: &[&str] = &[
    "0.0.0.0/8",
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "168.63.129.16/32",
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.0.0.0/24",
    "192.168.0.0/16",
    "198.18.0.0/15",
    "198.51.100.0/24",
    "224.0.0.0/3",
];

/// Timeout for the start of pasta, which takes some milliseconds.
const OPENING: Duration = Duration::from_secs(20);

/// An IPv4 network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Net {
    address: u32,
    bits: u32,
}

impl Net {
    fn mask(self) -> u32 {
        u32::MAX.checked_shl(32 - self.bits).unwrap_or(0)
    }

    /// Whether it contains all of another network.
    fn holds(self, other: Self) -> bool {
        self.bits <= other.bits && (self.address ^ other.address) & self.mask() == 0
    }
}

impl FromStr for Net {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (address, bits) = text.split_once('/').unwrap_or((text, "32"));
        let address: Ipv4Addr =
            address.parse().map_err(|_| format!("`{text}` is not an IPv4 address or network"))?;
        let bits = bits.parse().ok().filter(|bits| *bits <= 32);
        let net = Self { address: address.into(), bits: bits.ok_or("a network has 0 to 32 bits")? };
        Ok(Self { address: net.address & net.mask(), ..net })
    }
}

impl TryFrom<String> for Net {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Net> for String {
    fn from(net: Net) -> Self {
        net.to_string()
    }
}

impl std::fmt::Display for Net {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", Ipv4Addr::from(self.address), self.bits)
    }
}

/// What the user allows guests to reach besides the internet.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reach {
    /// The host's network, directly.
    pub all: bool,
    /// Services on the host's loopback, at [`HOST`].
    pub host: bool,
    /// Allowed private networks.
    pub nets: Vec<Net>,
    /// TCP ports on the host's loopback that are also on the loopback of
    /// guests.
    pub ports: Vec<u16>,
}

impl Reach {
    /// Adds a value of `network-allow`: `all`, `host`, or a network.
    ///
    /// # Errors
    ///
    /// The mistake in the value.
    pub fn allow(&mut self, text: &str) -> Result<(), String> {
        match text {
            "all" => self.all = true,
            "host" => self.host = true,
            net => {
                self.nets.push(net.parse().map_err(|why| {
                    format!("{why}; expected `host`, `all` or a network such as 10.1.0.0/16")
                })?)
            }
        }
        Ok(())
    }
}

/// The proxies in the user's environment.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Proxies {
    /// For `http://` addresses.
    pub http: Option<String>,
    /// For `https://` addresses.
    pub https: Option<String>,
    /// Names that need no proxy.
    pub no: Option<String>,
}

impl Proxies {
    /// Whether a proxy address contains a name or password.
    pub fn have_password(&self) -> bool {
        [&self.http, &self.https].into_iter().flatten().any(|url| without_password(url) != *url)
    }

    /// Returns the proxies without names and passwords.
    pub fn without_password(&self) -> Self {
        let strip = |url: &Option<String>| url.as_deref().map(without_password);
        Self { http: strip(&self.http), https: strip(&self.https), no: self.no.clone() }
    }

    /// Returns the proxies as environment variables. A proxy on the host's
    /// loopback gets the address `loopback`, which is the guest's address for
    /// it.
    pub fn variables(&self, loopback: &str) -> Vec<(String, String)> {
        let mut all = Vec::new();
        for (name, value) in
            [("http_proxy", &self.http), ("https_proxy", &self.https), ("no_proxy", &self.no)]
        {
            let Some(value) = value else { continue };
            let value = match place(value) {
                Some((host, _)) if is_loopback(&host) => value.replacen(&host, loopback, 1),
                _ => value.clone(),
            };
            all.push((name.to_owned(), value.clone()));
            // Some programs read only upper-case names.
            if name != "http_proxy" {
                all.push((name.to_uppercase(), value));
            }
        }
        all
    }

    /// Allows the addresses and ports of the proxies.
    async fn allow_in(&self, reach: &mut Reach) {
        for (host, port) in [&self.http, &self.https].into_iter().flatten().filter_map(|url| place(url)) {
            if is_loopback(&host) {
                reach.ports.push(port);
                continue;
            }
            let found = tokio::net::lookup_host((host.as_str(), port)).await;
            for address in found.into_iter().flatten() {
                if let std::net::IpAddr::V4(address) = address.ip() {
                    reach.nets.push(Net { address: address.into(), bits: 32 });
                }
            }
        }
        reach.ports.sort_unstable();
        reach.ports.dedup();
    }
}

fn is_loopback(host: &str) -> bool {
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// The network access of a guest.
#[derive(Debug, Clone, Default)]
pub struct WayOut {
    /// The gateway; `None` if the guest uses the host's network.
    pub gateway: Option<Gateway>,
    /// Environment variables with the user's proxies.
    pub variables: Vec<(String, String)>,
    /// The host's address, if guests may reach it.
    pub host: Option<String>,
}

impl WayOut {
    /// Opens or closes the gateway, if there is one.
    pub async fn set(&self, open: bool) -> io::Result<()> {
        match &self.gateway {
            Some(gateway) => gateway.set(open).await,
            None => Ok(()),
        }
    }
}

/// Returns a proxy's address without name and password (RFC 3986, 3.2.1).
fn without_password(url: &str) -> String {
    let (scheme, rest) = url.split_once("://").map_or(("", url), |(scheme, rest)| (scheme, rest));
    let (authority, path) = rest.find(['/', '?', '#']).map_or((rest, ""), |at| rest.split_at(at));
    let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    if scheme.is_empty() { format!("{host}{path}") } else { format!("{scheme}://{host}{path}") }
}

/// Returns host and port of a proxy's address [default port: 80 or 443].
fn place(url: &str) -> Option<(String, u16)> {
    let (scheme, rest) = url.split_once("://").unwrap_or(("http", url));
    let rest = rest.split(['/', '?', '#']).next()?;
    let rest = rest.rsplit_once('@').map_or(rest, |(_, rest)| rest);
    let authority: http::uri::Authority = rest.parse().ok()?;
    let default = if scheme == "https" { 443 } else { 80 };
    let host = authority.host().trim_start_matches('[').trim_end_matches(']');
    Some((host.to_owned(), authority.port_u16().unwrap_or(default))).filter(|(host, _)| !host.is_empty())
}

/// What guests may reach, from the user's settings and environment.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Access {
    /// The allowed networks.
    pub reach: Reach,
    /// The user's proxies, which guests may use.
    pub proxies: Proxies,
}

impl Access {
    /// Makes a closed gateway for a guest; `None` if guests use the host's
    /// network.
    ///
    /// # Errors
    ///
    /// The missing program or the failure, with advice.
    pub async fn gateway(&self, ids: Ids) -> Result<Option<Gateway>, Unreachable> {
        if self.reach.all {
            return Ok(None);
        }
        let ids = if rustix::process::geteuid().is_root() { Ids::System } else { ids };
        let tools = Tools::find()?;
        let fail = |e: io::Error| Unreachable {
            message: format!("can't create the network namespaces: {e}"),
            help: HELP.into(),
        };
        let namespaces = Arc::new(Namespaces::new(ids).map_err(fail)?);
        self.open_in(namespaces, &tools, &[]).await.map(Some)
    }

    /// Returns the network access of a guest that sees the host's loopback at
    /// the address `loopback`.
    pub fn way_out(&self, gateway: Option<Gateway>, loopback: &str) -> WayOut {
        let host = (self.reach.host && !self.reach.all).then(|| HOST.to_owned());
        WayOut { gateway, variables: self.proxies.variables(loopback), host }
    }

    /// Makes a gateway in existing namespaces, with forwarded ports.
    ///
    /// # Errors
    ///
    /// As for [`Self::gateway`]; or a port of the host is in use.
    pub async fn gateway_in(
        &self,
        namespaces: Arc<Namespaces>,
        inward: &[Inward],
    ) -> Result<Gateway, Unreachable> {
        self.open_in(namespaces, &Tools::find()?, inward).await
    }

    async fn open_in(
        &self,
        namespaces: Arc<Namespaces>,
        tools: &Tools,
        inward: &[Inward],
    ) -> Result<Gateway, Unreachable> {
        let mut reach = self.reach.clone();
        self.proxies.allow_in(&mut reach).await;
        let made = Gateway::new(namespaces, tools, &reach, inward).await;
        made.map_err(|e| Unreachable { message: e.to_string(), help: HELP.into() })
    }
}

const HELP: &str = "to use the host's network directly: --network-allow all";

/// Why there is no network access, and what to do about it.
#[derive(Debug, Clone)]
pub struct Unreachable {
    /// What failed.
    pub message: String,
    /// What to do.
    pub help: String,
}

impl From<Unreachable> for HostError {
    fn from(error: Unreachable) -> Self {
        Self::new(format!("the network: {}", error.message)).help(error.help)
    }
}

/// Writes a `resolv.conf` for use behind a gateway.
///
/// # Errors
///
/// Errors of the system.
pub fn resolv_conf(dir: &Path) -> io::Result<PathBuf> {
    let path = dir.join("resolv.conf");
    std::fs::write(&path, format!("nameserver {RESOLVER}\n"))?;
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o644))?;
    Ok(path)
}

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

/// The programs that a gateway needs.
#[derive(Debug, Clone)]
pub struct Tools {
    pasta: PathBuf,
    ip: PathBuf,
}

impl Tools {
    /// Finds them, and tests whether this user may make namespaces.
    ///
    /// # Errors
    ///
    /// The missing program or permission, with advice.
    pub fn find() -> Result<Self, Unreachable> {
        let find = |name: &str, package: &str| {
            super::find(name).ok_or_else(|| {
                let message = format!("`{name}` is not installed; vimg needs it for the network of guests");
                Unreachable { message, help: format!("install it: apt-get install {package}; or {HELP}") }
            })
        };
        let tools = Self { pasta: find("pasta", "passt")?, ip: find("ip", "iproute2")? };
        let tun = "/dev/net/tun";
        // Root makes its own device.
        if !rustix::process::geteuid().is_root()
            && let Err(e) = std::fs::File::options().read(true).write(true).open(tun)
        {
            let help = format!("as root: modprobe tun; chmod 666 {tun}; or {HELP}");
            return Err(Unreachable { message: format!("{tun}: {e}"), help });
        }
        namespaces::allowed()
            .map_err(|(message, help)| Unreachable { message, help: format!("{help}; or {HELP}") })?;
        Ok(tools)
    }
}

/// A gateway. It is closed until it is opened, and ends when dropped.
#[derive(Debug, Clone)]
pub struct Gateway(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    namespaces: Arc<Namespaces>,
    tools: Tools,
    card: String,
    reach: Reach,
    inward: Vec<Inward>,
    /// Whether it is open.
    open: Mutex<bool>,
    pasta: std::sync::Mutex<Child>,
}

impl Gateway {
    /// Makes a gateway in a namespace that has no network yet.
    pub async fn new(
        namespaces: Arc<Namespaces>,
        tools: &Tools,
        reach: &Reach,
        inward: &[Inward],
    ) -> io::Result<Self> {
        let mut command = super::command(&tools.pasta);
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
        let inner = Inner {
            namespaces,
            tools: tools.clone(),
            card,
            reach: reach.clone(),
            inward: inward.to_vec(),
            open: Mutex::new(true),
            pasta: pasta.into(),
        };
        let gateway = Self(Arc::new(inner));
        if !reach.ports.is_empty() {
            // The rule for the loopback comes first by default, and is moved
            // here. An earlier gateway in the same namespaces may have moved it
            // already.
            let lines = format!("rule add pref {LOCAL} lookup local\nrule del pref 0\n");
            let _ = gateway.ip(lines, true).await;
        }
        gateway.ip(gateway.routes(), false).await?;
        *gateway.0.open.lock().await = false;
        Ok(gateway)
    }

    /// Stops pasta, and removes rules that would be in the way of another
    /// gateway in the same namespaces. If this is the last handle, its ports
    /// are free when this returns.
    pub async fn end(self) {
        let Inner { reach, inward, .. } = &*self.0;
        let refused = reach.ports.iter().map(|port| format!("rule del {}\n", refused(*port)));
        let answers = inward.iter().map(|way| format!("rule del {}\n", answers(way)));
        let _ = self.ip(refused.chain(answers).collect(), true).await;
        if let Some(inner) = Arc::into_inner(self.0) {
            let mut pasta = inner.pasta.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
            let _ = pasta.kill().await;
        }
    }

    /// Whether pasta still runs.
    pub fn is_alive(&self) -> bool {
        let mut pasta = self.0.pasta.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        matches!(pasta.try_wait(), Ok(None))
    }

    /// Returns its namespaces.
    pub fn namespaces(&self) -> &Arc<Namespaces> {
        &self.0.namespaces
    }

    /// Opens or closes it. Returns when that is done.
    ///
    /// # Errors
    ///
    /// The routes can't be changed. If opening failed, it is closed.
    pub async fn set(&self, open: bool) -> io::Result<()> {
        let mut is = self.0.open.lock().await;
        if *is == open {
            return Ok(());
        }
        // Closing runs all commands, even if some fail.
        let done = self.ip(if open { self.opened() } else { self.closed() }, !open).await;
        if done.is_err() && open {
            // Each of these lines may fail, because not all routes exist.
            let _ = self.ip(self.closed(), true).await;
        }
        *is = open && done.is_ok();
        done
    }

    /// The routes that lead out, the default route last.
    fn ways(&self) -> Vec<String> {
        let Inner { card, reach, .. } = &*self.0;
        let via = format!("via {HOST} dev {card} onlink");
        let mut ways = vec![format!("{RESOLVER}/32 {via}")];
        if reach.host {
            ways.push(format!("{HOST}/32 dev {card}"));
        }
        ways.extend(reach.nets.iter().filter(|net| net.bits > 0).map(|net| format!("{net} {via}")));
        ways.sort();
        ways.dedup();
        ways.push(format!("default {via}"));
        ways
    }

    /// Commands that open it: the routes that lead out, the default route last.
    fn opened(&self) -> String {
        let ports = self.0.reach.ports.iter().map(|port| format!("rule del {}\n", refused(*port)));
        ports.chain(self.ways().iter().map(|way| format!("route replace {way}\n"))).collect()
    }

    /// Commands that close it.
    fn closed(&self) -> String {
        let ports = self.0.reach.ports.iter().map(|port| format!("rule add {}\n", refused(*port)));
        self.ways().iter().rev().map(|way| format!("route del {way}\n")).chain(ports).collect()
    }

    /// Commands that set it up, closed: they remove the routes that pasta made,
    /// and reject blocked networks.
    fn routes(&self) -> String {
        let Inner { card, reach, inward, .. } = &*self.0;
        let mut lines = format!("route flush dev {card}\n");
        let allowed = |net: &Net| reach.nets.iter().any(|allowed| allowed.holds(*net));
        let blocked = BLOCKED.iter().filter_map(|net| net.parse().ok()).chain(own_addresses());
        for net in blocked.filter(|net| !allowed(net)) {
            // The loopback inside is not affected.
            lines.push_str(&format!("route replace unreachable {net}\n"));
        }
        // Answers to clients of forwarded ports must go back even to private
        // networks.
        lines.extend(inward.iter().map(|way| format!("rule add {}\n", answers(way))));
        if !inward.is_empty() {
            lines.push_str(&format!("route add default via {HOST} dev {card} onlink table {ANSWERS}\n"));
        }
        lines.extend(reach.ports.iter().map(|port| format!("rule add {}\n", refused(*port))));
        lines
    }

    /// Runs commands of ip(8), up to the first that fails, or `all` of them.
    /// Fails if one of them failed.
    async fn ip(&self, lines: String, all: bool) -> io::Result<()> {
        let mut command = super::command(&self.0.tools.ip);
        if all {
            command.arg("-force");
        }
        command.args(["-batch", "-"]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
        self.0.namespaces.administer(command.as_std_mut());
        let mut child = command.kill_on_drop(true).spawn()?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(lines.as_bytes()).await?;
        }
        let output = child.wait_with_output().await?;
        if output.status.success() {
            return Ok(());
        }
        Err(io::Error::other(format!("ip: {}", String::from_utf8_lossy(&output.stderr).trim())))
    }
}

/// The first port that needs no privilege (ip(7)).
const FREE: u16 = 1024;

/// Priorities of routing rules; the first match counts. They are for ports of
/// the host's loopback while the gateway is closed, the loopback, and answers
/// to clients of forwarded ports, whose table has the same number.
const REFUSED: u32 = 5;
const LOCAL: u32 = 10;
const ANSWERS: u32 = 20;

/// The rule that rejects a port of the host's loopback. pasta listens on this
/// port in the namespace.
fn refused(port: u16) -> String {
    format!("pref {REFUSED} ipproto tcp dport {port} prohibit")
}

/// The rule that sends answers to clients of a forwarded port out.
fn answers(way: &Inward) -> String {
    format!("pref {ANSWERS} ipproto tcp sport {} lookup {ANSWERS}", way.inside)
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
            super::own_mounts()?;
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

/// Returns the addresses of this host's own network cards.
fn own_addresses() -> Vec<Net> {
    // The kernel's table of local addresses, as a tree: "|-- ADDRESS" and below
    // it "/32 host LOCAL".
    let text = std::fs::read_to_string("/proc/net/fib_trie").unwrap_or_default();
    let mut address: Option<Net> = None;
    let mut found: Vec<Net> = Vec::new();
    for line in text.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix("|-- ") {
            address = name.parse().ok();
        } else if line.starts_with("/32 host LOCAL") {
            found.extend(address);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_are_read_and_compared() {
        let net = |text: &str| text.parse::<Net>().unwrap();
        assert_eq!(net("10.1.2.3/8").to_string(), "10.0.0.0/8");
        assert_eq!(net("0.0.0.0/0").to_string(), "0.0.0.0/0");
        assert!(net("10.0.0.0/8").holds(net("10.255.0.1")) && !net("10.0.0.0/8").holds(net("11.0.0.1")));
        assert!(net("0.0.0.0/0").holds(net("169.254.0.0/16")));
        for wrong in ["10.0.0.0/33", "host.example", "10.0.0", "::1"] {
            assert!(wrong.parse::<Net>().is_err(), "{wrong}");
        }
        let mut reach = Reach::default();
        assert!(reach.allow("everything").unwrap_err().contains("`host`, `all`"));
        reach.allow("host").unwrap();
        assert!(reach.host && !reach.all);
    }

    #[tokio::test]
    async fn proxies_on_the_loopback_are_where_guests_see_it() {
        let proxies = Proxies {
            http: Some("http://localhost:3128".into()),
            https: Some("http://u:p@proxy.example:8080/".into()),
            no: Some("a,b".into()),
        };
        let of = |loopback: &str| proxies.variables(loopback);
        assert!(of("10.0.2.2").contains(&("http_proxy".into(), "http://10.0.2.2:3128".into())));
        assert!(of("127.0.0.1").contains(&("HTTPS_PROXY".into(), "http://u:p@proxy.example:8080/".into())));
        assert!(proxies.have_password() && !proxies.without_password().have_password());
        assert_eq!(proxies.without_password().https.as_deref(), Some("http://proxy.example:8080/"));
        assert_eq!(proxies.without_password().http, proxies.http);
        assert_eq!(place("proxy"), Some(("proxy".into(), 80)));
        let mut reach = Reach::default();
        Proxies { https: Some("https://[::1]:3128".into()), ..proxies }.allow_in(&mut reach).await;
        assert_eq!((reach.ports, reach.nets), (vec![3128], vec![]));
        assert_eq!(place("https://proxy"), Some(("proxy".into(), 443)));
        assert_eq!(place("http://"), None);
    }

    #[tokio::test]
    async fn a_gateway_opens_and_closes_again() {
        let Ok(tools) = Tools::find() else { return };
        let ids = if rustix::process::geteuid().is_root() { Ids::System } else { Ids::Same };
        let namespaces = Arc::new(Namespaces::new(ids).unwrap());
        let proxy: Net = "10.1.2.3".parse().unwrap();
        // Two settings may name the same proxy.
        let reach = Reach { nets: vec![proxy, proxy], ports: vec![31280], ..Reach::default() };
        let way = Inward { address: "127.0.0.1".into(), host: 0, inside: 20_000 };
        for _ in 0..2 {
            // A second gateway replaces it in the same namespaces.
            let gateway =
                Gateway::new(namespaces.clone(), &tools, &reach, std::slice::from_ref(&way)).await.unwrap();
            for open in [true, false, true] {
                gateway.set(open).await.unwrap();
                let routes =
                    std::fs::read_to_string(format!("/proc/{}/net/route", namespaces.holder())).unwrap();
                // 10.1.2.3, the lowest byte last.
                assert_eq!(routes.contains("0302010A"), open, "{routes}");
            }
            gateway.end().await;
        }
    }

    /// Connects to a server on the host's loopback from inside.
    async fn asks(reach: &Reach, address: &str, open: bool) -> bool {
        use tokio::io::AsyncReadExt;
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let mut reach = reach.clone();
        if address == "127.0.0.1" {
            reach.ports.push(port);
        }
        // For an ordinary user, without subordinate ids.
        let ids = if rustix::process::geteuid().is_root() { Ids::System } else { Ids::Same };
        let namespaces = Arc::new(Namespaces::new(ids).unwrap());
        let gateway = Gateway::new(namespaces, &Tools::find().unwrap(), &reach, &[]).await.unwrap();
        gateway.set(open).await.unwrap();
        let mut command = crate::host::command(std::path::Path::new("/bin/bash"));
        let script = format!("exec 3<>/dev/tcp/{address}/{port} && echo hello >&3");
        command.args(["-c", &script]).stderr(Stdio::null()).kill_on_drop(true);
        gateway.namespaces().enter(command.as_std_mut());
        let mut child = command.spawn().unwrap();
        let said = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut text = [0; 5];
            stream.read_exact(&mut text).await.is_ok() && &text == b"hello"
        };
        tokio::select! {
            said = said => said,
            _ = async { let _ = child.wait().await; tokio::time::sleep(Duration::from_millis(300)).await } => false,
        }
    }

    #[tokio::test]
    async fn the_host_is_reached_only_where_it_is_allowed() {
        if Tools::find().is_err() {
            return;
        }
        let shut = Reach::default();
        for address in ["127.0.0.2", HOST, "10.0.2.2", "169.254.169.254"] {
            assert!(!asks(&shut, address, true).await, "{address}");
        }
        let near =
            own_addresses().into_iter().filter(|own| !"127.0.0.0/8".parse::<Net>().unwrap().holds(*own));
        for own in near {
            assert!(!asks(&shut, own.to_string().trim_end_matches("/32"), true).await, "{own}");
        }
        let open = Reach { host: true, ..Reach::default() };
        assert!(asks(&open, HOST, true).await);
        assert!(!asks(&open, HOST, false).await, "it is closed");
        // A proxy on the host's loopback.
        assert!(asks(&shut, "127.0.0.1", true).await);
        assert!(!asks(&shut, "127.0.0.1", false).await, "it is closed");
    }
}

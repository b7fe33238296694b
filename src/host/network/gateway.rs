//! A gateway: the way out of a namespace, and the routes that open and close
//! it.

use std::io;
use std::process::Stdio;
use std::sync::Arc;

use tokio::io::AsyncWriteExt;
use tokio::process::Child;
use tokio::sync::Mutex;

use super::pasta::{self, HOST, Inward, RESOLVER};
use super::reach::Reach;
use super::tools::Tools;
use crate::host;
use crate::host::namespaces::Namespaces;

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
        let (pasta, card) = pasta::start(&namespaces, tools, reach, inward).await?;
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
        for net in reach.blocked() {
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
        let mut command = host::command(&self.0.tools.ip);
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::reach::{Net, own_addresses};
    use super::*;
    use crate::host::namespaces::Ids;

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

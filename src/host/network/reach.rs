//! What guests may reach: the internet, and the private networks that the user
//! allows.

use std::net::Ipv4Addr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Networks that guests can't reach unless the user allows them: this network,
/// private networks (RFC 1918), carrier-grade NAT (RFC 6598), loopback,
/// link-local (RFC 3927; clouds serve credentials there), Azure's host
/// (WireServer), special purposes (RFC 6890), benchmarks (RFC 2544), the
/// gateway's own, multicast and everything above.
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

/// An IPv4 network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Net {
    pub(super) address: u32,
    pub(super) bits: u32,
}

impl Net {
    fn mask(self) -> u32 {
        u32::MAX.checked_shl(32 - self.bits).unwrap_or(0)
    }

    /// Whether it contains all of another network.
    pub(super) fn holds(self, other: Self) -> bool {
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
    /// Services on the host's loopback, at [`super::HOST`].
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

    /// Returns the networks that guests can't reach, with the addresses of this
    /// host's own network cards.
    pub(super) fn blocked(&self) -> impl Iterator<Item = Net> {
        let allowed = |net: &Net| self.nets.iter().any(|allowed| allowed.holds(*net));
        let all = BLOCKED.iter().filter_map(|net| net.parse().ok()).chain(own_addresses());
        all.filter(move |net| !allowed(net))
    }
}

/// Returns the addresses of this host's own network cards.
pub(super) fn own_addresses() -> Vec<Net> {
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
}

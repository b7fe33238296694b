//! The user's proxies, as guests see them.

use serde::{Deserialize, Serialize};

use super::reach::{Net, Reach};

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
    pub(super) async fn allow_in(&self, reach: &mut Reach) {
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

#[cfg(test)]
mod tests {
    use super::*;

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
}

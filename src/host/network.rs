//! Internet access for guests, without access to the host, private networks and
//! a cloud's metadata service.
//!
//! The guests are in a network namespace whose only way out is `pasta`, a
//! program that opens ordinary connections on the host. Routes in the namespace
//! decide what can be reached, and only its owner can change them: blocked
//! addresses have no route. pasta forwards DNS queries to the host's own
//! resolver.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::namespaces::{Ids, Namespaces};

mod reach;
mod proxies;
mod tools;
mod pasta;
mod gateway;

pub use gateway::Gateway;
pub use pasta::{HOST, Inward, RESOLVER};
pub use proxies::Proxies;
pub use reach::{Net, Reach};
pub use tools::{Tools, Unreachable};

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
            help: tools::HELP.into(),
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
        made.map_err(|e| Unreachable { message: e.to_string(), help: tools::HELP.into() })
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

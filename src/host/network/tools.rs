//! The programs that a gateway needs, and what to do if they can't be used.

use std::path::PathBuf;

use crate::host::error::HostError;
use crate::host::{self, namespaces};

pub(super) const HELP: &str = "to use the host's network directly: --network-allow all";

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

/// The programs that a gateway needs.
#[derive(Debug, Clone)]
pub struct Tools {
    pub(super) pasta: PathBuf,
    pub(super) ip: PathBuf,
}

impl Tools {
    /// Finds them, and tests whether this user may make namespaces.
    ///
    /// # Errors
    ///
    /// The missing program or permission, with advice.
    pub fn find() -> Result<Self, Unreachable> {
        let find = |name: &str, package: &str| {
            host::find(name).ok_or_else(|| {
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

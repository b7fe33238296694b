//! Probes: the questions of checks, and everything that the rest of vimg needs to know
//! about them. The matches name every probe, so that a new one can't be forgotten.

use serde::{Deserialize, Serialize};

use crate::field::{Fields, optional};

/// A probe: one question to a machine. The agent repeats it for `within` seconds until
/// it succeeds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[expect(missing_docs, reason = "the fields are those of the recipe language")]
pub enum Probe {
    /// An HTTP request.
    Http {
        url: String,
        status: Option<u16>,
        contains: Option<String>,
        /// The name of a header, and text that its value must contain.
        header: Option<(String, String)>,
        within: u64,
    },
    /// A TCP port.
    Port { port: u16, within: u64 },
    /// A script, with a time limit in seconds.
    Run { script: String, timeout: u64, network: bool },
    /// A file.
    File { path: String, contains: Option<String> },
    /// A service.
    Service { unit: String, within: u64 },
    /// A package.
    Package { name: String },
}

impl Probe {
    /// Names the probe for people.
    pub fn label(&self) -> String {
        match self {
            Self::Http { url, .. } => format!("http {url}"),
            Self::Port { port, .. } => format!("port {port}"),
            Self::Run { .. } => "run".to_owned(),
            Self::File { path, .. } => format!("file {path}"),
            Self::Service { unit, .. } => format!("service {unit}"),
            Self::Package { name } => format!("package {name}"),
        }
    }

    /// Whether it may use the network outside of the machine.
    pub fn wants_network(&self) -> bool {
        match self {
            Self::Run { network, .. } => *network,
            Self::Http { .. }
            | Self::Port { .. }
            | Self::File { .. }
            | Self::Service { .. }
            | Self::Package { .. } => false,
        }
    }

    /// The time in seconds that it may take besides that of its answer.
    pub fn time_limit(&self) -> u64 {
        match self {
            Self::Http { within, .. } | Self::Port { within, .. } | Self::Service { within, .. } => *within,
            Self::Run { timeout, .. } => *timeout,
            Self::File { .. } | Self::Package { .. } => 0,
        }
    }

    /// Passes all fields on.
    pub fn describe(&self, to: &mut impl Fields) {
        let label = self.label();
        match self {
            Self::Http { url: _, status, contains, header, within } => {
                to.value(&label, &"");
                optional(to, &format!("{label} status"), status.as_ref());
                optional(to, &format!("{label} contains"), contains.as_ref());
                let header = header.as_ref().map(|(name, text)| format!("{name}: {text}"));
                optional(to, &format!("{label} header"), header.as_ref());
                to.value(&format!("{label} within"), within);
            }
            Self::Port { port: _, within } => {
                to.value(&label, &"");
                to.value(&format!("{label} within"), within);
            }
            Self::Run { script, timeout, network } => {
                if *network {
                    to.value("network", network);
                }
                to.text("content of script", script);
                to.value("timeout", timeout);
            }
            Self::File { path: _, contains } => {
                to.value(&label, &"");
                optional(to, &format!("{label} contains"), contains.as_ref());
            }
            Self::Service { unit: _, within } => {
                to.value(&label, &"");
                to.value(&format!("{label} within"), within);
            }
            Self::Package { name } => to.value("package", name),
        }
    }
}

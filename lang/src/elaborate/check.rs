//! Checks: conditions that the booted machine must meet.

use super::context::Elaborator;
use crate::diagnostic::{Code, Diagnostic};
use crate::model::{Check, Probe};
use crate::resolve::At;
use crate::template::Scope;
use crate::value;

/// Default of `within`, in seconds.
const WITHIN: u64 = 30;
/// Default time limit of a script, in seconds.
const TIMEOUT: u64 = 300;

impl Elaborator<'_> {
    pub(super) fn check(&mut self, at: At, scope: &Scope) -> Check {
        let probes = at.children().filter_map(|node| Some((self.probe(node, scope)?, node.head()))).collect();
        Check { name: at.name().to_owned(), span: at.head(), probes }
    }

    fn probe(&mut self, node: At, scope: &Scope) -> Option<Probe> {
        let arg = node.node.args.first()?;
        let prop = |name: &str| node.node.prop(name);
        let contains = prop("contains").and_then(|a| self.text(a, node, scope));
        let seconds = |a| self.duration(a, node, scope);
        let within = prop("within").and_then(seconds).unwrap_or(WITHIN);
        Some(match node.node.name.as_str() {
            "port" => Probe::Port { port: self.ranged(arg, node, scope, 1, 65535)? as u16, within },
            "file" => Probe::File { path: self.guest_path(arg, node, scope)?, contains },
            "http" => {
                let status = prop("status").and_then(|a| self.ranged(a, node, scope, 100, 599));
                let header = prop("header").and_then(|a| self.parsed(a, node, scope, value::http_header));
                Probe::Http {
                    url: self.parsed(arg, node, scope, value::http_url)?,
                    status: status.map(|n| n as u16),
                    contains,
                    header,
                    within,
                }
            }
            "run" => {
                let timeout = prop("timeout").and_then(|a| self.duration(a, node, scope));
                let network = prop("network").and_then(|a| self.boolean(a, node, scope)).unwrap_or_default();
                let script = self.text(arg, node, scope)?;
                Probe::Run { script, timeout: timeout.unwrap_or(TIMEOUT), network }
            }
            "service" => Probe::Service { unit: self.text(arg, node, scope)?, within },
            "package" => Probe::Package { name: self.text(arg, node, scope)? },
            other => {
                let message = format!("a check can't ask about `{other}`");
                self.out.push(Diagnostic::error(Code::UnknownNode, node.head(), message));
                return None;
            }
        })
    }
}

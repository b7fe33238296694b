//! Tests whether the host's ports that a server forwards are free, before a
//! machine boots for it.

use std::net::TcpListener;
use std::time::{Duration, Instant};

use super::super::failure::Failure;
use super::super::node_failure::{FailureKind, NodeFailure};
use crate::graph::ServerPlan;
use crate::host::keeper;

/// How long to wait for a port: the server that had it may have just ended.
const LEAVING: Duration = Duration::from_secs(2);

/// Waits until all ports are free.
///
/// # Errors
///
/// A port is in use, or this user may not listen on it; the place is that of the
/// `forward`.
pub async fn free_ports(plan: &ServerPlan) -> Result<(), Box<Failure>> {
    let start = Instant::now();
    for (forward, place) in plan.forwards.iter().zip(&plan.places) {
        while let Err(error) = TcpListener::bind((forward.address.as_str(), forward.host)) {
            if start.elapsed() < LEAVING {
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
            let taken = keeper::taken(&forward.address, forward.host);
            let message = format!("server `{}`: {}: {error}", plan.name, taken.message);
            let mut failure = NodeFailure::new(&plan.name, FailureKind::Host, message);
            failure.help = Some(taken.help);
            return Err(Box::new(Failure::at(*place, failure)));
        }
    }
    Ok(())
}

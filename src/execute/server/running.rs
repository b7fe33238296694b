//! Servers that run: finds them, and lets them continue.

use std::path::Path;

use super::super::guest::{Guest, Stopped};
use super::super::log::clean;
use super::super::session::SessionError;
use crate::provider::{self, Provider, Servers};
use crate::store::ServerHome;

/// Finds a running server and connects to its agent.
pub(super) async fn find<P: Provider>(
    provider: &P,
    home: &ServerHome,
) -> Result<Option<Guest<P::Instance>>, String> {
    let found = servers(provider)?.find(home.dir()).await.map_err(|e| e.message)?;
    let Some(instance) = found else { return Ok(None) };
    let servers = servers(provider)?;
    let mut guest = Guest::connect(instance).map_err(|instance| {
        servers.leave(instance);
        "the machine has no agent port"
    })?;
    let ready = guest.ask(async |session| {
        session.ready(false).await?;
        // The last vimg may have ended between freeze and thaw.
        session.thaw().await
    });
    match ready.await {
        Ok(()) => Ok(Some(guest)),
        Err(stopped) => {
            servers.leave(guest.close());
            Err(format!("its agent does not answer: {}", words(stopped)))
        }
    }
}

/// Says in a few words why a server did not answer.
pub(super) fn words(stopped: Stopped) -> String {
    match stopped {
        Stopped::Session(SessionError::Broken(why) | SessionError::Refused(why)) => clean(&why),
        Stopped::Session(SessionError::Step { message, .. }) => clean(&message),
        Stopped::Session(SessionError::Silent(time) | SessionError::Endless(time)) => {
            format!("no answer within {} s", time.as_secs())
        }
        Stopped::Ended(provider::Ended::Off) => "the machine switched itself off".into(),
        Stopped::Ended(provider::Ended::Panic) => "its kernel panicked".into(),
        Stopped::Ended(provider::Ended::Hangs(seconds)) => {
            format!("its processors have been stuck for {seconds} s")
        }
        Stopped::Ended(provider::Ended::AgentGone) => "the agent in the machine died".into(),
        Stopped::Ended(provider::Ended::HostDiskFull) => "the disk that holds the store is full".into(),
        Stopped::Ended(provider::Ended::DiskError(why)) => format!("its disk failed: {}", clean(&why)),
        Stopped::Ended(provider::Ended::Killed(last)) => format!("QEMU ended: {}", clean(&last)),
    }
}

/// The part of a provider that runs servers.
pub(super) fn servers<P: Provider>(provider: &P) -> Result<&dyn Servers<P::Instance>, String> {
    provider.servers().ok_or_else(|| "this provider runs no servers".to_owned())
}

/// Lets a server continue when vimg ends.
pub(super) fn leave<P: Provider>(provider: &P, server: Guest<P::Instance>) {
    if let Some(servers) = provider.servers() {
        servers.leave(server.close());
    }
}

/// Whether a server runs.
pub async fn runs<P: Provider>(provider: &P, dir: &Path) -> bool {
    let Some(servers) = provider.servers() else { return false };
    match servers.find(dir).await {
        Ok(Some(instance)) => {
            servers.leave(instance);
            true
        }
        // It does not answer, but it runs.
        Err(_) => true,
        Ok(None) => false,
    }
}

//! The start of a conversation.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use vimg_agent::protocol::{self, FromAgent};

use super::channel::{Session, SessionError, unexpected};

/// How long a machine may take from its start to the end of its boot.
const BOOT: Duration = Duration::from_secs(900);

/// How long an agent may take to answer if it need not wait for a boot.
const AWAKE: Duration = Duration::from_secs(120);

/// The most stale data in the channel before the agent's answer, in bytes.
const STALE: usize = 16 << 20;

impl<C: AsyncRead + AsyncWrite + Unpin + Send> Session<C> {
    /// Does the handshake and waits until the machine has booted, or only for
    /// the agent if `booting` is false. Returns the units that failed to start.
    pub(crate) async fn ready(&mut self, booting: bool) -> Result<Vec<String>, SessionError> {
        let patience = if booting { BOOT } else { AWAKE };
        tokio::time::timeout(patience, async {
            self.sync().await?;
            match self.message().await? {
                FromAgent::Hello { protocol: protocol::PROTOCOL, behaviour: protocol::BEHAVIOUR, .. } => {}
                // Only the agent of an imported disk, or of a server that an
                // older vimg has started, is not this program's own.
                FromAgent::Hello { protocol, behaviour, .. } => {
                    return Err(SessionError::Broken(format!(
                        "the agent in the machine has the versions {protocol}.{behaviour}, this vimg has \
                         {}.{}; switch a server off and start it again, or build an imported disk again",
                        protocol::PROTOCOL,
                        protocol::BEHAVIOUR
                    )));
                }
                other => return Err(unexpected(&other)),
            }
            match self.message().await? {
                FromAgent::Ready { failed_units } => Ok(failed_units),
                other => Err(unexpected(&other)),
            }
        })
        .await
        .unwrap_or(Err(SessionError::Silent(patience)))
    }

    /// Sends a nonce and reads until it comes back. All data before it belongs
    /// to an earlier conversation.
    async fn sync(&mut self) -> Result<(), SessionError> {
        let nonce = RandomState::new().build_hasher().finish().to_le_bytes();
        let call = [protocol::SYNC.as_slice(), &nonce].concat();
        self.put(&call).await?;
        let mut seen: Vec<u8> = Vec::new();
        let mut total = 0;
        loop {
            let mut byte = [0; 1];
            // Read byte by byte, because the first frame follows the nonce.
            if self.channel.read(&mut byte).await? == 0 {
                return Err(SessionError::Broken("the channel closed".into()));
            }
            seen.push(byte[0]);
            total += 1;
            if seen.ends_with(&call) {
                return Ok(());
            }
            if seen.len() > 4096 {
                seen.drain(..2048);
            }
            if total > STALE {
                return Err(SessionError::Broken("the channel is full of noise".into()));
            }
        }
    }
}

//! The channel itself: frames and messages, with a limit on every wait.

use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use vimg_agent::protocol::{self, Frame, FromAgent, Malformed, ToAgent};

/// After so much silence, the agent has died or its machine hangs. It sends a
/// heartbeat every five seconds, but an emulated machine may be slow.
const SILENCE: Duration = Duration::from_secs(180);

/// How long stopping services and cleaning up, or sending a kernel or a list,
/// may take.
pub(super) const SEAL: Duration = Duration::from_secs(1800);

/// How long a step may take beyond the time limit of its script.
pub(super) const STEP: Duration = Duration::from_secs(2 * 3600);

/// Why a conversation ended.
#[derive(Debug)]
pub(crate) enum SessionError {
    /// The channel broke, or the agent sent something invalid.
    Broken(String),
    /// The agent sent nothing for too long.
    Silent(Duration),
    /// The agent is alive, but does not finish.
    Endless(Duration),
    /// A step failed.
    Step { step: usize, message: String, layer: Option<String> },
    /// The agent refused the request.
    Refused(String),
}

impl From<std::io::Error> for SessionError {
    fn from(error: std::io::Error) -> Self {
        Self::Broken(error.to_string())
    }
}

impl From<Malformed> for SessionError {
    fn from(malformed: Malformed) -> Self {
        Self::Broken(format!("the agent sent {}", malformed.0))
    }
}

/// A conversation with an agent.
pub(crate) struct Session<C> {
    pub(super) channel: C,
}

impl<C: AsyncRead + AsyncWrite + Unpin + Send> Session<C> {
    pub(crate) fn new(channel: C) -> Self {
        Self { channel }
    }

    pub(super) async fn expect(&mut self, wanted: &FromAgent, time: Duration) -> Result<(), SessionError> {
        let message = self.answer(time).await?;
        if message == *wanted { Ok(()) } else { Err(unexpected(&message)) }
    }

    /// Waits for the answer to a request; a refusal is an error.
    pub(super) async fn answer(&mut self, time: Duration) -> Result<FromAgent, SessionError> {
        let message = tokio::time::timeout(time, self.message()).await;
        match message.unwrap_or(Err(SessionError::Endless(time)))? {
            FromAgent::Refused { message } => Err(SessionError::Refused(message)),
            message => Ok(message),
        }
    }

    pub(super) async fn send(&mut self, message: &ToAgent) -> Result<(), SessionError> {
        send(&mut self.channel, message).await
    }

    pub(super) async fn put(&mut self, bytes: &[u8]) -> Result<(), SessionError> {
        put(&mut self.channel, bytes).await
    }

    pub(super) async fn message(&mut self) -> Result<FromAgent, SessionError> {
        message(&mut self.channel).await
    }

    pub(super) async fn frame(&mut self) -> Result<Frame, SessionError> {
        frame(&mut self.channel).await
    }
}

async fn send(channel: &mut (impl AsyncWrite + Unpin), message: &ToAgent) -> Result<(), SessionError> {
    let bytes = protocol::encode_message(message).map_err(|_| {
        SessionError::Broken(
            "the layer has more steps than fit into one message; split its configuration".into(),
        )
    })?;
    put(channel, &bytes).await
}

/// Writes bytes. Gives up if the machine does not read for too long.
async fn put(channel: &mut (impl AsyncWrite + Unpin), bytes: &[u8]) -> Result<(), SessionError> {
    match tokio::time::timeout(SILENCE, channel.write_all(bytes)).await {
        Ok(written) => Ok(written?),
        Err(_) => Err(SessionError::Silent(SILENCE)),
    }
}

/// Returns the next message that is not a heartbeat.
pub(super) async fn message(channel: &mut (impl AsyncRead + Unpin)) -> Result<FromAgent, SessionError> {
    loop {
        match frame(channel).await?.message()? {
            FromAgent::Heartbeat => {}
            message => return Ok(message),
        }
    }
}

pub(super) async fn frame(channel: &mut (impl AsyncRead + Unpin)) -> Result<Frame, SessionError> {
    tokio::time::timeout(SILENCE, async {
        let mut header = [0; 4];
        channel.read_exact(&mut header).await?;
        let mut body = vec![0; Frame::length(header)?];
        channel.read_exact(&mut body).await?;
        Ok(Frame::from_body(body)?)
    })
    .await
    .unwrap_or(Err(SessionError::Silent(SILENCE)))
}

pub(super) fn unexpected(message: &FromAgent) -> SessionError {
    let text = serde_json::to_string(message).unwrap_or_default();
    let short: String = text.chars().take(80).collect();
    SessionError::Broken(format!("the agent sent an unexpected message: {short}"))
}

//! The monitor protocol: requests with answers, and events. Protocol: QEMU's
//! `docs/interop/qmp-spec.txt`.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::OwnedWriteHalf;
use tokio::sync::{mpsc, oneshot};

use crate::host::HostError;

/// Maximum length of a line, in bytes; the answers here are short.
const MAX_LINE: u64 = 1 << 20;
/// Timeout of a command.
const PATIENCE: Duration = Duration::from_secs(60);

type Waiting = Arc<Mutex<HashMap<u64, oneshot::Sender<Result<Value, String>>>>>;

/// A connection to a monitor.
pub(super) struct Qmp {
    out: OwnedWriteHalf,
    waiting: Waiting,
    next: u64,
}

impl Qmp {
    /// Does the handshake. Events named in `wanted` are sent to the receiver,
    /// and dropped if it is full.
    pub(super) async fn new(
        stream: UnixStream,
        wanted: &'static [&'static str],
    ) -> Result<(Self, mpsc::Receiver<Value>), HostError> {
        let (read, out) = stream.into_split();
        let waiting = Waiting::default();
        let (sender, events) = mpsc::channel(64);
        let answers = waiting.clone();
        tokio::spawn(async move {
            let mut reader = BufReader::new(read);
            loop {
                let mut line = Vec::new();
                match (&mut reader).take(MAX_LINE).read_until(b'\n', &mut line).await {
                    Ok(n) if n > 0 && line.ends_with(b"\n") => {}
                    _ => break,
                }
                let Ok(message) = serde_json::from_slice::<Value>(&line) else { break };
                if let Some(event) = message["event"].as_str() {
                    if wanted.contains(&event) {
                        let _ = sender.try_send(message);
                    }
                    continue;
                }
                let Some(id) = message["id"].as_u64() else { continue };
                let answer = match message.get("return") {
                    Some(value) => Ok(value.clone()),
                    None => Err(message["error"]["desc"].as_str().unwrap_or("unknown error").to_owned()),
                };
                let waiter = answers.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
                if let Some(waiter) = waiter {
                    let _ = waiter.send(answer);
                }
            }
            // Fails all commands that still wait.
            answers.lock().unwrap_or_else(PoisonError::into_inner).clear();
        });
        let mut qmp = Self { out, waiting, next: 0 };
        qmp.execute("qmp_capabilities", json!({})).await?;
        Ok((qmp, events))
    }

    /// Sends a command and waits for its answer.
    pub(super) async fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, HostError> {
        let id = self.next;
        self.next += 1;
        let (sender, receiver) = oneshot::channel();
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).insert(id, sender);
        let mut line = json!({ "execute": command, "arguments": arguments, "id": id }).to_string();
        line.push('\n');
        let gone = || HostError::new(format!("QEMU ended during `{command}`"));
        self.out.write_all(line.as_bytes()).await.map_err(|_| gone())?;
        match tokio::time::timeout(PATIENCE, receiver).await {
            Ok(Ok(Ok(value))) => Ok(value),
            Ok(Ok(Err(error))) => Err(HostError::new(format!("QEMU refused `{command}`: {error}"))),
            Ok(Err(_)) => Err(gone()),
            Err(_) => Err(HostError::new(format!("QEMU did not answer `{command}`"))),
        }
    }
}

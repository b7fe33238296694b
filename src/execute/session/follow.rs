//! Layers and checks: their steps, and the blobs, secrets and network that a
//! step may have.

use std::io::Read;
use std::path::PathBuf;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use vimg_agent::protocol::{self, Apply, Digest, FromAgent, Order, Probe, ToAgent};

use super::channel::{STEP, Session, SessionError, unexpected};
use crate::host::network::WayOut;

/// The blobs and secrets that a machine may fetch.
pub(crate) trait Blobs: Sync {
    /// The file or the bytes of a blob that the machine may have.
    fn get(&self, digest: &Digest) -> Option<Source>;

    /// A secret that the machine may have.
    fn secret(&self, name: &str) -> Option<std::sync::Arc<[u8]>>;
}

/// A blob.
#[derive(Clone)]
pub(crate) enum Source {
    Bytes(std::sync::Arc<[u8]>),
    File(PathBuf),
}

/// What a layer reports while it is applied.
pub(crate) enum Progress<'a> {
    Started(usize),
    Output(&'a str),
    Finished { step: usize, changed: bool },
}

/// How far a layer is applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Applied {
    /// Whether the machine now boots other files.
    pub(crate) boot_changed: bool,
    /// The step to continue with after the next boot; `None` at the layer's
    /// end.
    pub(crate) next: Option<usize>,
}

/// For requests without blobs.
struct NoBlobs;

impl Blobs for NoBlobs {
    fn get(&self, _: &Digest) -> Option<Source> {
        None
    }

    fn secret(&self, _: &str) -> Option<std::sync::Arc<[u8]>> {
        None
    }
}

impl<C: AsyncRead + AsyncWrite + Unpin + Send> Session<C> {
    /// Applies a layer from the step `from` up to its end, or to the next step
    /// `reboot`.
    pub(crate) async fn apply(
        &mut self,
        what: &Apply,
        blobs: &dyn Blobs,
        way_out: &WayOut,
        progress: impl FnMut(Progress),
    ) -> Result<Applied, SessionError> {
        let Apply { steps, from, .. } = what;
        self.send(&ToAgent::Apply(what.clone())).await?;
        let times: Vec<u64> = steps.iter().map(Order::time_limit).collect();
        let networked: Vec<bool> = steps.iter().map(Order::wants_network).collect();
        match self.follow(&times, &networked, blobs, way_out, progress).await? {
            FromAgent::Done { boot_changed } => Ok(Applied { boot_changed, next: None }),
            // Accept only a reboot that the layer contains, and each only once.
            FromAgent::RebootDue { step, boot_changed }
                if step >= *from && steps.get(step).is_some_and(Order::is_reboot) =>
            {
                Ok(Applied { boot_changed, next: Some(step + 1) })
            }
            other => Err(unexpected(&other)),
        }
    }

    /// Runs the probes of a check in the machine.
    pub(crate) async fn check(
        &mut self,
        probes: &[Probe],
        variables: &[(String, String)],
        progress: impl FnMut(Progress),
    ) -> Result<(), SessionError> {
        self.send(&ToAgent::Check { probes: probes.to_vec(), variables: variables.to_vec() }).await?;
        let times: Vec<u64> = probes.iter().map(Probe::time_limit).collect();
        match self.follow(&times, &[], &NoBlobs, &WayOut::default(), progress).await? {
            FromAgent::Passed => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// Follows steps up to the message that ends them. `times` has the time
    /// limit of each step in seconds, and `networked` whether it may use the
    /// network.
    async fn follow(
        &mut self,
        times: &[u64],
        networked: &[bool],
        blobs: &dyn Blobs,
        way_out: &WayOut,
        mut progress: impl FnMut(Progress),
    ) -> Result<FromAgent, SessionError> {
        let mut deadline = tokio::time::Instant::now() + STEP;
        let mut next = 0_usize;
        loop {
            // An agent may send heartbeats while its work hangs.
            let message = tokio::time::timeout_at(deadline, self.message())
                .await
                .unwrap_or(Err(SessionError::Endless(STEP)))?;
            match message {
                FromAgent::Fetch { digests } => self.serve(&digests, blobs).await?,
                FromAgent::FetchSecret { name } => {
                    let secret = blobs.secret(&name).ok_or_else(|| {
                        SessionError::Broken("the agent asked for a secret that it was not offered".into())
                    })?;
                    for chunk in secret.chunks(protocol::CHUNK) {
                        self.put(&protocol::encode_data(chunk)?).await?;
                    }
                    self.put(&protocol::encode_data(&[])?).await?;
                }
                FromAgent::Network { open } => {
                    // A hostile guest may send messages in the agent's name.
                    let allowed = next.checked_sub(1).and_then(|step| networked.get(step)) == Some(&true);
                    if open && !allowed {
                        let why = "the agent asked for a network that its step may not use";
                        return Err(SessionError::Broken(why.into()));
                    }
                    let set = way_out.set(open).await;
                    set.map_err(|e| SessionError::Broken(format!("the network can't be opened: {e}")))?;
                    self.send(&ToAgent::Network { variables: way_out.variables.clone() }).await?;
                }
                // Steps come in order, and none gets its time twice.
                FromAgent::Started { step } if (next..times.len()).contains(&step) => {
                    next = step + 1;
                    deadline = tokio::time::Instant::now() + STEP + Duration::from_secs(times[step]);
                    progress(Progress::Started(step));
                }
                FromAgent::Output { text, .. } => progress(Progress::Output(&text)),
                FromAgent::Finished { step, changed } if step < times.len() => {
                    progress(Progress::Finished { step, changed });
                }
                FromAgent::Refused { message } => return Err(SessionError::Refused(message)),
                FromAgent::Failed { step, message, layer, .. } => {
                    let step = step.min(times.len().saturating_sub(1));
                    return Err(SessionError::Step { step, message, layer });
                }
                last => return Ok(last),
            }
        }
    }

    /// Sends blobs to the agent.
    async fn serve(&mut self, digests: &[Digest], blobs: &dyn Blobs) -> Result<(), SessionError> {
        for digest in digests {
            let source = blobs.get(digest).ok_or_else(|| {
                SessionError::Broken("the agent asked for a file that it was not offered".into())
            })?;
            match source {
                Source::Bytes(bytes) => {
                    if bytes.is_empty() {
                        self.put(&protocol::encode_data(&[])?).await?;
                    }
                    for chunk in bytes.chunks(protocol::CHUNK) {
                        self.put(&protocol::encode_data(chunk)?).await?;
                    }
                }
                Source::File(path) => {
                    let mut file = std::fs::File::open(&path)
                        .map_err(|e| SessionError::Broken(format!("{}: {e}", path.display())))?;
                    let mut buffer = vec![0; protocol::CHUNK];
                    let mut first = true;
                    loop {
                        // A quarter of a megabyte from the page cache blocks
                        // for less than a switch of threads would take.
                        let n = file.read(&mut buffer)?;
                        if n == 0 && !first {
                            break;
                        }
                        self.put(&protocol::encode_data(&buffer[..n])?).await?;
                        if n == 0 {
                            break;
                        }
                        first = false;
                    }
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use vimg_agent::protocol::Primitive;

    use super::*;

    /// Applies a layer with an agent that sends these bytes after the
    /// handshake.
    async fn against(hostile: Vec<u8>) -> Result<Applied, SessionError> {
        let (host, mut guest) = tokio::io::duplex(1 << 16);
        let agent = tokio::spawn(async move {
            let mut call = [0; 24];
            guest.read_exact(&mut call).await.unwrap();
            guest.write_all(b"stale bytes \xff\xff\xff\xff of another time").await.unwrap();
            guest.write_all(&call).await.unwrap();
            let hello = FromAgent::Hello {
                protocol: protocol::PROTOCOL,
                behaviour: protocol::BEHAVIOUR,
                boot_id: "x".into(),
            };
            guest.write_all(&protocol::encode_message(&hello).unwrap()).await.unwrap();
            let ready = FromAgent::Ready { failed_units: vec![] };
            guest.write_all(&protocol::encode_message(&ready).unwrap()).await.unwrap();
            let _ = guest.write_all(&hostile).await;
            // Read whatever the host sends, so that it never blocks.
            let _ = tokio::io::copy(&mut guest, &mut tokio::io::sink()).await;
        });
        let mut session = Session::new(host);
        session.ready(true).await?;
        let link = Primitive::Symlink { path: "/a".into(), target: "b".into() };
        let what = Apply {
            layer: Some("x".into()),
            steps: vec![Order::Make(link)],
            from: 0,
            offline: false,
            durable: false,
            host: None,
        };
        let result = session.apply(&what, &NoBlobs, &WayOut::default(), |_| {}).await;
        drop(session);
        agent.await.unwrap();
        result
    }

    fn message(message: &FromAgent) -> Vec<u8> {
        protocol::encode_message(message).unwrap()
    }

    #[tokio::test]
    async fn stale_bytes_are_dropped_and_good_answers_taken() {
        let answer =
            [message(&FromAgent::Heartbeat), message(&FromAgent::Done { boot_changed: true })].concat();
        assert_eq!(against(answer).await.unwrap(), Applied { boot_changed: true, next: None });
    }

    #[tokio::test]
    async fn hostile_answers_end_the_conversation() {
        let cases: Vec<Vec<u8>> = vec![
            u32::MAX.to_le_bytes().to_vec(),
            0_u32.to_le_bytes().to_vec(),
            vec![2, 0, 0, 0, 0, b'{'],
            vec![2, 0, 0, 0, 7, 7],
            protocol::encode_data(b"x").unwrap(),
            message(&FromAgent::Frozen),
            message(&FromAgent::Started { step: 5 }),
            // A step must not get its time twice.
            [message(&FromAgent::Started { step: 0 }), message(&FromAgent::Started { step: 0 })].concat(),
            message(&FromAgent::RebootDue { step: 0, boot_changed: false }),
            message(&FromAgent::Fetch { digests: vec![Digest::of(b"/etc/shadow")] }),
            message(&FromAgent::FetchSecret { name: "token".into() }),
            // The network outside of a step, and in a step that may not use it.
            message(&FromAgent::Network { open: true }),
            [message(&FromAgent::Started { step: 0 }), message(&FromAgent::Network { open: true })].concat(),
        ];
        for case in cases {
            let result = against(case.clone()).await;
            assert!(matches!(result, Err(SessionError::Broken(_))), "{case:?}: {result:?}");
        }
    }

    #[tokio::test]
    async fn a_failed_step_is_named_within_bounds() {
        let failed = FromAgent::Failed { step: 99, message: "no".into(), exit: Some(3), layer: None };
        let result = against(message(&failed)).await;
        assert!(matches!(result, Err(SessionError::Step { step: 0, .. })), "{result:?}");
    }
}

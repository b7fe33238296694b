//! The host's end of the channel to an agent: handshake, requests, blobs. Every
//! byte from the machine may be hostile.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;
use vimg_agent::protocol::{
    self, Apply, Digest, Exec, Frame, FromAgent, Listed, Malformed, Network, Order, Prepare, Probe, Resume,
    Size, Stream, ToAgent,
};

use crate::disk::ext4::Altered;
use crate::host::network::WayOut;

/// After so much silence, the agent has died or its machine hangs. It sends a
/// heartbeat every five seconds, but an emulated machine may be slow.
const SILENCE: Duration = Duration::from_secs(180);
/// How long a machine may take from its start to the end of its boot.
const BOOT: Duration = Duration::from_secs(900);
/// How long an agent may take to answer if it need not wait for a boot.
const AWAKE: Duration = Duration::from_secs(120);
/// How long it may take to freeze a filesystem, or to send a kernel.
const REST: Duration = Duration::from_secs(600);
/// How long stopping services and cleaning up may take.
const SEAL: Duration = Duration::from_secs(1800);
/// How long a step may take beyond the time limit of its script.
const STEP: Duration = Duration::from_secs(2 * 3600);
/// The most stale data in the channel before the agent's answer, in bytes.
const STALE: usize = 16 << 20;
/// The largest kernel or initrd that a machine may send, in bytes.
const MAX_BOOT_FILE: u64 = 512 << 20;

/// The longest list that a machine may send, in bytes: about a million files.
const MAX_LIST: usize = 256 << 20;

/// Input of a person.
#[derive(Debug)]
pub enum Input {
    /// Typed, or from a file.
    Bytes(Vec<u8>),
    /// The end of the input.
    End,
    /// A new size of the terminal.
    Resize(Size),
}

/// How a program ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// With a code.
    Code(i32),
    /// By a signal.
    Signal(i32),
}

/// Why a conversation ended.
#[derive(Debug)]
pub(super) enum SessionError {
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

/// The blobs and secrets that a machine may fetch.
pub(super) trait Blobs: Sync {
    /// The file or the bytes of a blob that the machine may have.
    fn get(&self, digest: &Digest) -> Option<Source>;

    /// A secret that the machine may have.
    fn secret(&self, name: &str) -> Option<std::sync::Arc<[u8]>>;
}

/// A blob.
#[derive(Clone)]
pub(super) enum Source {
    Bytes(std::sync::Arc<[u8]>),
    File(PathBuf),
}

/// What a layer reports while it is applied.
pub(super) enum Progress<'a> {
    Started(usize),
    Output(&'a str),
    Finished { step: usize, changed: bool },
}

/// How far a layer is applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Applied {
    /// Whether the machine now boots other files.
    pub(super) boot_changed: bool,
    /// The step to continue with after the next boot; `None` at the layer's
    /// end.
    pub(super) next: Option<usize>,
}

/// A conversation with an agent.
pub(super) struct Session<C> {
    channel: C,
}

impl<C: AsyncRead + AsyncWrite + Unpin + Send> Session<C> {
    pub(super) fn new(channel: C) -> Self {
        Self { channel }
    }

    /// Does the handshake and waits until the machine has booted, or only for
    /// the agent if `booting` is false. Returns the units that failed to start.
    pub(super) async fn ready(&mut self, booting: bool) -> Result<Vec<String>, SessionError> {
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

    /// Has the agent of an appliance or a container mount the machine's disk.
    pub(super) async fn prepare(&mut self, network: Option<Network>) -> Result<(), SessionError> {
        let resume = resume_data()?;
        self.send(&ToAgent::Prepare(Prepare { resume, network })).await?;
        self.expect(&FromAgent::Prepared, REST).await
    }

    /// Resumes a fork: gives it the time, and randomness of its own.
    pub(super) async fn resume(&mut self) -> Result<(), SessionError> {
        self.send(&ToAgent::Resume(resume_data()?)).await?;
        self.expect(&FromAgent::Resumed, REST).await
    }

    /// Retargets a fork to another disk: resumes it and writes the changed
    /// files in it.
    pub(super) async fn retarget(&mut self, altered: &[Altered]) -> Result<(), SessionError> {
        let changes = altered.iter().map(|a| a.change.clone()).collect();
        self.send(&ToAgent::Retarget { resume: resume_data()?, changes }).await?;
        for content in altered.iter().filter_map(|a| a.content.as_ref()) {
            for chunk in content.chunks(protocol::CHUNK) {
                self.put(&protocol::encode_data(chunk)?).await?;
            }
        }
        self.expect(&FromAgent::Retargeted, REST).await
    }

    /// Has a fork rehearse to be retargeted, without changing anything.
    pub(super) async fn rehearse(&mut self, altered: &[Altered]) -> Result<(), SessionError> {
        let changes = altered.iter().map(|a| a.change.clone()).collect();
        self.send(&ToAgent::Rehearse { changes }).await?;
        self.expect(&FromAgent::Rehearsed, REST).await
    }

    /// Applies a layer from the step `from` up to its end, or to the next step
    /// `reboot`.
    pub(super) async fn apply(
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

    /// Has the machine stop its services and switch itself off.
    pub(super) async fn switch_off(&mut self) -> Result<(), SessionError> {
        self.send(&ToAgent::SwitchOff).await?;
        self.expect(&FromAgent::GoingOff, REST).await
    }

    /// Runs the probes of a check in the machine.
    pub(super) async fn check(
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

    /// Runs a program for a person until it ends.
    pub(super) async fn exec(
        &mut self,
        exec: Exec,
        mut input: mpsc::Receiver<Input>,
        output: &mut (impl FnMut(Stream, &[u8]) + Send),
    ) -> Result<Ended, SessionError> {
        self.send(&ToAgent::Exec(exec)).await?;
        // Read and write at the same time. Neither half is ever stopped in the
        // middle of a frame.
        let (mut from, mut to) = tokio::io::split(&mut self.channel);
        let write = async {
            while let Some(said) = input.recv().await {
                match said {
                    Input::Bytes(bytes) => {
                        // There is no time limit here: a program need not read its
                        // input. The other half notices a dead machine.
                        for chunk in bytes.chunks(protocol::CHUNK) {
                            to.write_all(&protocol::encode_data(chunk)?).await?;
                        }
                    }
                    Input::End => to.write_all(&protocol::encode_message(&ToAgent::EndInput)?).await?,
                    Input::Resize(size) => {
                        to.write_all(&protocol::encode_message(&ToAgent::Resize(size))?).await?;
                    }
                }
            }
            // The input has ended, but the program continues.
            std::future::pending::<Result<Ended, SessionError>>().await
        };
        let read = async {
            loop {
                match message(&mut from).await? {
                    FromAgent::Wrote(stream) => match frame(&mut from).await? {
                        Frame::Data(bytes) => output(stream, &bytes),
                        Frame::Message(_) => return Err(SessionError::Broken("output without data".into())),
                    },
                    FromAgent::Exited { code: Some(code), .. } => return Ok(Ended::Code(code)),
                    FromAgent::Exited { signal, .. } => return Ok(Ended::Signal(signal.unwrap_or(0))),
                    FromAgent::Refused { message } => return Err(SessionError::Refused(message)),
                    other => return Err(unexpected(&other)),
                }
            }
        };
        tokio::select! {
            ended = read => ended,
            broken = write => broken,
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

    /// Has a booted machine get ready for a memory snapshot.
    pub(super) async fn prepare_snapshot(&mut self) -> Result<(), SessionError> {
        self.send(&ToAgent::PrepareSnapshot).await?;
        self.expect(&FromAgent::SnapshotReady, REST).await
    }

    /// Freezes the machine's filesystem: all writes wait.
    pub(super) async fn freeze(&mut self) -> Result<(), SessionError> {
        self.send(&ToAgent::Freeze).await?;
        self.expect(&FromAgent::Frozen, REST).await
    }

    /// Lets the writes of a frozen filesystem continue.
    pub(super) async fn thaw(&mut self) -> Result<(), SessionError> {
        self.send(&ToAgent::Thaw).await?;
        self.expect(&FromAgent::Thawed, REST).await
    }

    /// Removes what two machines must not share.
    pub(super) async fn seal(&mut self) -> Result<(), SessionError> {
        self.send(&ToAgent::Seal).await?;
        self.expect(&FromAgent::Sealed, SEAL).await
    }

    /// Fetches the kernel and the initrd that the machine would boot.
    pub(super) async fn boot_files(&mut self, to: [&Path; 2]) -> Result<(), SessionError> {
        tokio::time::timeout(SEAL, self.fetch_boot_files(to))
            .await
            .unwrap_or(Err(SessionError::Endless(SEAL)))
    }

    async fn fetch_boot_files(&mut self, to: [&Path; 2]) -> Result<(), SessionError> {
        self.send(&ToAgent::SendBootFiles).await?;
        for path in to {
            let mut file = std::fs::File::create(path)?;
            let mut left = MAX_BOOT_FILE;
            loop {
                let data = loop {
                    match self.frame().await? {
                        Frame::Data(data) => break data,
                        // Heartbeats may come in between.
                        message => match message.message::<FromAgent>()? {
                            FromAgent::Heartbeat => {}
                            FromAgent::Refused { message } => return Err(SessionError::Refused(message)),
                            other => return Err(unexpected(&other)),
                        },
                    }
                };
                if data.is_empty() {
                    break;
                }
                left = left.checked_sub(data.len() as u64).ok_or_else(|| {
                    SessionError::Broken("the machine's kernel is larger than 512 MiB".into())
                })?;
                std::io::Write::write_all(&mut file, &data)?;
            }
        }
        Ok(())
    }

    /// Asks for the lists of packages and files on the disk.
    pub(super) async fn list(&mut self) -> Result<(String, Vec<Listed>), SessionError> {
        // An agent may send heartbeats and never finish.
        tokio::time::timeout(SEAL, self.list_all()).await.unwrap_or(Err(SessionError::Endless(SEAL)))
    }

    async fn list_all(&mut self) -> Result<(String, Vec<Listed>), SessionError> {
        self.send(&ToAgent::List).await?;
        let packages = self.data(MAX_LIST).await?;
        let packages = String::from_utf8_lossy(&packages).into_owned();
        let lines = self.data(MAX_LIST).await?;
        let parse = |line: &[u8]| {
            serde_json::from_slice::<Listed>(line)
                .map_err(|e| SessionError::Broken(format!("the agent sent an invalid list of files: {e}")))
        };
        let lines = lines.split(|b| *b == b'\n').filter(|line| !line.is_empty());
        Ok((packages, lines.map(parse).collect::<Result<_, _>>()?))
    }

    /// Asks for digests of files.
    pub(super) async fn digests(&mut self, paths: &[String]) -> Result<Vec<Option<Digest>>, SessionError> {
        self.send(&ToAgent::Digests { paths: paths.to_vec() }).await?;
        let answer =
            tokio::time::timeout(STEP, self.message()).await.unwrap_or(Err(SessionError::Endless(STEP)))?;
        match answer {
            FromAgent::Digests { digests } if digests.len() == paths.len() => Ok(digests),
            other => Err(unexpected(&other)),
        }
    }

    /// Reads frames of data up to an empty one, at most `most` bytes in all.
    async fn data(&mut self, most: usize) -> Result<Vec<u8>, SessionError> {
        let mut all = Vec::new();
        loop {
            match self.frame().await? {
                Frame::Data(data) if data.is_empty() => return Ok(all),
                Frame::Data(data) if all.len() + data.len() > most => {
                    return Err(SessionError::Broken(format!("the agent sent more than {} MiB", most >> 20)));
                }
                Frame::Data(data) => all.extend(data),
                // Heartbeats may come in between.
                message => match message.message::<FromAgent>()? {
                    FromAgent::Heartbeat => {}
                    FromAgent::Refused { message } => return Err(SessionError::Refused(message)),
                    other => return Err(unexpected(&other)),
                },
            }
        }
    }

    async fn expect(&mut self, wanted: &FromAgent, time: Duration) -> Result<(), SessionError> {
        let message =
            tokio::time::timeout(time, self.message()).await.unwrap_or(Err(SessionError::Endless(time)))?;
        match message {
            FromAgent::Refused { message } => Err(SessionError::Refused(message)),
            message if message == *wanted => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    async fn send(&mut self, message: &ToAgent) -> Result<(), SessionError> {
        send(&mut self.channel, message).await
    }

    async fn put(&mut self, bytes: &[u8]) -> Result<(), SessionError> {
        put(&mut self.channel, bytes).await
    }

    async fn message(&mut self) -> Result<FromAgent, SessionError> {
        message(&mut self.channel).await
    }

    async fn frame(&mut self) -> Result<Frame, SessionError> {
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
async fn message(channel: &mut (impl AsyncRead + Unpin)) -> Result<FromAgent, SessionError> {
    loop {
        match frame(channel).await?.message()? {
            FromAgent::Heartbeat => {}
            message => return Ok(message),
        }
    }
}

async fn frame(channel: &mut (impl AsyncRead + Unpin)) -> Result<Frame, SessionError> {
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

/// Returns what a fork needs of its own: the time, and randomness.
fn resume_data() -> Result<Resume, SessionError> {
    let time = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64);
    let mut seed = Vec::new();
    std::fs::File::open("/dev/urandom")?.take(64).read_to_end(&mut seed)?;
    Ok(Resume { time, seed })
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

fn unexpected(message: &FromAgent) -> SessionError {
    let text = serde_json::to_string(message).unwrap_or_default();
    let short: String = text.chars().take(80).collect();
    SessionError::Broken(format!("the agent sent an unexpected message: {short}"))
}

#[cfg(test)]
mod tests {
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

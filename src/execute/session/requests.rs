//! Requests that have a short answer.

use std::io::Read;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::io::{AsyncRead, AsyncWrite};
use vimg_agent::protocol::{self, FromAgent, Network, Prepare, Resume, Sealed, ToAgent};

use super::channel::{SEAL, Session, SessionError, unexpected};
use crate::disk::ext4::Altered;

/// How long a request with a short answer may take.
const REST: Duration = Duration::from_secs(600);

impl<C: AsyncRead + AsyncWrite + Unpin + Send> Session<C> {
    /// Has the agent of an appliance or a container mount the machine's disk.
    pub(crate) async fn prepare(&mut self, network: Option<Network>) -> Result<(), SessionError> {
        let resume = resume_data()?;
        self.send(&ToAgent::Prepare(Prepare { resume, network })).await?;
        self.expect(&FromAgent::Prepared, REST).await
    }

    /// Resumes a fork: gives it the time, and randomness of its own.
    pub(crate) async fn resume(&mut self) -> Result<(), SessionError> {
        self.send(&ToAgent::Resume(resume_data()?)).await?;
        self.expect(&FromAgent::Resumed, REST).await
    }

    /// Retargets a fork to another disk: resumes it and writes the changed
    /// files in it.
    pub(crate) async fn retarget(&mut self, altered: &[Altered]) -> Result<(), SessionError> {
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
    pub(crate) async fn rehearse(&mut self, altered: &[Altered]) -> Result<(), SessionError> {
        let changes = altered.iter().map(|a| a.change.clone()).collect();
        self.send(&ToAgent::Rehearse { changes }).await?;
        self.expect(&FromAgent::Rehearsed, REST).await
    }

    /// Has the machine stop its services and switch itself off.
    pub(crate) async fn switch_off(&mut self) -> Result<(), SessionError> {
        self.send(&ToAgent::SwitchOff).await?;
        self.expect(&FromAgent::GoingOff, REST).await
    }

    /// Has a booted machine get ready for a memory snapshot.
    pub(crate) async fn prepare_snapshot(&mut self) -> Result<(), SessionError> {
        self.send(&ToAgent::PrepareSnapshot).await?;
        self.expect(&FromAgent::SnapshotReady, REST).await
    }

    /// Freezes the machine's filesystem: all writes wait.
    pub(crate) async fn freeze(&mut self) -> Result<(), SessionError> {
        self.send(&ToAgent::Freeze).await?;
        self.expect(&FromAgent::Frozen, REST).await
    }

    /// Lets the writes of a frozen filesystem continue.
    pub(crate) async fn thaw(&mut self) -> Result<(), SessionError> {
        self.send(&ToAgent::Thaw).await?;
        self.expect(&FromAgent::Thawed, REST).await
    }

    /// Removes what two machines must not share, and the agent unless it stays.
    pub(crate) async fn seal(&mut self, agent: bool) -> Result<Sealed, SessionError> {
        self.send(&ToAgent::Seal { agent }).await?;
        match self.answer(SEAL).await? {
            FromAgent::Sealed(sealed) => Ok(sealed),
            other => Err(unexpected(&other)),
        }
    }
}

/// Returns what a fork needs of its own: the time, and randomness.
fn resume_data() -> Result<Resume, SessionError> {
    let time = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64);
    let mut seed = Vec::new();
    std::fs::File::open("/dev/urandom")?.take(64).read_to_end(&mut seed)?;
    Ok(Resume { time, seed })
}

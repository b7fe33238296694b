//! Files and lists that a machine sends.

use std::path::Path;

use tokio::io::{AsyncRead, AsyncWrite};
use vimg_agent::protocol::{Digest, Frame, FromAgent, Listed, ToAgent};

use super::channel::{SEAL, STEP, Session, SessionError, unexpected};

/// The largest kernel or initrd that a machine may send, in bytes.
const MAX_BOOT_FILE: u64 = 512 << 20;

/// The longest list that a machine may send, in bytes: about a million files.
const MAX_LIST: usize = 256 << 20;

impl<C: AsyncRead + AsyncWrite + Unpin + Send> Session<C> {
    /// Fetches the kernel and the initrd that the machine would boot.
    pub(crate) async fn boot_files(&mut self, to: [&Path; 2]) -> Result<(), SessionError> {
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
    pub(crate) async fn list(&mut self) -> Result<(String, Vec<Listed>), SessionError> {
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
    pub(crate) async fn digests(&mut self, paths: &[String]) -> Result<Vec<Option<Digest>>, SessionError> {
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
}

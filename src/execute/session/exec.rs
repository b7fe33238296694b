//! Programs that a person runs in a machine.

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;
use vimg_agent::protocol::{self, Exec, Frame, FromAgent, Size, Stream, ToAgent};

use super::channel::{Session, SessionError, frame, message, unexpected};

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

impl<C: AsyncRead + AsyncWrite + Unpin + Send> Session<C> {
    /// Runs a program for a person until it ends.
    pub(crate) async fn exec(
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
}

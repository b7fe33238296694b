//! An instance and the conversation with its agent, as one thing.

use std::time::Duration;

use super::session::{Session, SessionError};
use crate::provider::{Ended, Instance};

/// How long a machine may take to stop its services and switch itself off.
/// systemd gives a service 90 s before it kills it.
const OFF: Duration = Duration::from_secs(600);

/// Why a guest did not answer.
#[derive(Debug)]
pub(super) enum Stopped {
    /// The conversation failed, or the agent reported a failure.
    Session(SessionError),
    /// The instance ended before the answer.
    Ended(Ended),
}

/// A running instance whose agent listens.
pub(super) struct Guest<I: Instance> {
    pub(super) instance: I,
    session: Session<I::Channel>,
}

impl<I: Instance> Guest<I> {
    /// Opens the conversation with the agent of an instance.
    ///
    /// # Errors
    ///
    /// Returns the instance if it has no port for the agent.
    pub(super) fn connect(mut instance: I) -> Result<Self, I> {
        match instance.channel() {
            Some(channel) => Ok(Self { instance, session: Session::new(channel) }),
            None => Err(instance),
        }
    }

    /// Asks the agent, and watches the instance meanwhile. All questions go
    /// through here, so that the end of a machine is always noticed at once.
    pub(super) async fn ask<T>(
        &mut self,
        question: impl AsyncFnOnce(&mut Session<I::Channel>) -> Result<T, SessionError>,
    ) -> Result<T, Stopped> {
        tokio::select! {
            answer = question(&mut self.session) => answer.map_err(Stopped::Session),
            ended = self.instance.ended() => Err(Stopped::Ended(ended)),
        }
    }

    /// Asks with the end of the machine as the expected answer: stops its
    /// services, switches it off, and waits until its program has written
    /// everything and has exited.
    pub(super) async fn switch_off(&mut self) -> Result<(), Stopped> {
        let off = async {
            self.session.switch_off().await.map_err(Stopped::Session)?;
            // First the agent exits, then the machine, then what runs it.
            let mut off = false;
            loop {
                match self.instance.ended().await {
                    Ended::Off => off = true,
                    Ended::AgentGone => {}
                    Ended::Killed(_) if off => return Ok(()),
                    other => return Err(Stopped::Ended(other)),
                }
            }
        };
        let off = tokio::time::timeout(OFF, off).await;
        off.unwrap_or(Err(Stopped::Session(SessionError::Endless(OFF))))
    }

    /// Closes the conversation.
    pub(super) fn close(self) -> I {
        self.instance
    }

    /// Ends the instance.
    pub(super) async fn stop(self) {
        self.instance.stop().await;
    }
}

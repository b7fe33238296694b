//! The hooks of a server: what it runs after a boot and before its removal.

use tokio::sync::mpsc;
use vimg_agent::protocol::{AGENT, Exec, Stream};

use super::super::change::{ServerContext, TAIL};
use super::super::failure::Failure;
use super::super::guest::Guest;
use super::super::log::clean;
use super::super::node_failure::FailureKind;
use super::super::session::Ended;
use super::running::words;
use crate::provider::Provider;

/// How much output of hooks is kept, in bytes.
const SAID: usize = 64 << 10;

/// The start of lines in which the agent itself says what failed.
const AGENT_SAYS: &str = "vimg-agent: ";

/// Runs the hooks of a server's boot.
pub(super) async fn live<P: Provider>(
    server: &ServerContext<'_, P>,
    found: &mut Guest<P::Instance>,
    what: &str,
) -> Result<(), Box<Failure>> {
    server.site.phase("hooks");
    hooks::<P>(found, what, |line| server.site.line(line)).await.map_err(|mut tail| {
        let mut failure = server.failure(FailureKind::Recipe, &tail.pop().unwrap_or_default());
        failure.tail = tail;
        failure
    })
}

/// Has the agent run the hooks of an event. The error is the last output,
/// followed by the reason.
pub(super) async fn hooks<P: Provider>(
    found: &mut Guest<P::Instance>,
    what: &str,
    mut line: impl FnMut(&str) + Send,
) -> Result<(), Vec<String>> {
    let mut said = Vec::new();
    let command = vec![AGENT.to_owned(), what.to_owned()];
    // Hooks get no input.
    let (_, input) = mpsc::channel(1);
    let mut output = |_: Stream, bytes: &[u8]| {
        said.extend_from_slice(bytes);
        said.drain(..said.len().saturating_sub(SAID));
    };
    let exec = Exec { command, terminal: None };
    let ended = found.ask(async |session| session.exec(exec, input, &mut output).await).await.map_err(words);
    let said: Vec<String> = String::from_utf8_lossy(&said).lines().map(clean).collect();
    match ended {
        Ok(Ended::Code(0)) => {
            said.iter().for_each(|text| line(text));
            Ok(())
        }
        Ok(_) => {
            let (why, mut tail): (Vec<String>, Vec<String>) =
                said.into_iter().partition(|text| text.starts_with(AGENT_SAYS));
            tail.drain(..tail.len().saturating_sub(TAIL));
            let why = why.last().and_then(|why| why.strip_prefix(AGENT_SAYS));
            tail.push(why.unwrap_or("a hook failed").to_owned());
            Err(tail)
        }
        Err(why) => Err(vec![why]),
    }
}

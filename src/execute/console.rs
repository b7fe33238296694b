//! Shows a person the serial console of a state's machine, which is thrown away.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;

use super::context::BuildContext;
use super::explain::explain;
use super::failure::{Failure, placed};
use super::guest::Stopped;
use super::node::NodeContext;
use super::node_failure::NodeFailure;
use super::order::NodeOrder;
use super::session::Input;
use super::up::{self, StartOptions};
use crate::graph::NodeId;
use crate::provider::{Ended, Instance, Launch, Provider, Retarget};
use crate::store::DiskKind;

/// The time between two reads of a console.
const LOOK: Duration = Duration::from_millis(30);
/// The key that leaves the console: Ctrl-], as in telnet and `virsh console`.
const LEAVE: u8 = 0x1d;
/// How many keys wait for the machine, in bytes. Later ones are dropped.
const WAITING: usize = 64 << 10;

/// Boots the machine of an existing state and passes on its console output, until
/// the machine is switched off or the person leaves. `listen` gives the person's
/// keys, if there are any.
pub async fn watch<P: Provider>(
    context: &BuildContext<P>,
    id: NodeId,
    listen: impl FnOnce() -> Option<mpsc::Receiver<Input>>,
    mut output: impl FnMut(&[u8]) + Send,
) -> Result<(), Box<Failure>> {
    let worker = context.worker();
    let node = NodeOrder::new(&context.graph, id, &BTreeMap::new());
    let site = NodeContext { worker: &worker, node: &node };
    let at = |failure: Box<NodeFailure>| placed(&context.graph, id, *failure);
    let scratch = site.staging().map_err(at)?;
    let overlay = scratch.path().join(DiskKind::Qcow2.file_name());
    let options = StartOptions::of_person(&node, Retarget::Never);
    let (launch, _) = up::prepare(&site, &options, scratch.path(), &overlay).map_err(at)?;
    // The user wants to see the boot, so do not fork.
    let launch = Launch { memory: None, watched: true, ..launch };
    let mut instance = worker.provider.launch(&launch).await.map_err(|e| at(site.provider_failure(e)))?;
    if let Err(error) = instance.way_out().set(true).await {
        site.notice(&format!("the machine has no network: {error}"));
    }
    // The agent's channel stays open: without it, the agent would wait.
    let _channel = instance.channel();
    let mut keys = Keys { keyboard: instance.keyboard(), input: listen(), waiting: Vec::new() };
    let mut seen = 0;
    let ended = loop {
        let ended = tokio::select! {
            ended = instance.ended() => Some(ended),
            () = keys.pressed() => {
                instance.stop().await;
                return Ok(());
            }
            () = tokio::time::sleep(LOOK) => None,
        };
        let (total, bytes) = instance.console_since(seen);
        seen = total;
        output(&bytes);
        match ended {
            // The agent ends before the machine does.
            Some(Ended::AgentGone) | None => {}
            Some(ended) => break ended,
        }
    };
    // The last output may still be on its way.
    tokio::time::sleep(LOOK).await;
    output(&instance.console_since(seen).1);
    let result = match ended {
        Ended::Off => Ok(()),
        other => Err(at(explain(&site, &mut instance, Stopped::Ended(other), None).await)),
    };
    instance.stop().await;
    result
}

/// The person's keys, on their way to the machine.
struct Keys {
    keyboard: Option<Box<dyn AsyncWrite + Send + Sync + Unpin>>,
    input: Option<mpsc::Receiver<Input>>,
    /// Keys that the machine has not taken yet.
    waiting: Vec<u8>,
}

impl Keys {
    /// Passes keys on until [`LEAVE`]. May be dropped and called again. A machine
    /// that takes no keys does not keep the person from leaving.
    async fn pressed(&mut self) {
        loop {
            let Self { keyboard, input, waiting } = self;
            let next = async {
                match input {
                    Some(input) => input.recv().await,
                    None => std::future::pending().await,
                }
            };
            let write = async {
                match keyboard {
                    Some(keyboard) if !waiting.is_empty() => keyboard.write(waiting).await,
                    _ => std::future::pending().await,
                }
            };
            tokio::select! {
                said = next => match said {
                    Some(Input::Bytes(bytes)) if bytes.contains(&LEAVE) => return,
                    Some(Input::Bytes(bytes)) if self.waiting.len() < WAITING => self.waiting.extend(bytes),
                    Some(_) => {}
                    None => self.input = None,
                },
                written = write => match written {
                    Ok(count) if count > 0 => drop(self.waiting.drain(..count)),
                    _ => self.keyboard = None,
                },
            }
        }
    }
}

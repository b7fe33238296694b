//! A program that a person runs in a fork of a state's machine, which is
//! thrown away.

use std::path::PathBuf;
use std::time::Duration;

use tokio::sync::mpsc;
use vimg_agent::protocol::{Exec, Stream};

use super::context::BuildContext;
use super::explain::explain;
use super::failure::Failure;
use super::guest::Stopped;
use super::log::clean;
use super::node::NodeContext;
use super::session::{Ended, Input, SessionError};
use super::up::{self, Stand};
use crate::graph::NodeId;
use crate::plan::Plan;
use crate::provider::{self, Instance, Launch, Provider, Retarget};
use crate::store::DiskKind;

/// What a shell answers for a command that it can't run.
const NOT_FOUND: i32 = 127;

/// How often a console is looked at.
const LOOK: Duration = Duration::from_millis(30);

/// Runs a program in the machine of a state that is there, or in the machine
/// of `failed`: the disks that a layer left when it failed.
pub async fn interact<P: Provider>(
    context: &BuildContext<P>,
    id: NodeId,
    failed: Option<Vec<PathBuf>>,
    exec: Exec,
    listen: impl FnOnce() -> mpsc::Receiver<Input>,
    mut output: impl FnMut(Stream, &[u8]) + Send,
) -> Result<Ended, Box<Failure>> {
    let shared = context.share(&Plan::default());
    let node = context.graph.node(id);
    let site = NodeContext { shared: &shared, node };
    let scratch = site.staging()?;
    let overlay = scratch.path().join(DiskKind::Qcow2.file_name());
    let stand = Stand { chain: failed, ..Stand::of_person(node, Retarget::Discarded) };
    let mut up = up::up(&site, &stand, scratch.path(), &overlay).await?;
    // Until now Ctrl-C was for us.
    let input = listen();
    let ended = up.guest.ask(async |session| session.exec(exec, input, &mut output).await).await;
    match ended {
        // It could not be started; what there is of it is a name.
        Err(Stopped::Session(SessionError::Refused(why))) => {
            up.guest.stop().await;
            output(Stream::Error, format!("{}\n", clean(&why)).as_bytes());
            Ok(Ended::Code(NOT_FOUND))
        }
        Ok(ended) => {
            up.guest.stop().await;
            Ok(ended)
        }
        Err(trouble) => {
            let failure = explain(&site, &mut up.guest.instance, trouble, None).await;
            up.guest.stop().await;
            Err(failure)
        }
    }
}

/// Boots the machine of a state that is there and passes on what its console
/// says, until it is switched off.
pub async fn watch<P: Provider>(
    context: &BuildContext<P>,
    id: NodeId,
    mut output: impl FnMut(&[u8]) + Send,
) -> Result<(), Box<Failure>> {
    let shared = context.share(&Plan::default());
    let node = context.graph.node(id);
    let site = NodeContext { shared: &shared, node };
    let scratch = site.staging()?;
    let overlay = scratch.path().join(DiskKind::Qcow2.file_name());
    let stand = Stand::of_person(node, Retarget::Never);
    let (launch, _) = up::prepare(&site, &stand, scratch.path(), &overlay)?;
    // It is the boot that is to be seen.
    let launch = Launch { memory: None, ..launch };
    let mut instance = shared.provider.launch(&launch).await.map_err(|e| site.provider_failure(e))?;
    // The agent's stream stays open: without it the agent would wait.
    let _channel = instance.channel();
    let mut seen = 0;
    let ended = loop {
        let ended = tokio::time::timeout(LOOK, instance.ended()).await;
        let (total, bytes) = instance.console_since(seen);
        seen = total;
        output(&bytes);
        match ended {
            // It stops before the machine does.
            Ok(provider::Ended::AgentGone) | Err(_) => {}
            Ok(ended) => break ended,
        }
    };
    // Its last words may still be on their way.
    tokio::time::sleep(LOOK).await;
    output(&instance.console_since(seen).1);
    let result = match ended {
        provider::Ended::Off => Ok(()),
        other => Err(explain(&site, &mut instance, Stopped::Ended(other), None).await),
    };
    instance.stop().await;
    result
}

//! Runs a person's program in a fork of a state's machine, which is thrown
//! away.

use std::collections::BTreeMap;
use std::path::PathBuf;

use tokio::sync::mpsc;
use vimg_agent::protocol::{Exec, Stream};

use super::context::BuildContext;
use super::explain::explain;
use super::failure::{Failure, placed};
use super::guest::Stopped;
use super::log::clean;
use super::node::NodeContext;
use super::node_failure::NodeFailure;
use super::order::NodeOrder;
use super::session::{Ended, Input, SessionError};
use super::up::{self, StartOptions};
use crate::graph::NodeId;
use crate::provider::{Provider, Retarget};
use crate::store::DiskKind;

/// The exit code of a shell for a command that it can't run.
const NOT_FOUND: i32 = 127;

/// What a person's program runs in.
#[derive(Debug, Clone)]
pub enum Door {
    /// The booted machine of a state.
    Machine,
    /// The booted machine of a state, with what a failed layer left on its disk.
    Failed(FailedLayer),
    /// An appliance or a container with the disk of a state. No service runs, and
    /// there is no network.
    Disk,
}

/// The disk that a failed layer left.
#[derive(Debug, Clone)]
pub struct FailedLayer {
    /// The layer's name in the graph.
    pub name: String,
    /// The disk and those below it, the lowest first.
    pub chain: Vec<PathBuf>,
}

/// Runs a program on an existing state, through a door. What it writes is thrown
/// away.
pub async fn interact<P: Provider>(
    context: &BuildContext<P>,
    id: NodeId,
    door: Door,
    exec: Exec,
    listen: impl FnOnce() -> mpsc::Receiver<Input>,
    mut output: impl FnMut(Stream, &[u8]) + Send,
) -> Result<Ended, Box<Failure>> {
    let worker = context.worker();
    let mut node = NodeOrder::new(&context.graph, id, &BTreeMap::new());
    let mut chain = None;
    let is_booted = !matches!(door, Door::Disk);
    if let Door::Failed(failed) = door {
        // People see this name while the machine boots.
        node.name = failed.name;
        chain = Some(failed.chain);
    }
    let site = NodeContext { worker: &worker, node: &node };
    let at = |failure: Box<NodeFailure>| placed(&context.graph, id, *failure);
    let scratch = site.staging().map_err(at)?;
    let overlay = scratch.path().join(DiskKind::Qcow2.file_name());
    let options = match is_booted {
        true => StartOptions { chain, ..StartOptions::of_person(&node, Retarget::Discarded) },
        false => StartOptions::of_disk(&node),
    };
    let mut up = up::up(&site, &options, scratch.path(), &overlay).await.map_err(at)?;
    // Until now, Ctrl-C stopped vimg. From now on, it goes to the program.
    let input = listen();
    let ended = up.guest.ask(async |session| session.exec(exec, input, &mut output).await).await;
    match ended {
        // The program could not be started.
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
            Err(at(failure))
        }
    }
}

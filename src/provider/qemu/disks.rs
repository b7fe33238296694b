//! A chain of disks with one on top that takes the writes, and the switch to a
//! new top. It works under a machine and under `qemu-storage-daemon`.

use std::path::Path;

use serde_json::{Value, json};
use tokio::process::Child;

use super::args;
use super::programs::Programs;
use super::qmp::Qmp;
use crate::disk::qcow2;
use crate::host::HostError;
use crate::host::sockets;
use crate::provider::Launch;

/// The disks of an instance.
pub(in crate::provider) struct Disks {
    programs: Programs,
    size: u64,
    top: String,
    switches: u32,
    /// Whether they belong to a server, which outlives vimg.
    lasting: bool,
}

impl Disks {
    /// Creates the overlay of a launch.
    pub(in crate::provider) async fn new(programs: &Programs, launch: &Launch) -> Result<Self, HostError> {
        let disks = Self::on(programs, launch)?;
        programs.img.create(&launch.overlay, disks.size).await?;
        Ok(disks)
    }

    /// Uses an existing overlay.
    pub(super) fn on(programs: &Programs, launch: &Launch) -> Result<Self, HostError> {
        let parent = launch.chain.last().ok_or_else(|| HostError::new("there is no disk to start from"))?;
        let size = qcow2::read(parent)
            .map_err(|e| HostError::new(format!("{}: {e}", parent.display())))?
            .virtual_size;
        Ok(Self {
            programs: programs.clone(),
            size,
            top: args::TOP.to_owned(),
            switches: 0,
            lasting: launch.lasting.is_some(),
        })
    }

    /// The disks of a running server, from QEMU's answer to `query-block`.
    pub(super) fn found(programs: &Programs, drive: &Value) -> Option<Self> {
        let drive = &drive.as_array()?.first()?["inserted"];
        let top = drive["node-name"].as_str()?.to_owned();
        let switches = top.strip_prefix("top")?.parse().ok()?;
        let size = drive["image"]["virtual-size"].as_u64()?;
        Some(Self { programs: programs.clone(), size, top, switches, lasting: true })
    }

    /// Makes an empty set of disks.
    pub(super) fn none(programs: &Programs) -> Self {
        Self { programs: programs.clone(), size: 0, top: args::TOP.to_owned(), switches: 0, lasting: false }
    }

    /// Whether they belong to a server, which outlives vimg.
    pub(super) fn lasting(&self) -> bool {
        self.lasting
    }

    /// The node that takes the writes.
    pub(in crate::provider) fn top(&self) -> &str {
        &self.top
    }

    /// The graph of nodes, the lowest first.
    pub(in crate::provider) fn nodes(&self, launch: &Launch) -> Vec<Value> {
        args::nodes(&launch.chain, &launch.overlay, self.lasting)
    }

    /// Creates a new top at `next`, to be used by [`Self::switch`].
    pub(in crate::provider) async fn add(
        &mut self,
        monitor: &mut Monitor,
        next: &Path,
    ) -> Result<(), HostError> {
        self.programs.img.create(next, self.size).await?;
        self.switches += 1;
        let node = format!("top{}", self.switches);
        monitor
            .execute("blockdev-add", args::writable(&node, next, &Value::Null, self.lasting))
            .await
            .map(|_| ())
    }

    /// Switches to the top that was added. The previous one stays as it is.
    pub(in crate::provider) async fn switch(&mut self, monitor: &mut Monitor) -> Result<(), HostError> {
        let node = format!("top{}", self.switches);
        monitor.execute("blockdev-snapshot", json!({ "node": self.top, "overlay": node })).await?;
        self.top = node;
        Ok(())
    }
}

/// A connection to a monitor. Its events are ignored or handled elsewhere.
pub(in crate::provider) struct Monitor(Qmp);

impl Monitor {
    pub(super) fn new(qmp: Qmp) -> Self {
        Self(qmp)
    }

    /// Connects to the monitor at the socket `name` in `dir`; `None` if its
    /// program ends first.
    pub(in crate::provider) async fn wait(
        dir: &Path,
        name: &str,
        child: &mut Child,
    ) -> Option<Result<Self, HostError>> {
        let stream = sockets::wait_and_connect(dir, name, child).await?;
        Some(Qmp::new(stream, &[]).await.map(|(qmp, _)| Self(qmp)))
    }

    /// Executes a command.
    pub(in crate::provider) async fn execute(
        &mut self,
        command: &str,
        arguments: Value,
    ) -> Result<Value, HostError> {
        self.0.execute(command, arguments).await
    }
}

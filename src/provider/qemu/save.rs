//! Saves the memory and the devices of a machine, and resumes them in another
//! QEMU.

use std::path::Path;
use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::instance::QemuInstance;
use super::snapshot::{self, Snapshot};
use super::snapshots::{SHARE, free};
use crate::host::HostError;
use crate::host::sockets;
use crate::provider::Instance;

/// Timeout for saving the devices.
const SAVE: Duration = Duration::from_secs(60);
/// Timeout for a fork to resume.
const RESUME: Duration = Duration::from_secs(30);

impl Snapshot {
    /// Saves the devices of a machine whose memory is already in this snapshot.
    /// QEMU pauses the machine itself and records that it ran, so that a fork
    /// runs at once. `scratch` is QEMU's directory.
    pub(super) async fn save(&self, instance: &mut QemuInstance, scratch: &Path) -> Result<(), HostError> {
        let fail = |e: std::io::Error| HostError::io("can't save the machine", &e);
        let listener = sockets::listen(scratch, "devices").map_err(fail)?;
        let receive = async {
            let (mut stream, _) = listener.accept().await?;
            let mut bytes = Vec::new();
            // Only the devices, about a megabyte. The memory stays in its file.
            (&mut stream).take(64 << 20).read_to_end(&mut bytes).await?;
            Ok::<_, std::io::Error>(bytes)
        };
        share_memory(instance).await?;
        let send = async {
            instance.execute("migrate", json!({ "uri": "unix:devices" })).await?;
            loop {
                let status = instance.execute("query-migrate", json!({})).await?;
                match status["status"].as_str() {
                    Some("completed") => return Ok(()),
                    Some("failed" | "cancelled") => {
                        return Err(HostError::new(format!(
                            "QEMU can't save the machine: {}",
                            status["error-desc"].as_str().unwrap_or("no reason given")
                        )));
                    }
                    _ => tokio::time::sleep(Duration::from_millis(5)).await,
                }
            }
        };
        let receive = async { receive.await.map_err(fail) };
        let (bytes, ()) = tokio::time::timeout(SAVE, async { tokio::try_join!(receive, send) })
            .await
            .map_err(|_| HostError::new("QEMU did not save the machine in time"))??;
        let _ = std::fs::remove_file(scratch.join("devices"));
        std::fs::write(self.devices(), bytes).map_err(fail)
    }

    /// Loads the devices into a QEMU that was started with [`incoming`], and
    /// waits until the machine runs.
    pub(super) async fn resume(&self, instance: &mut QemuInstance, scratch: &Path) -> Result<(), HostError> {
        share_memory(instance).await?;
        let fail = |e: std::io::Error| HostError::io("can't resume the machine", &e);
        let devices = std::fs::read(self.devices()).map_err(fail)?;
        instance.execute("migrate-incoming", json!({ "uri": "unix:devices" })).await?;
        let mut stream = sockets::connect(scratch, "devices").await.map_err(fail)?;
        let _ = std::fs::remove_file(scratch.join("devices"));
        stream.write_all(&devices).await.map_err(fail)?;
        stream.shutdown().await.map_err(fail)?;
        tokio::time::timeout(RESUME, instance.resumed())
            .await
            .map_err(|_| HostError::new("the machine did not resume in time"))?
    }
}

/// Arguments that make QEMU wait for the state of a machine.
pub(super) fn incoming() -> [String; 2] {
    ["-incoming".into(), "defer".into()]
}

/// Leaves the memory out of the stream: it is shared with its file.
async fn share_memory(instance: &mut QemuInstance) -> Result<(), HostError> {
    let capabilities = json!({ "capabilities": [{ "capability": "x-ignore-shared", "state": true }] });
    instance.execute("migrate-set-capabilities", capabilities).await.map(|_| ())
}

/// Saves a snapshot of a booted machine, and stops it.
pub(super) async fn save(mut instance: QemuInstance) -> Result<(), HostError> {
    let fail = |e: std::io::Error| HostError::io("can't save the machine", &e);
    let Some(pending) = instance.pending.take() else {
        instance.stop().await;
        return Err(HostError::new("the machine's memory has no file"));
    };
    let saved = async {
        let new = Snapshot::new(pending.scratch.join("snapshot")).map_err(fail)?;
        new.save(&mut instance, &pending.scratch).await.map(|()| new)
    };
    let saved = saved.await;
    // The machine must close its disk, whether it was saved or not.
    instance.stop().await;
    let new = saved?;
    std::fs::rename(pending.scratch.join("memory"), new.memory()).map_err(fail)?;
    std::fs::rename(&pending.overlay, new.disk()).map_err(fail)?;
    pending.origin.write(&new).map_err(fail)?;
    new.shrink().await;
    let home = &pending.snapshots.home;
    snapshot::forget_old(home, free(home) / SHARE);
    new.rename(&pending.dir).map_err(fail)?;
    pending.snapshots.add(&pending.dir);
    Ok(())
}

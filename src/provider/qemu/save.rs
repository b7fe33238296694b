//! Saves the memory and the devices of a machine, and resumes them in another QEMU.

use std::path::Path;
use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::instance::QemuInstance;
use super::snapshot::{self, Snapshot};
use super::snapshots::{SHARE, free};
use crate::host::sockets;
use crate::provider::{Instance, ProviderError};

/// How long saving the devices may take.
const SAVE: Duration = Duration::from_secs(60);
/// How long a fork may take to run.
const RESUME: Duration = Duration::from_secs(30);

impl Snapshot {
    /// Saves the devices of a machine whose memory is here. QEMU stops it
    /// itself, and notes that it ran: whoever takes it over from here has it
    /// running at once. `scratch` is QEMU's directory.
    pub(super) async fn save(
        &self,
        instance: &mut QemuInstance,
        scratch: &Path,
    ) -> Result<(), ProviderError> {
        let fail = |e: std::io::Error| ProviderError::new(format!("the machine can't be kept: {e}"));
        let listener = sockets::listen(scratch, "devices").map_err(fail)?;
        let receive = async {
            let (mut stream, _) = listener.accept().await?;
            let mut bytes = Vec::new();
            // Devices only: a megabyte. The memory stays where it is.
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
                        return Err(ProviderError::new(format!(
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
            .map_err(|_| ProviderError::new("QEMU does not save the machine"))??;
        let _ = std::fs::remove_file(scratch.join("devices"));
        std::fs::write(self.devices(), bytes).map_err(fail)
    }

    /// Has a QEMU that waits for it take the machine over.
    pub(super) async fn resume(
        &self,
        instance: &mut QemuInstance,
        scratch: &Path,
    ) -> Result<(), ProviderError> {
        share_memory(instance).await?;
        let fail = |e: std::io::Error| ProviderError::new(format!("the machine can't be resumed: {e}"));
        let devices = std::fs::read(self.devices()).map_err(fail)?;
        instance.execute("migrate-incoming", json!({ "uri": "unix:devices" })).await?;
        let mut stream = sockets::connect(scratch, "devices").await.map_err(fail)?;
        let _ = std::fs::remove_file(scratch.join("devices"));
        stream.write_all(&devices).await.map_err(fail)?;
        stream.shutdown().await.map_err(fail)?;
        tokio::time::timeout(RESUME, instance.resumed())
            .await
            .map_err(|_| ProviderError::new("the machine does not resume"))?
    }
}

/// What has QEMU wait for a machine that it is to take over.
pub(super) fn incoming() -> [String; 2] {
    ["-incoming".into(), "defer".into()]
}

/// Memory is shared with its file, and no part of the stream.
async fn share_memory(instance: &mut QemuInstance) -> Result<(), ProviderError> {
    let capabilities = json!({ "capabilities": [{ "capability": "x-ignore-shared", "state": true }] });
    instance.execute("migrate-set-capabilities", capabilities).await.map(|_| ())
}

/// Keeps a machine that has booted, and ends it.
pub(super) async fn save(mut instance: QemuInstance) -> Result<(), ProviderError> {
    let fail = |e: std::io::Error| ProviderError::new(format!("the machine can't be kept: {e}"));
    let Some(pending) = instance.pending.take() else {
        instance.stop().await;
        return Err(ProviderError::new("the machine's memory has no file"));
    };
    let saved = async {
        let new = Snapshot::new(pending.scratch.join("snapshot")).map_err(fail)?;
        new.save(&mut instance, &pending.scratch).await.map(|()| new)
    };
    let saved = saved.await;
    // Whatever came of it: it is to let go of its disk.
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

//! A new file for the disk of a server that runs, and copies of its disk.

use std::io;
use std::path::{Path, PathBuf};

use vimg_lang::model::DiskFormat;

use super::super::guest::Guest;
use super::record::{MOST_DISKS, ServerRecord};
use super::running::{find, leave, words};
use crate::disk::DiskTool;
use crate::host::HostError;
use crate::provider::{Instance, Provider};
use crate::store::ServerHome;

/// Continues a server's disk in a new file. Writes the record first, so that it
/// never names a disk that is no longer written to.
pub(super) async fn branch<P: Provider>(
    home: &ServerHome,
    record: &mut ServerRecord,
    changing: bool,
    found: &mut Guest<P::Instance>,
) -> Result<(), String> {
    let (before, name) = (record.clone(), home.free_disk());
    let next = home.dir().join(&name);
    record.chain.push(std::mem::replace(&mut record.overlay, name));
    record.changing = changing;
    home.keep(record).map_err(|e| e.to_string())?;
    let branched = match found.ask(async |session| session.freeze().await).await {
        Ok(()) => found.instance.snapshot(&next).await.map_err(|e| e.message),
        Err(stopped) => Err(words(stopped)),
    };
    let thawed = found.ask(async |session| session.thaw().await).await.map_err(words);
    if branched.is_err() {
        let _ = std::fs::remove_file(&next);
        *record = before;
        home.keep(record).map_err(|e| e.to_string())?;
    }
    branched.and(thawed)
}

/// Writes the current disk of a server to a file without a backing file. The file
/// appears when it is complete.
///
/// # Errors
///
/// The server was never started, its last change was interrupted, its machine does
/// not answer, or the file can't be written.
pub async fn save<P: Provider>(
    provider: &P,
    disks: &dyn DiskTool,
    home: &ServerHome,
    to: &Path,
) -> Result<(), HostError> {
    let chain = settled(provider, home).await.map_err(HostError::new)?;
    let part = Part::beside(to);
    disks.export(&chain, DiskFormat::Qcow2, None, &part.0).await?;
    part.keep_as(to).map_err(|e| HostError::io(format_args!("can't write {}", to.display()), &e))
}

/// Returns disks of a server that no longer change.
async fn settled<P: Provider>(provider: &P, home: &ServerHome) -> Result<Vec<PathBuf>, String> {
    let mut record = home.record().ok_or("it was never started")?;
    if record.changing {
        return Err("its last change was interrupted".into());
    }
    if let Some(mut found) = find(provider, home).await? {
        let room = record.chain.len() < MOST_DISKS;
        let branched = match room {
            true => branch::<P>(home, &mut record, false, &mut found).await,
            false => Err(format!(
                "its disk has been changed {MOST_DISKS} times, the maximum; `vimg down` it first"
            )),
        };
        leave(provider, found);
        branched?;
        return Ok(home.chain(&record));
    }
    let mut chain = home.chain(&record);
    chain.push(home.overlay(&record));
    Ok(chain)
}

/// A file that is not complete. Dropping it removes it.
struct Part(PathBuf);

impl Part {
    /// Names the part of a file, in the same directory.
    fn beside(to: &Path) -> Self {
        let name = to.file_name().unwrap_or_default().to_string_lossy();
        Self(to.with_file_name(format!(".{name}.{}.part", std::process::id())))
    }

    fn keep_as(self, to: &Path) -> io::Result<()> {
        std::fs::rename(&self.0, to)
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

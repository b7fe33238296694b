//! `archive`: unpacks a tar archive with the machine's own tar.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use super::context::Context;
use super::{file, lay};
use crate::command;
use crate::failure::{Failure, HOME};
use crate::protocol::Blob;

pub(super) fn apply(
    path: &Path,
    content: Blob,
    strip: u32,
    owner: (u32, u32),
    context: &mut Context,
) -> Result<bool, Failure> {
    context.ledger.path(path)?;
    file::parents(&path.join("x"), owner)?;
    // No user may reach the unpacked files here: they belong to root, and may have set-id
    // bits.
    let dir = Path::new(HOME).join("tmp").join("archive");
    let made =
        fs::create_dir_all(&dir).and_then(|()| fs::set_permissions(&dir, Permissions::from_mode(0o700)));
    made.map_err(|e| Failure::at(&dir, e))?;
    let archive = dir.join("packed");
    context.channel.request(&[content]).map_err(|e| Failure::at(&archive, e))?;
    // Only tar knows the entries of an archive, so unpack it in a directory aside.
    let unpacked = File::create(&archive)
        .and_then(|mut f| context.channel.blob(content, &mut f))
        .map_err(|e| Failure::at(&archive, e))
        .and_then(|()| unpack(&archive, path, strip, owner, context));
    let _ = fs::remove_dir_all(&dir);
    unpacked
}

/// Unpacks into a directory of root, and then moves entries that differ. Existing files
/// are recorded before they are replaced; only the archive's files get the owner.
fn unpack(
    archive: &Path,
    path: &Path,
    strip: u32,
    owner: (u32, u32),
    context: &mut Context,
) -> Result<bool, Failure> {
    let aside = archive.with_file_name("unpacked");
    let _ = fs::remove_dir_all(&aside);
    fs::create_dir_all(&aside).map_err(|e| Failure::at(&aside, e))?;
    let mut tar = command::command("tar");
    tar.arg("--extract").arg("--file").arg(archive).arg("--directory").arg(&aside);
    tar.arg(format!("--strip-components={strip}"));
    tar.args(["--no-same-owner", "--same-permissions", "--xattrs", "--xattrs-include=*"]);
    command::run(&mut tar, Duration::from_secs(3600), &context.output()).map_err(|mut failure| {
        failure.message = format!(
            "tar: {}; for .xz and .zst the machine needs the package xz-utils or zstd",
            failure.message
        );
        failure
    })?;
    let pieces = lay::differing(&aside, path, owner).map_err(|e| Failure::at(&aside, e))?;
    context.ledger.paths(pieces.iter().map(|piece| piece.to.as_path()))?;
    lay::lay(&pieces, owner, lay::By::Moving)?;
    Ok(!pieces.is_empty())
}

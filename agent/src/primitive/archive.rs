//! `archive`: a tar archive, unpacked by the machine's own tar.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{Context, file};
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
    file::parents(&path.join("x"))?;
    let tmp = Path::new(HOME).join("tmp");
    fs::create_dir_all(&tmp).map_err(|e| Failure::at(&tmp, e))?;
    let archive = tmp.join("archive");
    context.channel.request(&[content]).map_err(|e| Failure::at(&archive, e))?;
    // What an archive holds is known only to tar: it is unpacked aside.
    let unpacked = File::create(&archive)
        .and_then(|mut f| context.channel.blob(content, &mut f))
        .map_err(|e| Failure::at(&archive, e))
        .and_then(|()| unpack(&archive, path, strip, owner, context));
    let _ = fs::remove_file(&archive);
    unpacked
}

/// Unpacks aside and then moves it in: what is there already is noted before
/// it is changed, and only what the archive holds gets an owner.
fn unpack(
    archive: &Path,
    path: &Path,
    strip: u32,
    (uid, gid): (u32, u32),
    context: &mut Context,
) -> Result<bool, Failure> {
    let aside = Path::new(HOME).join("tmp").join("unpacked");
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
    let mut held = Vec::new();
    list(&aside, &aside, path, &mut held).map_err(|e| Failure::at(&aside, e))?;
    context.ledger.paths(held.iter().map(PathBuf::as_path))?;
    let mut copy = command::command("sh");
    copy.args([
        "-c",
        // The owner goes into the stream: where it is set later, set-id bits and
        // capabilities are lost.
        "tar -C \"$1\" -c --xattrs --xattrs-include='*' --numeric-owner --owner=:\"$3\" --group=:\"$4\" . |
         tar -C \"$2\" -x --xattrs --xattrs-include='*' --same-owner --same-permissions --numeric-owner \
             --no-overwrite-dir --keep-directory-symlink",
        "sh",
    ]);
    copy.arg(&aside).arg(path).arg(uid.to_string()).arg(gid.to_string());
    let copied = command::run(&mut copy, Duration::from_secs(3600), &context.output());
    let _ = fs::remove_dir_all(&aside);
    copied.map(|()| true)
}

/// Where all that is below `dir` will be, but for directories that are there:
/// they stay as they are.
fn list(top: &Path, dir: &Path, to: &Path, out: &mut Vec<PathBuf>) -> std::io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let from = entry?.path();
        let target = to.join(from.strip_prefix(top).unwrap_or(&from));
        let is_dir = fs::symlink_metadata(&from)?.is_dir();
        if !(is_dir && target.is_dir()) {
            out.push(target);
        }
        if is_dir {
            list(top, &from, to, out)?;
        }
    }
    Ok(())
}

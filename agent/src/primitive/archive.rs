//! `archive`: a tar archive, unpacked by the machine's own tar.

use std::fs::{self, File};
use std::path::Path;
use std::time::Duration;

use super::{Context, file};
use crate::command;
use crate::failure::{Failure, HOME};
use crate::protocol::{Blob, Digest};

pub(super) fn apply(
    path: &Path,
    content: Blob,
    strip: u32,
    owner: Option<(u32, u32)>,
    context: &mut Context,
) -> Result<bool, Failure> {
    // What an archive holds is known only to tar; that it was unpacked here
    // is noted.
    let what = format!("{}\0{}\0{strip}\0{owner:?}", path.display(), content.digest);
    let note = Path::new(HOME).join("archives").join(Digest::of(what.as_bytes()).to_string());
    if note.exists() {
        return Ok(false);
    }
    file::parents(path)?;
    fs::create_dir_all(path).map_err(|e| Failure::at(path, e))?;
    let tmp = Path::new(HOME).join("tmp");
    fs::create_dir_all(&tmp).map_err(|e| Failure::at(&tmp, e))?;
    let archive = tmp.join("archive");
    context.channel.request(&[content]).map_err(|e| Failure::at(&archive, e))?;
    let unpacked = File::create(&archive)
        .and_then(|mut f| context.channel.blob(content, &mut f))
        .map_err(|e| Failure::at(&archive, e))
        .and_then(|()| unpack(&archive, path, strip, owner, context));
    let _ = fs::remove_file(&archive);
    unpacked?;
    file::parents(&note)?;
    fs::write(&note, what.replace('\0', "\n")).map_err(|e| Failure::at(&note, e))?;
    Ok(true)
}

/// With an owner the archive is unpacked aside and then moved in, so that only
/// what it holds gets that owner, and not what was in the directory.
fn unpack(
    archive: &Path,
    path: &Path,
    strip: u32,
    owner: Option<(u32, u32)>,
    context: &Context,
) -> Result<(), Failure> {
    let aside = Path::new(HOME).join("tmp").join("unpacked");
    let to = if owner.is_some() { &aside } else { path };
    let _ = fs::remove_dir_all(&aside);
    fs::create_dir_all(to).map_err(|e| Failure::at(to, e))?;
    let mut tar = command::command("tar");
    tar.arg("--extract").arg("--file").arg(archive).arg("--directory").arg(to);
    tar.arg(format!("--strip-components={strip}")).arg("--numeric-owner").arg("--no-overwrite-dir");
    command::run(&mut tar, Duration::from_secs(3600), &context.output()).map_err(|mut failure| {
        failure.message = format!(
            "tar: {}; for .xz and .zst the machine needs the package xz-utils or zstd",
            failure.message
        );
        failure
    })?;
    let Some((uid, gid)) = owner else { return Ok(()) };
    let mut chown = command::command("chown");
    chown.arg("--recursive").arg("--no-dereference").arg(format!("{uid}:{gid}")).arg(&aside);
    command::run(&mut chown, Duration::from_secs(600), &context.output())?;
    let mut copy = command::command("sh");
    copy.args([
        "-c",
        "tar -C \"$1\" -c . | tar -C \"$2\" -x --same-owner --numeric-owner --no-overwrite-dir",
        "sh",
    ]);
    copy.arg(&aside).arg(path);
    let copied = command::run(&mut copy, Duration::from_secs(3600), &context.output());
    let _ = fs::remove_dir_all(&aside);
    copied
}

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

fn unpack(
    archive: &Path,
    path: &Path,
    strip: u32,
    owner: Option<(u32, u32)>,
    context: &Context,
) -> Result<(), Failure> {
    let mut tar = command::command("tar");
    tar.arg("--extract").arg("--file").arg(archive).arg("--directory").arg(path);
    tar.arg(format!("--strip-components={strip}")).arg("--numeric-owner");
    if let Some((uid, gid)) = owner {
        tar.arg(format!("--owner=:{uid}")).arg(format!("--group=:{gid}")).arg("--no-same-owner");
    }
    command::run(&mut tar, Duration::from_secs(3600), &context.output()).map_err(|mut failure| {
        failure.message = format!(
            "tar: {}; for .xz and .zst the machine needs the package xz-utils or zstd",
            failure.message
        );
        failure
    })?;
    let Some((uid, gid)) = owner else { return Ok(()) };
    let mut chown = command::command("chown");
    chown.arg("--recursive").arg("--no-dereference").arg(format!("{uid}:{gid}")).arg(path);
    command::run(&mut chown, Duration::from_secs(600), &context.output())
}

//! `directory`: a directory, with a tree of files in it or not.

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, lchown};
use std::path::{Component, Path};

use super::{Context, file, symlink};
use crate::failure::Failure;
use crate::protocol::{Blob, Manifest, Node};

pub(super) fn apply(
    path: &Path,
    mode: Option<u32>,
    owner: (u32, u32),
    tree: Option<Blob>,
    context: &mut Context,
) -> Result<bool, Failure> {
    file::parents(path)?;
    let Some(tree) = tree else {
        return directory(path, mode.unwrap_or(0o755), owner);
    };
    context.channel.request(&[tree]).map_err(|e| Failure::at(path, e))?;
    let bytes = context.channel.bytes(tree).map_err(|e| Failure::at(path, e))?;
    let manifest: Manifest = serde_json::from_slice(&bytes)
        .map_err(|e| Failure::new(format!("a list of files that does not parse: {e}")))?;

    // What differs is asked for together, so that ten thousand small files
    // are a few round trips.
    let mut changed = false;
    let mut wanted = Vec::new();
    for entry in &manifest.entries {
        let relative = Path::new(&entry.path);
        if !relative.components().all(|c| matches!(c, Component::Normal(_))) {
            return Err(Failure::new(format!("the path {:?} leads out of the directory", entry.path)));
        }
        let target = if entry.path.is_empty() { path.to_owned() } else { path.join(relative) };
        match &entry.node {
            Node::Dir(own) => {
                let mode = if entry.path.is_empty() { mode.unwrap_or(*own) } else { *own };
                changed |= directory(&target, mode, owner)?;
            }
            Node::File(mode, content) if file::holds(&target, *content) => {
                changed |= file::attributes(&target, *mode, owner)?;
            }
            Node::File(mode, content) => wanted.push((target, *mode, *content)),
            Node::Link(to) => {
                changed |= symlink::apply(&target, to)?;
                changed |= link_owner(&target, owner)?;
            }
        }
    }
    // A part at a time: the host does not read while it sends.
    for part in wanted.chunks(1024) {
        let blobs: Vec<Blob> = part.iter().map(|(_, _, blob)| *blob).collect();
        context.channel.request(&blobs).map_err(|e| Failure::at(path, e))?;
        for (target, mode, content) in part {
            file::write(target, *content, *mode, owner, context)?;
        }
        changed = true;
    }
    Ok(changed)
}

fn directory(path: &Path, mode: u32, owner: (u32, u32)) -> Result<bool, Failure> {
    match fs::create_dir(path) {
        Ok(()) => {
            file::attributes(path, mode, owner)?;
            Ok(true)
        }
        // A link to a directory is a directory, as `/bin` is.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => {
            if fs::symlink_metadata(path).is_ok_and(|m| m.is_symlink()) {
                return Ok(false);
            }
            file::attributes(path, mode, owner)
        }
        Err(error) => Err(Failure::at(path, error)),
    }
}

fn link_owner(path: &Path, owner: (u32, u32)) -> Result<bool, Failure> {
    let meta = fs::symlink_metadata(path).map_err(|e| Failure::at(path, e))?;
    if (meta.uid(), meta.gid()) == owner {
        return Ok(false);
    }
    lchown(path, Some(owner.0), Some(owner.1)).map_err(|e| Failure::at(path, e))?;
    Ok(true)
}

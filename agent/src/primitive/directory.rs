//! `directory`: a directory, with a tree of files in it or not.

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, lchown};
use std::path::{Component, Path, PathBuf};

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
    let Some(tree) = tree else {
        let node = Node::Dir(mode.unwrap_or(0o755));
        if right(path, &node, owner) {
            return Ok(false);
        }
        context.ledger.path(path)?;
        file::parents(path)?;
        return directory(path, mode.unwrap_or(0o755), owner);
    };
    context.channel.request(&[tree]).map_err(|e| Failure::at(path, e))?;
    let bytes = context.channel.bytes(tree).map_err(|e| Failure::at(path, e))?;
    let manifest: Manifest = serde_json::from_slice(&bytes)
        .map_err(|e| Failure::new(format!("a list of files that does not parse: {e}")))?;

    let mut differs: Vec<(PathBuf, Node)> = Vec::new();
    for entry in manifest.entries {
        let relative = Path::new(&entry.path);
        if !relative.components().all(|c| matches!(c, Component::Normal(_))) {
            return Err(Failure::new(format!("the path {:?} leads out of the directory", entry.path)));
        }
        let (target, node) = match (entry.path.as_str(), entry.node) {
            ("", Node::Dir(own)) => (path.to_owned(), Node::Dir(mode.unwrap_or(own))),
            ("", node) => (path.to_owned(), node),
            (_, node) => (path.join(relative), node),
        };
        if !right(&target, &node, owner) {
            differs.push((target, node));
        }
    }
    context.ledger.paths(differs.iter().map(|(path, _)| path.as_path()))?;
    file::parents(path)?;
    // What differs is asked for together, so that ten thousand small files
    // are a few round trips.
    let changed = !differs.is_empty();
    let mut wanted = Vec::new();
    for (target, node) in differs {
        match node {
            Node::Dir(mode) => {
                directory(&target, mode, owner)?;
            }
            Node::File(mode, content) if file::holds(&target, content) => {
                file::attributes(&target, mode, owner)?;
            }
            Node::File(mode, content) => wanted.push((target, mode, content)),
            Node::Link(to) => {
                symlink::apply(&target, &to, context)?;
                lchown(&target, Some(owner.0), Some(owner.1)).map_err(|e| Failure::at(&target, e))?;
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
    }
    Ok(changed)
}

/// Whether something stands there as it is to be.
fn right(path: &Path, node: &Node, owner: (u32, u32)) -> bool {
    let meta = || fs::symlink_metadata(path);
    match node {
        // A link to a directory is a directory, as `/bin` is.
        Node::Dir(_) if meta().is_ok_and(|m| m.is_symlink()) => path.is_dir(),
        Node::Dir(mode) => path.is_dir() && file::has(path, *mode, owner),
        Node::File(mode, content) => file::holds(path, *content) && file::has(path, *mode, owner),
        Node::Link(to) => symlink::leads(path, to) && meta().is_ok_and(|m| (m.uid(), m.gid()) == owner),
    }
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

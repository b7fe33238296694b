//! `directory`: a directory, optionally with a tree of files.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use super::context::Context;
use super::{file, symlink};
use crate::failure::Failure;
use crate::place::Place;
use crate::protocol::{Blob, Manifest, Node};
use crate::xattrs;

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
        file::parents(path, owner)?;
        return directory(path, mode.unwrap_or(0o755), owner);
    };
    context.channel.request(&[tree]).map_err(|e| Failure::at(path, e))?;
    let bytes = context.channel.bytes(tree).map_err(|e| Failure::at(path, e))?;
    let manifest: Manifest = serde_json::from_slice(&bytes)
        .map_err(|e| Failure::new(format!("can't parse the list of files: {e}")))?;

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
        // A tree is merged into existing directories, which keep their mode and owner. The
        // exception is the top, if the recipe sets its mode or owner.
        let said = target == path && (mode.is_some() || owner != (0, 0));
        if matches!(node, Node::Dir(_)) && target.is_dir() && !said {
            continue;
        }
        if !right(&target, &node, owner) {
            differs.push((target, node));
        }
    }
    context.ledger.paths(differs.iter().map(|(path, _)| path.as_path()))?;
    file::parents(path, owner)?;
    // Request all differing files together, so that ten thousand small files take only a
    // few round trips.
    let changed = !differs.is_empty();
    let mut wanted = Vec::new();
    for (target, node) in differs {
        match node {
            Node::Dir(mode) => {
                directory(&target, mode, owner)?;
            }
            Node::File(mode, content, attributes)
                if attributes.is_empty() && file::holds(&target, content) =>
            {
                file::attributes(&target, mode, owner)?;
            }
            Node::File(mode, content, attributes) => wanted.push((target, mode, content, attributes)),
            Node::Link(to) => {
                if fs::symlink_metadata(&target).is_ok_and(|meta| meta.is_dir()) {
                    return Err(Failure::new(format!("{} is a directory", target.display())));
                }
                symlink::put(&target, Path::new(&to), owner)?;
            }
        }
    }
    // Limit the size of a request: the host does not read while it sends.
    for part in wanted.chunks(1024) {
        let blobs: Vec<Blob> = part.iter().map(|(_, _, blob, _)| *blob).collect();
        context.channel.request(&blobs).map_err(|e| Failure::at(path, e))?;
        for (target, mode, content, attributes) in part {
            file::write(target, *content, *mode, owner, attributes, context)?;
        }
    }
    Ok(changed)
}

/// Whether the entry at `path` is as declared.
fn right(path: &Path, node: &Node, owner: (u32, u32)) -> bool {
    let meta = || fs::symlink_metadata(path);
    match node {
        // A link to a directory, such as `/bin`, counts as a directory.
        Node::Dir(_) if meta().is_ok_and(|m| m.is_symlink()) => path.is_dir(),
        Node::Dir(mode) => path.is_dir() && file::has(path, *mode, owner),
        Node::File(mode, content, attributes) => {
            let has = |name: &String, value: &String| {
                xattrs::get(path).is_ok_and(|there| there.get(name) == Some(value))
            };
            file::holds(path, *content)
                && file::has(path, *mode, owner)
                && attributes.iter().all(|(name, value)| has(name, value))
        }
        Node::Link(to) => symlink::leads(path, to) && meta().is_ok_and(|m| (m.uid(), m.gid()) == owner),
    }
}

fn directory(path: &Path, mode: u32, owner: (u32, u32)) -> Result<bool, Failure> {
    let fail = |e: io::Error| Failure::at(path, e);
    let place = Place::find(path).map_err(fail)?;
    if place.make_dir().map_err(fail)? {
        return place.set(mode, owner).map(|()| true).map_err(fail);
    }
    match fs::symlink_metadata(path).map_err(fail)? {
        // A link to a directory, such as `/bin`, counts as a directory.
        meta if meta.is_symlink() && path.is_dir() => Ok(false),
        meta if meta.is_dir() => file::attributes(path, mode, owner),
        _ => Err(fail(io::ErrorKind::AlreadyExists.into())),
    }
}

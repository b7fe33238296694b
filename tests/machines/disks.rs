//! Disks of states, and the files on them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Returns all files of the root filesystem of a state: type and mode, owner,
/// content. Also returns when the first of its layers was begun, in seconds
/// since 1970. Needs root, because the kernel mounts the disk.
pub(crate) fn files_of(store: &Path, key: &str) -> (BTreeMap<String, String>, u64) {
    let (mut disks, mut begun, mut at) = (Vec::new(), u64::MAX, Some(key.to_owned()));
    while let Some(key) = at {
        let dir = store.join("states").join(key);
        let record = std::fs::read(dir.join("record.json")).unwrap();
        let record: serde_json::Value = serde_json::from_slice(&record).unwrap();
        if record["kind"] != "base" {
            begun = begun.min(record["made"].as_u64().unwrap() - record["seconds"].as_f64().unwrap() as u64);
        }
        disks.push(dir.join("disk.qcow2"));
        at = record["disk"]["backing"][0].as_str().map(str::to_owned);
    }
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("raw");
    convert(disks.iter().rev(), "raw", &raw);
    (files_on(&raw), begun)
}

/// Writes the content of a chain of disks, the lowest first, as one disk.
pub(super) fn convert<'a>(chain: impl Iterator<Item = &'a PathBuf>, format: &str, to: &Path) {
    let mut graph = serde_json::Value::Null;
    for disk in chain {
        graph = serde_json::json!({
            "driver": "qcow2", "backing": graph, "file": { "driver": "file", "filename": disk },
        });
    }
    let from = format!("json:{graph}");
    let status = Command::new("qemu-img").args(["convert", "-O", format, &from]).arg(to).status();
    assert!(status.unwrap().success());
}

fn files_on(disk: &Path) -> BTreeMap<String, String> {
    use std::os::unix::fs::MetadataExt;
    let dir = tempfile::tempdir().unwrap();
    // The third partition; the layout is in src/disk/gpt.rs.
    let options = format!("loop,ro,noload,offset={}", (2048 + 131_072) * 512);
    let mounted = Command::new("mount").args(["-o", &options]).arg(disk).arg(dir.path()).status();
    assert!(mounted.unwrap().success());
    let mut tree = BTreeMap::new();
    for entry in walkdir::WalkDir::new(dir.path()) {
        let entry = entry.unwrap();
        let meta = entry.metadata().unwrap();
        let content = if meta.is_file() {
            vimg_agent::protocol::Digest::of(&std::fs::read(entry.path()).unwrap()).to_string()
        } else if meta.is_symlink() {
            std::fs::read_link(entry.path()).unwrap().display().to_string()
        } else {
            String::new()
        };
        let name = entry.path().strip_prefix(dir.path()).unwrap().display().to_string();
        tree.insert(name, format!("{:o} {}:{} {content}", meta.mode(), meta.uid(), meta.gid()));
    }
    let unmounted = Command::new("umount").arg(dir.path()).status();
    assert!(unmounted.unwrap().success());
    tree
}

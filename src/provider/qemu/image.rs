//! Creates and converts disk files with `qemu-img`. The graph of files is
//! always explicit, so that no header decides which files are read.

use std::io::Read;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use vimg_lang::model::DiskFormat;

use super::programs::Programs;
use crate::host::{self, child};
use crate::provider::ProviderError;
use crate::qcow2;

/// Whether a converted disk is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Compress {
    /// With zstd, if the format can.
    Yes,
    /// Not at all, for speed.
    No,
}

/// A raw disk, for [`convert`].
pub(super) fn raw(path: &Path) -> Value {
    json!({ "driver": "raw", "file": { "driver": "file", "filename": path } })
}

/// A qcow2 disk without a backing file, for [`convert`].
pub(super) fn standalone(path: &Path) -> Value {
    json!({ "driver": "qcow2", "backing": null, "file": { "driver": "file", "filename": path } })
}

/// A chain of qcow2 disks, the lowest first, for [`convert`].
pub(super) fn qcow2s(chain: &[PathBuf]) -> Vec<Value> {
    chain.iter().map(|path| standalone(path)).collect()
}

/// Creates an empty qcow2 disk without a backing file. All empty disks of one
/// size are equal, so `qemu-img` makes one and the others are copies: starting
/// it takes a fiftieth of the time of a small layer, which needs two disks.
pub(super) async fn create(programs: &Programs, path: &Path, size: u64) -> Result<(), ProviderError> {
    let blank = programs.blanks.as_ref().map(|dir| dir.join(format!("blank-{}-{size}", programs.version)));
    if let Some(blank) = &blank
        && std::fs::copy(blank, path).is_ok()
        // A power cut may have left a part of it.
        && qcow2::read(path).is_ok_and(|header| header.virtual_size == size)
    {
        return Ok(());
    }
    let mut command = host::command(&programs.img);
    command.args(["create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=off"]).arg(path).arg(size.to_string());
    run(command, "qemu-img create").await?;
    if let Some(blank) = blank {
        // The rename makes it appear whole or not at all. Without it the next
        // disk is made by `qemu-img`.
        let new = path.with_extension("blank");
        let _ = std::fs::copy(path, &new).and_then(|_| std::fs::rename(&new, blank));
    }
    Ok(())
}

/// Converts a chain of disks to one.
pub(super) async fn convert(
    programs: &Programs,
    chain: &[Value],
    format: DiskFormat,
    compress: Compress,
    to: &Path,
) -> Result<(), ProviderError> {
    let mut graph = Value::Null;
    for disk in chain {
        let mut disk = disk.clone();
        if disk["driver"] == "qcow2" {
            disk["backing"] = graph;
        }
        graph = disk;
    }
    let mut command = host::command(&programs.img);
    command.args(["convert", "-q", "-T", "none", "-t", "unsafe", "-m", "4", "-W"]);
    match (format, compress) {
        (DiskFormat::Raw, _) => {
            command.args(["-O", "raw"]);
        }
        (DiskFormat::Qcow2, Compress::No) => {
            command.args(["-O", "qcow2"]);
        }
        (DiskFormat::Qcow2, Compress::Yes) => {
            command.args(["-c", "-O", "qcow2", "-o", "compression_type=zstd"]);
        }
    }
    command.arg(format!("json:{graph}")).arg(to);
    run(command, "qemu-img convert").await
}

async fn run(mut command: tokio::process::Command, what: &str) -> Result<(), ProviderError> {
    command.stdin(std::process::Stdio::null()).kill_on_drop(true);
    child::die_with_us(&mut command);
    let output = command.output().await.map_err(|e| ProviderError::new(format!("{what}: {e}")))?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    let error = ProviderError::new(format!("{what}: {text}"));
    Err(if text.contains("No space left") {
        error.help("the disk that holds the store is full")
    } else {
        error
    })
}

/// Checks an imported disk: a plain header, and the expected SHA-256.
pub(super) async fn check_import(path: &Path, sha256: &str) -> Result<(), ProviderError> {
    if let Some(format) = other_format(path) {
        return Err(ProviderError::new(format!("the disk has the format {format}"))
            .help("convert it first: qemu-img convert -O qcow2 DISK disk.qcow2"));
    }
    if qcow2::is_qcow2(path) {
        qcow2::read(path).map_err(|e| ProviderError::new(format!("can't import the disk: {e}")))?;
    }
    let (file, expected) = (path.to_owned(), sha256.to_owned());
    let found = tokio::task::spawn_blocking(move || sha256_of(&file))
        .await
        .map_err(|e| ProviderError::new(e.to_string()))?
        .map_err(|e| ProviderError::new(format!("can't read the disk: {e}")))?;
    if found == expected {
        return Ok(());
    }
    Err(ProviderError::new(format!("the disk has the SHA-256 {found}"))
        .help("the recipe expects another one: check the file, or update the recipe"))
}

/// Detects a format that would be mistaken for a raw disk.
fn other_format(path: &Path) -> Option<&'static str> {
    let mut magic = [0; 8];
    std::fs::File::open(path).and_then(|mut f| f.read_exact(&mut magic)).ok()?;
    match &magic {
        m if m.starts_with(b"KDMV") => Some("VMDK"),
        b"vhdxfile" => Some("VHDX"),
        b"conectix" => Some("VHD"),
        m if m.starts_with(b"QED\0") => Some("QED"),
        _ => None,
    }
}

/// Computes a file's SHA-256, in hexadecimal.
pub fn sha256_of(path: &Path) -> std::io::Result<String> {
    let mut file = std::fs::File::open(path)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let n = file.read(&mut buffer)?;
        if n == 0 {
            return Ok(hasher.finalize().iter().map(|b| format!("{b:02x}")).collect());
        }
        hasher.update(&buffer[..n]);
    }
}

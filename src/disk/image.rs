//! Creates and converts disk files with `qemu-img`. The graph of files is
//! always explicit, so that no header decides which files are read.

use std::io::Read;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use vimg_lang::model::DiskFormat;

use super::qcow2;
use crate::host::version::version_of;
use crate::host::{self, HostError, child};

/// Whether a converted disk is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compress {
    /// With zstd, if the format can.
    Yes,
    /// Not at all, for speed.
    No,
}

/// A raw disk, for a conversion.
pub fn raw(path: &Path) -> Value {
    json!({ "driver": "raw", "file": { "driver": "file", "filename": path } })
}

/// A qcow2 disk without a backing file, for a conversion.
pub fn standalone(path: &Path) -> Value {
    json!({ "driver": "qcow2", "backing": null, "file": { "driver": "file", "filename": path } })
}

/// A chain of qcow2 disks, the lowest first, for a conversion.
pub fn qcow2s(chain: &[PathBuf]) -> Vec<Value> {
    chain.iter().map(|path| standalone(path)).collect()
}

/// The program `qemu-img`.
#[derive(Debug, Clone)]
pub struct QemuImg {
    program: PathBuf,
    /// For instance `7.2.22`.
    pub version: String,
    /// A directory for empty disks that are copied.
    blanks: Option<PathBuf>,
}

impl QemuImg {
    /// Finds it in PATH, and stores its version in `probes`.
    ///
    /// # Errors
    ///
    /// Says what to install.
    pub async fn find(probes: Option<&Path>) -> Result<Self, HostError> {
        let program = host::find("qemu-img").ok_or_else(|| {
            HostError::new("`qemu-img` is not installed").help("install it: apt-get install qemu-utils")
        })?;
        let version = version_of(&program, probes).await?;
        Ok(Self { program, version, blanks: probes.map(Path::to_owned) })
    }

    /// Creates an empty qcow2 disk without a backing file. All empty disks of one
    /// size are equal, so `qemu-img` makes one and the others are copies: starting
    /// it takes a fiftieth of the time of a small layer, which needs two disks.
    ///
    /// # Errors
    ///
    /// What `qemu-img` says.
    pub async fn create(&self, path: &Path, size: u64) -> Result<(), HostError> {
        let blank = self.blanks.as_ref().map(|dir| dir.join(format!("blank-{}-{size}", self.version)));
        if let Some(blank) = &blank
        && std::fs::copy(blank, path).is_ok()
        // A power cut may have left a part of it.
        && qcow2::read(path).is_ok_and(|header| header.virtual_size == size)
        {
            return Ok(());
        }
        let mut command = host::command(&self.program);
        command
            .args(["create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=off"])
            .arg(path)
            .arg(size.to_string());
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
    ///
    /// # Errors
    ///
    /// What `qemu-img` says.
    pub async fn convert(
        &self,
        chain: &[Value],
        format: DiskFormat,
        compress: Compress,
        to: &Path,
    ) -> Result<(), HostError> {
        let mut graph = Value::Null;
        for disk in chain {
            let mut disk = disk.clone();
            if disk["driver"] == "qcow2" {
                disk["backing"] = graph;
            }
            graph = disk;
        }
        let mut command = host::command(&self.program);
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

    /// Makes a disk larger. `size` is in bytes.
    ///
    /// # Errors
    ///
    /// What `qemu-img` says.
    pub async fn resize(&self, disk: &Path, format: DiskFormat, size: u64) -> Result<(), HostError> {
        let mut command = host::command(&self.program);
        command.args(["resize", "-q", "-f", format.name()]).arg(disk).arg(size.to_string());
        run(command, "qemu-img resize").await
    }
}

async fn run(mut command: tokio::process::Command, what: &str) -> Result<(), HostError> {
    command.stdin(std::process::Stdio::null()).kill_on_drop(true);
    child::die_with_us(&mut command);
    let output = command.output().await.map_err(|e| HostError::io(what, &e))?;
    if output.status.success() {
        return Ok(());
    }
    Err(HostError::program(what, String::from_utf8_lossy(&output.stderr).trim()))
}

/// Computes a file's SHA-256, in hexadecimal.
///
/// # Errors
///
/// Errors of the system.
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

//! Checks disks that recipes import.

use std::io::Read;
use std::path::Path;

use crate::disk::image::sha256_of;
use crate::disk::qcow2;
use crate::host::HostError;

/// Checks an imported disk: a plain header, and the expected SHA-256.
///
/// # Errors
///
/// The mistake in the header, or another digest than the expected one.
pub async fn check(path: &Path, sha256: &str) -> Result<(), HostError> {
    if let Some(format) = other_format(path) {
        return Err(HostError::new(format!("the disk has the format {format}"))
            .help("convert it first: qemu-img convert -O qcow2 DISK disk.qcow2"));
    }
    if qcow2::is_qcow2(path) {
        qcow2::read(path).map_err(|e| HostError::new(format!("can't import the disk: {e}")))?;
    }
    let (file, expected) = (path.to_owned(), sha256.to_owned());
    let found = tokio::task::spawn_blocking(move || sha256_of(&file))
        .await
        .map_err(|e| HostError::new(e.to_string()))?
        .map_err(|e| HostError::io("can't read the disk", &e))?;
    if found == expected {
        return Ok(());
    }
    Err(HostError::new(format!("the disk has the SHA-256 {found}"))
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

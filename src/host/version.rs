//! The versions of programs.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::command;
use super::error::HostError;

/// Returns the word after "version" in what `PROGRAM --version` prints.
///
/// The answer is stored in `probes`, under the metadata of the program's file:
/// asking QEMU takes a tenth of the time of a small layer.
///
/// # Errors
///
/// Says that the program can't run.
pub async fn version_of(program: &Path, probes: Option<&Path>) -> Result<String, HostError> {
    let stored = probes.and_then(|probes| {
        let (meta, name) = (program.metadata().ok()?, program.file_name()?.to_string_lossy());
        let stamp = format!("{:x}-{:x}-{:x}-{:x}", meta.dev(), meta.ino(), meta.len(), meta.ctime());
        Some(probes.join(format!("{name}-{stamp}")))
    });
    if let Some(version) = stored.as_ref().and_then(|file| std::fs::read_to_string(file).ok())
        && !version.is_empty()
    {
        return Ok(version);
    }
    let fail = |e| HostError::new(format!("can't run `{}`: {e}", program.display()));
    let output = command(program).arg("--version").output().await.map_err(fail)?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let version = text.split_whitespace().skip_while(|word| *word != "version").nth(1);
    let version = version.unwrap_or("unknown").to_owned();
    if let Some(file) = stored {
        // If the version can't be stored, the next run asks again.
        let _ = std::fs::write(file, &version);
    }
    Ok(version)
}

//! QEMU's programs on this host, and the accelerators.

use std::path::{Path, PathBuf};

use crate::host;
use crate::host::network::Access;
use crate::provider::ProviderError;

/// The oldest supported version: it has `blockdev-snapshot` on an explicit
/// graph, `-action`, and `detect-zeroes` with `discard`.
const OLDEST: (u32, u32) = (6, 2);

/// The accelerator of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accel {
    /// Hardware virtualization.
    Kvm,
    /// Emulation.
    Tcg,
}

impl Accel {
    /// QEMU's name for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

/// QEMU's programs on this host.
#[derive(Debug, Clone)]
pub struct Programs {
    /// `qemu-system-x86_64`
    pub system: PathBuf,
    /// `qemu-img`
    pub img: PathBuf,
    /// For instance `7.2.22`.
    pub version: String,
    /// A directory for empty disks that are copied.
    pub(super) blanks: Option<PathBuf>,
}

impl Programs {
    /// Finds QEMU in PATH. Its version is stored in `probes`, under the
    /// metadata of its file, because asking for it takes a tenth of the time of
    /// a small layer.
    pub(super) async fn find_knowing(probes: &Path) -> Result<Self, ProviderError> {
        use std::os::unix::fs::MetadataExt;
        let known = host::find("qemu-system-x86_64").and_then(|system| {
            let meta = system.metadata().ok()?;
            let name = format!("qemu-{:x}-{:x}-{:x}-{:x}", meta.dev(), meta.ino(), meta.len(), meta.ctime());
            Some((system, probes.join(name)))
        });
        if let Some((system, file)) = &known
            && let Some(img) = host::find("qemu-img")
            && let Ok(version) = std::fs::read_to_string(file)
            && !version.is_empty()
        {
            return Ok(Self { system: system.clone(), img, version, blanks: Some(probes.to_owned()) });
        }
        let found = Self { blanks: Some(probes.to_owned()), ..Self::find().await? };
        if let Some((_, file)) = known {
            // If the version can't be stored, the next run asks again.
            let _ = std::fs::write(file, &found.version);
        }
        Ok(found)
    }

    /// Finds QEMU in PATH and asks for its version.
    pub async fn find() -> Result<Self, ProviderError> {
        let help = "install it: apt-get install qemu-system-x86 qemu-utils";
        let find = |name: &str| {
            host::find(name)
                .ok_or_else(|| ProviderError::new(format!("`{name}` is not installed")).help(help))
        };
        let (system, img) = (find("qemu-system-x86_64")?, find("qemu-img")?);
        let output =
            host::command(&system).arg("--version").output().await.map_err(|e| {
                ProviderError::new(format!("can't run `{}`: {e}", system.display())).help(help)
            })?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let version =
            text.split_whitespace().skip_while(|w| *w != "version").nth(1).unwrap_or("unknown").to_owned();
        let mut numbers = version.split('.').map(|n| n.parse::<u32>().unwrap_or(0));
        let found = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
        if found < OLDEST {
            return Err(ProviderError::new(format!("QEMU {version} is too old"))
                .help(format!("vimg needs QEMU {}.{} or newer", OLDEST.0, OLDEST.1)));
        }
        Ok(Self { system, img, version, blanks: None })
    }
}

/// QEMU's programs, accelerator and network access.
#[derive(Clone, Copy)]
pub(super) struct Rig<'a> {
    pub(super) programs: &'a Programs,
    pub(super) accel: Accel,
    pub(super) access: &'a Access,
}

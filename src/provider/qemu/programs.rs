//! QEMU's programs on this host, and the accelerators.

use std::path::{Path, PathBuf};

use crate::disk::image::QemuImg;
use crate::host::network::Access;
use crate::host::version::version_of;
use crate::host::{self, HostError};

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
    pub img: QemuImg,
    /// The version of `system`, for instance `7.2.22`.
    pub version: String,
}

impl Programs {
    /// Finds QEMU in PATH and asks for its version. What it learns is stored in
    /// `probes`, if there is such a directory.
    ///
    /// # Errors
    ///
    /// Says what to install.
    pub async fn find(probes: Option<&Path>) -> Result<Self, HostError> {
        let help = "install it: apt-get install qemu-system-x86 qemu-utils";
        let system = host::find("qemu-system-x86_64")
            .ok_or_else(|| HostError::new("`qemu-system-x86_64` is not installed").help(help))?;
        let img = QemuImg::find(probes).await?;
        let version = version_of(&system, probes).await.map_err(|e| e.help(help))?;
        let mut numbers = version.split('.').map(|n| n.parse::<u32>().unwrap_or(0));
        let found = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
        if found < OLDEST {
            return Err(HostError::new(format!("QEMU {version} is too old"))
                .help(format!("vimg needs QEMU {}.{} or newer", OLDEST.0, OLDEST.1)));
        }
        Ok(Self { system, img, version })
    }
}

/// QEMU's programs, accelerator and network access.
#[derive(Clone, Copy)]
pub(super) struct Rig<'a> {
    pub(super) programs: &'a Programs,
    pub(super) accel: Accel,
    pub(super) access: &'a Access,
}

//! What a distribution must have, and how to find one.

use std::path::{Path, PathBuf};

use futures_util::future::BoxFuture;
use vimg_lang::KnownDistribution;
use vimg_lang::model::{Bootstrap, Kernel};

use crate::digest::Description;
use crate::host::network::Access;
use crate::host::{HostError, Lines};

/// The files of a new base, all in one directory.
#[derive(Debug, Clone)]
pub struct Base {
    /// A raw or qcow2 disk without a backing file.
    pub disk: PathBuf,
    /// Kernel and initrd, if they are known without a boot. The initrd is the
    /// distribution's own, or an archive of modules for vimg's agent.
    pub boot: Option<(PathBuf, PathBuf)>,
    /// Modules of the same kernel, for an appliance.
    pub modules: Option<PathBuf>,
}

/// A wanted base disk.
pub struct Wanted<'a> {
    /// What the recipe says.
    pub bootstrap: &'a Bootstrap,
    /// The size of the disk, in bytes.
    pub size: u64,
    /// A directory for the files. It is on the disk that the store is on.
    pub dir: &'a Path,
    /// What it may reach.
    pub access: &'a Access,
    /// Receives what its programs print.
    pub lines: &'a Lines,
}

/// A distribution.
pub trait Distribution: Send + Sync {
    /// Its name in recipes.
    fn name(&self) -> &'static str;

    /// The suites that recipes can name.
    fn suites(&self) -> &'static [&'static str];

    /// A number that is raised when the same bootstrap gives another disk.
    fn behaviour(&self) -> u32;

    /// Adds to the description of a base what its disk depends on besides
    /// [`Self::behaviour`], machine and architecture.
    fn describe(&self, bootstrap: &Bootstrap, description: &mut Description) {
        description.value("distribution", &bootstrap.distribution);
        description.value("suite", &bootstrap.suite);
        if let Some(mirror) = &bootstrap.mirror {
            description.value("mirror", mirror);
        }
        if bootstrap.kernel != Kernel::default() {
            description.value("kernel", bootstrap.kernel.word());
        }
        description.value("packages", bootstrap.packages.join(" "));
    }

    /// Says what this host lacks for a bootstrap, and how to get it.
    fn missing(&self) -> Option<HostError>;

    /// Makes a base disk.
    fn make<'a>(&'a self, wanted: Wanted<'a>) -> BoxFuture<'a, Result<Base, HostError>>;
}

/// Returns the names that recipes can use.
pub fn known(among: &[&dyn Distribution]) -> Vec<KnownDistribution> {
    among.iter().map(|one| KnownDistribution { name: one.name(), suites: one.suites() }).collect()
}

/// Finds a distribution by its name.
pub fn find<'a>(among: &[&'a dyn Distribution], name: &str) -> Option<&'a dyn Distribution> {
    among.iter().find(|one| one.name() == name).copied()
}

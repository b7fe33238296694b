//! Loads kernel modules of the initramfs. It has a directory for each purpose, with all
//! modules for this purpose, in the order of their names.

use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

/// The directory with a directory for each purpose, if the initramfs has modules.
const MODULES: &str = "/modules";

/// Whether the agent has left the initramfs: the current root may have files of the same
/// names.
static LEFT: AtomicBool = AtomicBool::new(false);

/// Ends the loading of modules, because the root changes.
pub(crate) fn leave() {
    LEFT.store(true, Ordering::Relaxed);
}

/// Whether the initramfs has modules.
pub(crate) fn any() -> bool {
    Path::new(MODULES).is_dir()
}

/// Loads the modules for `purpose`. There is no directory if they are built into the
/// kernel.
pub(crate) fn load(purpose: &str) -> io::Result<()> {
    if LEFT.load(Ordering::Relaxed) {
        return Err(io::Error::other("the agent has left the initramfs"));
    }
    let Ok(entries) = fs::read_dir(Path::new(MODULES).join(purpose)) else { return Ok(()) };
    let mut modules: Vec<_> = entries.flatten().map(|e| e.path()).collect();
    modules.sort();
    for module in modules {
        match rustix::system::finit_module(File::open(&module)?, c"", 0) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(error) => return Err(io::Error::other(format!("{}: {error}", module.display()))),
        }
    }
    Ok(())
}

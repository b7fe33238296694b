//! Kernel modules that the initramfs brings along: a directory for each thing
//! that they are for, in it all that it takes, in the order of their names.

use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

/// Where the directories are, if the initramfs brings any.
const MODULES: &str = "/modules";

/// Whether the root is another one by now, whose files are not ours.
static LEFT: AtomicBool = AtomicBool::new(false);

/// From now on nothing is loaded.
pub(crate) fn leave() {
    LEFT.store(true, Ordering::Relaxed);
}

/// Whether there are modules at all.
pub(crate) fn any() -> bool {
    Path::new(MODULES).is_dir()
}

/// Loads what `purpose` takes. A kernel that has it built in has no directory
/// for it.
pub(crate) fn load(purpose: &str) -> io::Result<()> {
    if LEFT.load(Ordering::Relaxed) {
        return Err(io::Error::other("the initramfs was left"));
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

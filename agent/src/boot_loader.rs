//! The configuration of the machine's boot loader.

use std::io;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::command;

/// The program of vimg's bases that writes the kernel parameters for their `grub.cfg`.
const OWN: &str = "/usr/lib/vimg/update-grub";
/// The program of GRUB that writes `grub.cfg`.
const GRUB: &str = "/usr/sbin/update-grub";

/// Time limit of these programs.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(300);

/// Prepares the program that writes the configuration again; `None` if there is none.
pub(crate) fn update() -> Option<Command> {
    [OWN, GRUB].into_iter().find(|program| Path::new(program).exists()).map(command::command)
}

/// Writes the configuration of a machine that is sealed: a file in `/etc/default/grub.d`
/// may have changed since a program last did.
///
/// # Errors
///
/// The program failed.
pub(crate) fn settle() -> io::Result<()> {
    if !Path::new(OWN).exists() {
        return Ok(());
    }
    match command::query(&mut command::command(OWN), TIMEOUT) {
        Ok((true, _)) => Ok(()),
        Ok((false, _)) => {
            Err(io::Error::other("update-grub failed: check /etc/default/grub and /etc/default/grub.d/*.cfg"))
        }
        Err(failure) => Err(io::Error::other(failure.message)),
    }
}

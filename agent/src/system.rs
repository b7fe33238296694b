//! The machine's users, groups, ports and boot files, and a few kernel calls.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::fsctl;

/// A line of `/etc/passwd`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Account {
    pub(crate) name: String,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) comment: String,
    pub(crate) home: String,
    pub(crate) shell: String,
}

/// A line of `/etc/group`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Group {
    pub(crate) name: String,
    pub(crate) gid: u32,
    pub(crate) members: Vec<String>,
}

fn lines(path: &str) -> Vec<Vec<String>> {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.lines().map(|line| line.split(':').map(str::to_owned).collect()).collect()
}

/// Looks up a user. A static program has no NSS, so this finds only local users, which are
/// the only ones that an image can have.
pub(crate) fn user(name: &str) -> Option<Account> {
    lines("/etc/passwd").into_iter().find(|f| f[0] == name).and_then(|f| {
        Some(Account {
            name: f[0].clone(),
            uid: f.get(2)?.parse().ok()?,
            gid: f.get(3)?.parse().ok()?,
            comment: f.get(4)?.clone(),
            home: f.get(5)?.clone(),
            shell: f.get(6)?.clone(),
        })
    })
}

/// Finds the user whose home directory contains `path`; returns `(uid, gid)`. The home of
/// a system user counts only if that user is the `owner` of the file: a web server should
/// not own the directories of a site below `/var/www`.
pub(crate) fn home_of(path: &Path, owner: u32) -> Option<(u32, u32)> {
    /// The lowest uid of a person (`UID_MIN` in login.defs(5)).
    const PEOPLE: u32 = 1000;
    let homes = lines("/etc/passwd").into_iter().filter_map(|f| {
        let home = f.get(5).filter(|home| is_home(home))?.clone();
        Some((home, (f.get(2)?.parse().ok()?, f.get(3)?.parse().ok()?)))
    });
    let homes = homes.filter(|(_, (uid, _))| *uid >= PEOPLE || *uid == owner);
    let above = homes.filter(|(home, _)| path.starts_with(home) && path != Path::new(home));
    above.max_by_key(|(home, _)| home.len()).map(|(_, owner)| owner)
}

/// Whether a path can be a user's home: system users have homes like `/`, `/bin`
/// or `/nonexistent`.
pub(crate) fn is_home(home: &str) -> bool {
    const SYSTEM: [&str; 9] = ["/usr", "/etc", "/dev", "/proc", "/sys", "/run", "/boot", "/bin", "/sbin"];
    let path = Path::new(home);
    let depth = path.components().count();
    path.is_absolute()
        && (depth > 2 || home == "/root")
        && !SYSTEM.iter().any(|system| path.starts_with(system))
}

/// Lists all groups.
pub(crate) fn groups() -> Vec<Group> {
    lines("/etc/group")
        .into_iter()
        .filter_map(|f| {
            Some(Group {
                name: f[0].clone(),
                gid: f.get(2)?.parse().ok()?,
                members: f.get(3)?.split(',').filter(|m| !m.is_empty()).map(str::to_owned).collect(),
            })
        })
        .collect()
}

/// Looks up a group.
pub(crate) fn group(name: &str) -> Option<Group> {
    groups().into_iter().find(|g| g.name == name)
}

/// Blocks all writes to the root filesystem, or allows them again.
pub(crate) fn freeze(hold: bool) -> io::Result<()> {
    fsctl::freeze(File::open("/")?, hold)
}

/// Turns address randomisation off for all children. Ignores errors: the children are only
/// slower with it.
pub(crate) fn fix_addresses() {
    // SAFETY: the call takes a number and has no other effect.
    unsafe { libc::personality(libc::ADDR_NO_RANDOMIZE as libc::c_ulong) };
}

/// Makes a mounted filesystem the root of this process and its children.
pub(crate) fn switch_root(root: &str) -> io::Result<()> {
    std::env::set_current_dir(root)?;
    rustix::mount::mount_move(".", "/")?;
    rustix::process::chroot(".")?;
    std::env::set_current_dir("/")
}

/// Finds the virtio-serial port with this name. Looks in sysfs, because the agent may start
/// before udev has created the links by name.
pub(crate) fn port(name: &str) -> Option<PathBuf> {
    for entry in fs::read_dir("/sys/class/virtio-ports").ok()?.flatten() {
        let text = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
        if text.trim_end() == name {
            return Some(Path::new("/dev").join(entry.file_name()));
        }
    }
    None
}

/// The kernel and initrd that the machine would boot next: in Debian, these are links to
/// the newest kernel.
pub(crate) const BOOT_FILES: [&str; 2] = ["/vmlinuz", "/initrd.img"];

/// Returns a text that changes if one of the [`BOOT_FILES`] changes.
pub(crate) fn boot_stamp() -> String {
    use std::os::unix::fs::MetadataExt;
    BOOT_FILES
        .iter()
        .map(|path| match (fs::canonicalize(path), fs::metadata(path)) {
            (Ok(real), Ok(meta)) => {
                format!("{}:{}:{}.{};", real.display(), meta.len(), meta.mtime(), meta.mtime_nsec())
            }
            _ => "none;".to_owned(),
        })
        .collect()
}

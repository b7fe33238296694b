//! Retargets a booted machine: writes the files of another disk, if the result is the same
//! as a boot from that disk.
//!
//! A boot can't have depended on the content of a file that was not opened since the
//! kernel mounted the disk; such a file can be written afterwards. The agent refuses
//! everything that could make a difference, and vimg boots the machine instead: a file
//! that was opened, that a program watches, or that the machine has changed itself, and
//! filesystems that could read files without opening them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::{DirEntryExt, FileExt, MetadataExt};
use std::time::{Duration, Instant};

use rustix::fs::{Timespec, Timestamps, UTIME_OMIT};

use crate::fetch::{Channel, Received};
use crate::opened::{INODE_AND_GENERATION, Opened, Watch};
use crate::protocol::{Change, Inode, MAX_RETARGETED, Time};

/// Filesystems without files of the disk. Any other mounted filesystem, such as an overlay
/// or an image in a file, may read files of the disk without opening them.
const APART: [&str; 22] = [
    "autofs",
    "binfmt_misc",
    "bpf",
    "cgroup",
    "cgroup2",
    "configfs",
    "debugfs",
    "devpts",
    "devtmpfs",
    "efivarfs",
    "fusectl",
    "hugetlbfs",
    "mqueue",
    "nsfs",
    "proc",
    "pstore",
    "ramfs",
    "rpc_pipefs",
    "securityfs",
    "sysfs",
    "tmpfs",
    "tracefs",
];

/// How long the machine may have run since its boot was examined, before it is examined
/// again.
const FRESH: Duration = Duration::from_secs(1);

/// Events of inotify that retargeting causes: `IN_ACCESS`, `IN_MODIFY`, `IN_CLOSE_WRITE`,
/// `IN_CLOSE_NOWRITE`, `IN_OPEN`.
const NOTICED: u32 = 0x3B;
/// Events that only opening and reading a file or directory causes.
const LOOKED_AT: u32 = 0x31;

/// Receives the new contents of the changed files, joined.
pub(crate) fn receive(channel: &mut Channel, changes: &[Change]) -> io::Result<Vec<u8>> {
    let total = changes.iter().filter_map(|c| c.content).fold(0, u64::saturating_add);
    if total > MAX_RETARGETED {
        return Err(io::Error::other("the changed files are too large"));
    }
    let mut contents = Vec::with_capacity(total as usize);
    while (contents.len() as u64) < total {
        match channel.receive()? {
            Received::Data(bytes) => contents.extend(bytes),
            _ => return Err(io::Error::other("unexpected message: expected data")),
        }
    }
    Ok(contents)
}

pub(crate) fn unable(error: io::Error) -> String {
    format!("its snapshot can't be retargeted: {error}")
}

/// The record of a finished boot. In an emulated machine, reading it takes as long as all
/// other work of retargeting, so it is read once, before the snapshot.
pub(crate) struct Boot {
    watch: Watch,
    ended: Result<Ended, String>,
    /// When it was read, by the machine's clock, which stops in a snapshot.
    at: Instant,
}

struct Ended {
    opened: BTreeSet<Inode>,
    /// Numbers of inodes that a program watches.
    watched: BTreeSet<u32>,
}

impl Boot {
    /// Reads the record, if the boot was watched.
    pub(crate) fn look() -> Option<Self> {
        let mut watch = Watch::take_over().ok()?;
        let look = |watch: &mut Watch| {
            let opened = inodes(watch.opened().map_err(unable)?);
            Ok(Ended { opened, watched: watched()? })
        };
        let ended = look(&mut watch);
        Some(Self { watch, ended, at: Instant::now() })
    }

    /// Ends the recording: from here on, the machine depends on more than its boot.
    pub(crate) fn over(&mut self) {
        self.watch.end();
        self.ended = Err("it has been running since its boot".into());
    }
}

/// Does the work of [`make`] without changing files: opens each file, writes its first
/// byte again, and sets its time to the current one. Skips files that programs watch.
pub(crate) fn rehearse(changes: &[Change], boot: Option<&Boot>) {
    let Some(Boot { ended: Ok(boot), at, .. }) = boot else { return };
    // A program that was started since then may watch files.
    if at.elapsed() > FRESH {
        return;
    }
    let Ok(root) = File::open("/") else { return };
    let unnoticed = |change: &&Change| {
        !boot.opened.contains(&change.inode) && !boot.watched.contains(&change.inode.number)
    };
    for change in changes.iter().filter(unnoticed) {
        // Ignore errors: `make` will report them.
        let _ = go_through(&root, change);
    }
}

fn go_through(root: &File, change: &Change) -> io::Result<()> {
    let writes = change.content.is_some();
    let file = open(root, change.inode, if writes { libc::O_RDWR } else { libc::O_RDONLY })?;
    let meta = file.metadata()?;
    if !is_as_it_was(&meta, change) || writes && is_special(&file, &meta)? {
        return Ok(());
    }
    let mut first = [0];
    let written = match writes && meta.is_file() && file.read_at(&mut first, 0)? == 1 {
        true => file.write_all_at(&first, 0),
        false => Ok(()),
    };
    set_time(&file, &change.modified).and(written)
}

/// Makes the changes.
///
/// # Errors
///
/// The reason why that is not possible. Some changes may have been made.
pub(crate) fn make(changes: &[Change], mut contents: &[u8], boot: Option<&mut Boot>) -> Result<(), String> {
    let Boot { watch, ended, at } = boot.ok_or("it has no record of the files that its boot opened")?;
    let boot = ended.as_mut().map_err(|why| why.clone())?;
    // A program that was started since then may watch files, or mount filesystems.
    if at.elapsed() > FRESH {
        boot.watched.extend(watched()?);
    }
    let since = inodes(by_others(watch.opened().map_err(unable)?));
    let (root, watched) = (File::open("/").map_err(unable)?, &boot.watched);
    for change in changes {
        let path = change.path.as_deref().unwrap_or("a file");
        let Some(length) = change.content else {
            // Only the modification time differs. A program that opened the file may have
            // read the time, and a program that watches it would notice the change.
            let known = boot.opened.contains(&change.inode) || since.contains(&change.inode);
            if !known && !watched.contains(&change.inode.number) {
                touch(&root, change).map_err(unable)?;
            } else if change.chosen {
                return Err(format!("{path} was opened during the boot, and its modification time differs"));
            }
            continue;
        };
        let file = open(&root, change.inode, libc::O_RDWR).map_err(unable)?;
        let meta = file.metadata().map_err(unable)?;
        if boot.opened.contains(&change.inode) || since.contains(&change.inode) {
            return Err(format!("{path} was opened during the boot"));
        }
        if is_special(&file, &meta).map_err(unable)?
            || !is_as_it_was(&meta, change)
            || !meta.is_file()
            || meta.nlink() != 1
        {
            return Err(format!("{path} was changed during the boot"));
        }
        if watched.contains(&change.inode.number) {
            return Err(format!("a program watches {path}"));
        }
        let (content, rest) = contents
            .split_at_checked(length as usize)
            .ok_or("the contents of the changed files are incomplete")?;
        contents = rest;
        (&file).write_all(content).and_then(|()| file.set_len(length)).map_err(unable)?;
        set_time(&file, &change.to).map_err(unable)?;
    }
    // No program may have read an old content, or half of a new one, meanwhile.
    let others = inodes(by_others(watch.opened().map_err(unable)?));
    match changes.iter().find(|change| change.content.is_some() && others.contains(&change.inode)) {
        Some(change) => Err(format!("{} was opened meanwhile", change.path.as_deref().unwrap_or("a file"))),
        None => Ok(()),
    }
}

fn watched() -> Result<BTreeSet<u32>, String> {
    World::look()?.watched(&File::open("/").map_err(unable)?)
}

/// Keeps only files that other processes have opened.
fn by_others(mut opened: Opened) -> Opened {
    opened.retain(|(_, who)| *who != std::process::id());
    opened
}

/// Whether the file has mode bits or attributes that a write would clear.
fn is_special(file: &File, meta: &fs::Metadata) -> io::Result<bool> {
    Ok(meta.mode() & 0o6000 != 0 || rustix::fs::flistxattr(file, &mut [0; 0])? != 0)
}

fn inodes(opened: Opened) -> BTreeSet<Inode> {
    opened.into_iter().map(|(inode, _)| inode).collect()
}

fn is_as_it_was(meta: &fs::Metadata, change: &Change) -> bool {
    // The size of a directory does not matter.
    (meta.is_dir() || meta.size() == change.size)
        && meta.mtime() == change.modified.seconds
        && meta.mtime_nsec() == i64::from(change.modified.nanoseconds)
}

/// Sets a file's modification time, unless the machine has changed or deleted the file.
fn touch(root: &File, change: &Change) -> io::Result<()> {
    let file = match open(root, change.inode, libc::O_RDONLY) {
        Err(error) if [Some(libc::ESTALE), Some(libc::ENOENT)].contains(&error.raw_os_error()) => {
            return Ok(());
        }
        file => file?,
    };
    if is_as_it_was(&file.metadata()?, change) {
        set_time(&file, &change.to)?;
    }
    Ok(())
}

fn set_time(file: &File, to: &Time) -> io::Result<()> {
    let times = Timestamps {
        last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        last_modification: Timespec { tv_sec: to.seconds, tv_nsec: i64::from(to.nanoseconds) },
    };
    rustix::fs::futimens(file, &times).map_err(Into::into)
}

/// Opens a file of the filesystem of `root` by its inode.
fn open(root: &File, inode: Inode, flags: libc::c_int) -> io::Result<File> {
    /// `struct file_handle` with the eight bytes of this kind.
    #[repr(C)]
    struct Handle {
        bytes: u32,
        kind: i32,
        inode: u32,
        generation: u32,
    }
    let mut handle =
        Handle { bytes: 8, kind: INODE_AND_GENERATION, inode: inode.number, generation: inode.generation };
    let flags = flags | libc::O_CLOEXEC | libc::O_NONBLOCK | libc::O_NOFOLLOW;
    // SAFETY: the handle has the length that it states, and outlives the call, which
    // returns a descriptor that we own.
    unsafe {
        match libc::open_by_handle_at(root.as_raw_fd(), (&raw mut handle).cast(), flags) {
            -1 => Err(io::Error::last_os_error()),
            fd => Ok(File::from_raw_fd(fd)),
        }
    }
}

/// The inotify watches of all processes.
struct World {
    /// Watched inodes, and the events that they are watched for, by the kernel's number of
    /// the filesystem's device.
    watches: BTreeMap<u64, BTreeSet<(Inode, u32)>>,
}

impl World {
    /// Examines all processes. Ignores the fanotify watch of this one.
    ///
    /// # Errors
    ///
    /// The machine has something that could read or watch files unnoticed.
    fn look() -> Result<Self, String> {
        let mut watches: BTreeMap<u64, BTreeSet<(Inode, u32)>> = BTreeMap::new();
        let mut namespaces = BTreeSet::new();
        for process in fs::read_dir("/proc").map_err(unable)?.flatten() {
            let Some(number) = process.file_name().to_str().and_then(|n| n.parse::<u32>().ok()) else {
                continue;
            };
            let path = process.path();
            // Skip a process that has ended meanwhile.
            let namespace = fs::read_link(path.join("ns/mnt")).ok();
            if let Some(namespace) = namespace
                && !namespaces.contains(&namespace)
                && let Ok(mounts) = fs::read_to_string(path.join("mountinfo"))
            {
                if let Some(kind) = foreign(&mounts) {
                    return Err(format!("it has mounted a filesystem of type {kind}"));
                }
                namespaces.insert(namespace);
            }
            for fd in fs::read_dir(path.join("fd")).into_iter().flatten().flatten() {
                let Ok(link) = fs::read_link(fd.path()) else { continue };
                match link.to_str() {
                    Some("anon_inode:inotify") => {
                        let info = fs::read_to_string(path.join("fdinfo").join(fd.file_name()));
                        for (device, watched) in info.unwrap_or_default().lines().filter_map(watch) {
                            watches.entry(device).or_default().insert(watched);
                        }
                    }
                    Some("anon_inode:[fanotify]") if number != std::process::id() => {
                        return Err("one of its programs watches files with fanotify".into());
                    }
                    _ => {}
                }
            }
        }
        if fs::read_to_string("/proc/swaps").is_ok_and(|swaps| swaps.lines().any(|l| l.contains(" file\t"))) {
            return Err("it has a swap file".into());
        }
        // An overlay that was mounted during the boot may be unmounted by now.
        let overlays = |line: &str| line.ends_with("\toverlay");
        if fs::read_to_string("/proc/filesystems").is_ok_and(|all| all.lines().any(overlays)) {
            return Err("its kernel supports overlays, which read files without opening them".into());
        }
        Ok(Self { watches })
    }

    /// Lists the numbers of watched inodes: a program watches the file itself or its
    /// directory.
    fn watched(&self, root: &File) -> Result<BTreeSet<u32>, String> {
        let device = root.metadata().map_err(unable)?.dev();
        // The kernel's internal form of the number: 20 bits for the minor number.
        let device = u64::from(rustix::fs::major(device)) << 20 | u64::from(rustix::fs::minor(device));
        let mut watched = BTreeSet::new();
        for (inode, mask) in self.watches.get(&device).into_iter().flatten() {
            if mask & LOOKED_AT != 0 {
                return Err("one of its programs watches which files are read".into());
            }
            watched.insert(inode.number);
            let Ok(file) = open(root, *inode, libc::O_RDONLY) else { continue };
            if let Ok(entries) = fs::read_dir(format!("/proc/self/fd/{}", file.as_raw_fd())) {
                watched.extend(entries.flatten().map(|entry| entry.ino() as u32));
            }
        }
        Ok(watched)
    }
}

/// Finds the type of a filesystem in a process's list of mounts that may read files of the
/// root filesystem: one that is neither in [`APART`] nor on a partition of the same disk.
fn foreign(mounts: &str) -> Option<&str> {
    // The third field is the device, the fifth where it is mounted.
    let major =
        |line: &str| line.split(' ').nth(2).and_then(|device| device.split(':').next()).map(str::to_owned);
    let root = mounts.lines().find(|line| line.split(' ').nth(4) == Some("/")).and_then(major);
    mounts.lines().find_map(|line| {
        let kind = line.split_once(" - ")?.1.split(' ').next()?;
        (!APART.contains(&kind) && major(line) != root).then_some(kind)
    })
}

/// Parses a line of `fdinfo` about an inotify watch (`fs/notify/fdinfo.c`): the device and
/// the inode, whose handle is at the end of the line. Returns `None` if the watch has no
/// event of [`NOTICED`].
fn watch(line: &str) -> Option<(u64, (Inode, u32))> {
    let field = |name: &str| line.split(' ').find_map(|f| f.strip_prefix(name)?.strip_prefix(':'));
    let mask = u32::from_str_radix(field("mask")?, 16).ok()? & NOTICED;
    if mask == 0 {
        return None;
    }
    let device = u64::from_str_radix(field("sdev")?, 16).ok()?;
    let number = u32::from_str_radix(field("ino")?, 16).ok()?;
    let generation = field("f_handle").and_then(|handle| {
        let bytes: Vec<u8> = (8..16)
            .step_by(2)
            .filter_map(|at| u8::from_str_radix(handle.get(at..at + 2)?, 16).ok())
            .collect();
        Some(u32::from_le_bytes(bytes.try_into().ok()?))
    });
    Some((device, (Inode { number, generation: generation.unwrap_or(0) }, mask)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn watches_name_inodes() {
        let line = "inotify wd:1 ino:9e7e sdev:800013 mask:800afce ignored_mask:0 fhandle-bytes:8 \
                    fhandle-type:1 f_handle:7e9e0000640d1b6d";
        let inode = Inode { number: 0x9e7e, generation: 0x6d1b_0d64 };
        assert_eq!(watch(line), Some((0x80_0013, (inode, 0xA))));
        assert_eq!(watch("pos:\t0"), None);
        // A watch for moves and new entries only.
        assert_eq!(watch(&line.replace("800afce", "f84")), None);
    }

    #[test]
    fn what_is_mounted_may_hold_files_of_the_disk() {
        let own = "25 1 254:3 / / rw,relatime shared:1 - ext4 /dev/vda3 rw\n\
                   26 25 0:5 / /dev rw - devtmpfs udev rw\n\
                   27 25 254:2 / /boot/efi rw - vfat /dev/vda2 rw\n\
                   30 25 254:3 /srv /mnt rw - ext4 /dev/vda3 rw\n";
        assert_eq!(foreign(own), None);
        let overlay = format!("{own}40 25 0:60 / /var/lib/x rw - overlay overlay rw,lowerdir=/a\n");
        assert_eq!(foreign(&overlay), Some("overlay"));
        let image = format!("{own}41 25 7:0 / /snap/core ro,nodev - squashfs /dev/loop0 ro\n");
        assert_eq!(foreign(&image), Some("squashfs"));
    }
}

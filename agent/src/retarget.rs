//! Gives a machine that has booted the files of another disk, where that
//! comes to the same as booting from it.
//!
//! A boot can't have depended on the content of a file that nobody has opened
//! since the kernel mounted the disk; such a file can be written afterwards.
//! Whatever could make a difference is refused, and the machine then boots:
//! a file that was opened, one that somebody watches, one that the machine has
//! changed itself, and filesystems that read their files past what is watched.

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

/// Filesystems that hold nothing of the disk. Of any other that is mounted,
/// an overlay or an image in a file, the disk's own files may be read without
/// being opened.
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

/// How long a machine may have gone on before it is looked at again.
const FRESH: Duration = Duration::from_secs(1);

/// What writing to a file, or to a directory's times, is seen as: `IN_ACCESS`,
/// `IN_MODIFY`, `IN_CLOSE_WRITE`, `IN_CLOSE_NOWRITE`, `IN_OPEN`.
const NOTICED: u32 = 0x3B;
/// What opening and reading a file or a directory is seen as.
const LOOKED_AT: u32 = 0x31;

/// Receives what the changed files are to hold, one after the other.
pub(crate) fn receive(channel: &mut Channel, changes: &[Change]) -> io::Result<Vec<u8>> {
    let total = changes.iter().filter_map(|c| c.content).fold(0, u64::saturating_add);
    if total > MAX_RETARGETED {
        return Err(io::Error::other("more than is carried"));
    }
    let mut contents = Vec::with_capacity(total as usize);
    while (contents.len() as u64) < total {
        match channel.receive()? {
            Received::Data(bytes) => contents.extend(bytes),
            _ => return Err(io::Error::other("a message where data was due")),
        }
    }
    Ok(contents)
}

pub(crate) fn unable(error: io::Error) -> String {
    format!("its memory can't be carried over: {error}")
}

/// What is known of a boot that has ended: looking takes an emulated machine
/// as long as everything else, so it is done once, before the machine is kept.
pub(crate) struct Boot {
    watch: Watch,
    ended: Result<Ended, String>,
    /// By the machine's clock, which stands still while it is kept.
    at: Instant,
}

struct Ended {
    opened: BTreeSet<Inode>,
    /// Numbers of inodes whose change would be noticed.
    watched: BTreeSet<u32>,
}

impl Boot {
    /// Looks back, if the boot was watched.
    pub(crate) fn look() -> Option<Self> {
        let mut watch = Watch::take_over().ok()?;
        let look = |watch: &mut Watch| {
            let opened = inodes(watch.opened().map_err(unable)?);
            Ok(Ended { opened, watched: watched()? })
        };
        let ended = look(&mut watch);
        Some(Self { watch, ended, at: Instant::now() })
    }

    /// From here on the machine depends on more than its boot.
    pub(crate) fn over(&mut self) {
        self.watch.end();
        self.ended = Err("it has gone on since it booted".into());
    }
}

/// Does what [`make`] does to files as they are: each is opened, its first byte
/// written again and its time set to what it is. Nobody may notice.
pub(crate) fn rehearse(changes: &[Change], boot: Option<&Boot>) {
    let Some(Boot { ended: Ok(boot), at, .. }) = boot else { return };
    // Who was started since may watch.
    if at.elapsed() > FRESH {
        return;
    }
    let Ok(root) = File::open("/") else { return };
    let unnoticed = |change: &&Change| {
        !boot.opened.contains(&change.inode) && !boot.watched.contains(&change.inode.number)
    };
    for change in changes.iter().filter(unnoticed) {
        // What fails of it is for `make` to say.
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

/// Makes the changes, or says in a sentence why not. Some of them may have been
/// made then.
pub(crate) fn make(changes: &[Change], mut contents: &[u8], boot: Option<&mut Boot>) -> Result<(), String> {
    let Boot { watch, ended, at } = boot.ok_or("it is not known what its boot has read")?;
    let boot = ended.as_mut().map_err(|why| why.clone())?;
    // Who was started since may watch, or read unseen.
    if at.elapsed() > FRESH {
        boot.watched.extend(watched()?);
    }
    let since = inodes(by_others(watch.opened().map_err(unable)?));
    let (root, watched) = (File::open("/").map_err(unable)?, &boot.watched);
    for change in changes {
        let path = change.path.as_deref().unwrap_or("a file");
        let Some(length) = change.content else {
            // The same in both: what is left is when it was written. Who has
            // opened it may have noted the time, and who watches would notice.
            let known = boot.opened.contains(&change.inode) || since.contains(&change.inode);
            if !known && !watched.contains(&change.inode.number) {
                touch(&root, change).map_err(unable)?;
            } else if change.chosen {
                return Err(format!("{path} was looked at while it booted, and has another time"));
            }
            continue;
        };
        let file = open(&root, change.inode, libc::O_RDWR).map_err(unable)?;
        let meta = file.metadata().map_err(unable)?;
        if boot.opened.contains(&change.inode) || since.contains(&change.inode) {
            return Err(format!("{path} was opened while it booted"));
        }
        if is_special(&file, &meta).map_err(unable)?
            || !is_as_it_was(&meta, change)
            || !meta.is_file()
            || meta.nlink() != 1
        {
            return Err(format!("{path} was changed while it booted"));
        }
        if watched.contains(&change.inode.number) {
            return Err(format!("a program watches {path}"));
        }
        let (content, rest) = contents.split_at_checked(length as usize).ok_or("its contents are short")?;
        contents = rest;
        (&file).write_all(content).and_then(|()| file.set_len(length)).map_err(unable)?;
        set_time(&file, &change.to).map_err(unable)?;
    }
    // Nobody else may have read what was there before, or half of what is.
    let others = inodes(by_others(watch.opened().map_err(unable)?));
    match changes.iter().find(|change| change.content.is_some() && others.contains(&change.inode)) {
        Some(change) => Err(format!("{} was opened meanwhile", change.path.as_deref().unwrap_or("a file"))),
        None => Ok(()),
    }
}

fn watched() -> Result<BTreeSet<u32>, String> {
    World::look()?.watched(&File::open("/").map_err(unable)?)
}

/// What others than this process have opened.
fn by_others(mut opened: Opened) -> Opened {
    opened.retain(|(_, who)| *who != std::process::id());
    opened
}

/// Whether it has bits or attributes that are lost when it is written.
fn is_special(file: &File, meta: &fs::Metadata) -> io::Result<bool> {
    Ok(meta.mode() & 0o6000 != 0 || rustix::fs::flistxattr(file, &mut [0; 0])? != 0)
}

fn inodes(opened: Opened) -> BTreeSet<Inode> {
    opened.into_iter().map(|(inode, _)| inode).collect()
}

fn is_as_it_was(meta: &fs::Metadata, change: &Change) -> bool {
    // The size of a directory says nothing.
    (meta.is_dir() || meta.size() == change.size)
        && meta.mtime() == change.modified.seconds
        && meta.mtime_nsec() == i64::from(change.modified.nanoseconds)
}

/// Sets a file's time, unless the machine itself has changed or removed it.
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

/// Opens a file of the filesystem of `root` without its name.
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
    // SAFETY: the handle is as long as it says, and lives through the call,
    // which gives a descriptor that is ours.
    unsafe {
        match libc::open_by_handle_at(root.as_raw_fd(), (&raw mut handle).cast(), flags) {
            -1 => Err(io::Error::last_os_error()),
            fd => Ok(File::from_raw_fd(fd)),
        }
    }
}

/// What processes have besides open files.
struct World {
    /// Inodes that somebody watches, by the kernel's number of their
    /// filesystem's device.
    watches: BTreeMap<u64, BTreeSet<(Inode, u32)>>,
}

impl World {
    /// Looks at all processes. The watch of this one is our own.
    fn look() -> Result<Self, String> {
        let mut watches: BTreeMap<u64, BTreeSet<(Inode, u32)>> = BTreeMap::new();
        let mut namespaces = BTreeSet::new();
        for process in fs::read_dir("/proc").map_err(unable)?.flatten() {
            let Some(number) = process.file_name().to_str().and_then(|n| n.parse::<u32>().ok()) else {
                continue;
            };
            let path = process.path();
            // Who has gone meanwhile has nothing left.
            let namespace = fs::read_link(path.join("ns/mnt")).ok();
            if let Some(namespace) = namespace
                && !namespaces.contains(&namespace)
                && let Ok(mounts) = fs::read_to_string(path.join("mountinfo"))
            {
                if let Some(kind) = foreign(&mounts) {
                    return Err(format!("it has mounted a filesystem of the kind {kind}"));
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
                        return Err("a program of it watches files".into());
                    }
                    _ => {}
                }
            }
        }
        if fs::read_to_string("/proc/swaps").is_ok_and(|swaps| swaps.lines().any(|l| l.contains(" file\t"))) {
            return Err("it swaps to a file".into());
        }
        // One that was mounted during the boot may be gone by now.
        let overlays = |line: &str| line.ends_with("\toverlay");
        if fs::read_to_string("/proc/filesystems").is_ok_and(|all| all.lines().any(overlays)) {
            return Err("its kernel has overlays, through which files are read unseen".into());
        }
        Ok(Self { watches })
    }

    /// The numbers of inodes whose change would be noticed: they are watched
    /// themselves, or the directory is that they are in.
    fn watched(&self, root: &File) -> Result<BTreeSet<u32>, String> {
        let device = root.metadata().map_err(unable)?.dev();
        // As the kernel has it inside: twenty bits for the minor number.
        let device = u64::from(rustix::fs::major(device)) << 20 | u64::from(rustix::fs::minor(device));
        let mut watched = BTreeSet::new();
        for (inode, mask) in self.watches.get(&device).into_iter().flatten() {
            if mask & LOOKED_AT != 0 {
                return Err("a program of it watches what is read".into());
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

/// A filesystem in a process's list of mounts that may hold files of the root
/// filesystem: neither apart from all disks nor on a partition beside it.
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

/// A line of `fdinfo` about an inotify watch (`fs/notify/fdinfo.c`): the
/// device and the inode, whose handle stands at its end; none if what is done
/// here is not among what is watched for.
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
        // Whether it is moved, and what is made in it.
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

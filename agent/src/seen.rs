//! What has been opened of a machine's disk since it began to boot.
//!
//! Who boots a machine that is to be kept wants to know later what the boot
//! can't have depended on: a file that nobody opened may have had any content.
//! The kernel notes it (fanotify, `include/uapi/linux/fanotify.h`), from before
//! the first program of the disk runs, for a process of ours that outlives the
//! change of root. It is asked at a socket without a file, and ends when the
//! machine goes on.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::protocol::Inode;

/// The socket's name.
const SOCKET: &[u8] = b"vimg.seen";
/// How long an answer may take.
const ANSWER: Duration = Duration::from_secs(30);

/// Questions.
const LIST: u8 = b'l';
const END: u8 = b'e';

/// `sizeof(struct fanotify_event_metadata)`.
const EVENT: usize = 24;
/// Where in it the number of the process is.
const PROCESS: usize = 20;
/// `FAN_EVENT_INFO_TYPE_FID`, and where in such a record the handle begins:
/// after four bytes of head and eight of the filesystem's id.
const FID: u8 = 1;
const HANDLE: usize = 12;
/// `FILEID_INO32_GEN` (`include/linux/exportfs.h`): a handle is the number of
/// an inode and its generation.
pub(crate) const INODE_AND_GENERATION: i32 = 1;

/// Has a process watch what is opened of the filesystem at `root`, as long as
/// it is not told to end.
pub(crate) fn watch(root: &str) -> io::Result<()> {
    let path = std::ffi::CString::new(root)?;
    let flags = libc::FAN_CLASS_NOTIF
        | libc::FAN_CLOEXEC
        | libc::FAN_NONBLOCK
        | libc::FAN_UNLIMITED_QUEUE
        | libc::FAN_REPORT_FID;
    // SAFETY: the call takes two numbers and gives a descriptor that is ours.
    let fd = unsafe {
        match libc::fanotify_init(flags, libc::O_RDONLY as u32) {
            -1 => return Err(io::Error::last_os_error()),
            fd => OwnedFd::from_raw_fd(fd),
        }
    };
    let what = libc::FAN_MARK_ADD | libc::FAN_MARK_FILESYSTEM;
    // SAFETY: `path` ends with a zero and lives through the call.
    let marked =
        unsafe { libc::fanotify_mark(fd.as_raw_fd(), what, libc::FAN_OPEN, libc::AT_FDCWD, path.as_ptr()) };
    if marked != 0 {
        return Err(io::Error::last_os_error());
    }
    Command::new("/init")
        .arg("watch")
        .stdin(Stdio::from(fd))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .map(|_| ())
}

/// The process that watches: standard input is where the kernel tells it.
pub fn keep_watch() -> io::Result<()> {
    let listener = UnixListener::bind_addr(&SocketAddr::from_abstract_name(SOCKET)?)?;
    let mut events = File::from(rustix::io::dup(io::stdin())?);
    let mut seen = Seen::default();
    for stream in listener.incoming() {
        let mut stream = stream?;
        // Anybody may connect.
        let theirs = rustix::net::sockopt::socket_peercred(&stream).is_ok_and(|c| c.uid.is_root());
        let mut question = [0];
        if !theirs
            || stream.set_read_timeout(Some(ANSWER)).is_err()
            || stream.read_exact(&mut question).is_err()
        {
            continue;
        }
        if question[0] == END {
            return Ok(());
        }
        seen.drain(&mut events)?;
        // Who does not wait for the answer misses it, and knows that.
        let _ = stream.write_all(&seen.answer());
        seen.opened.clear();
    }
    Ok(())
}

/// Inodes, and the numbers of the processes that opened them.
pub(crate) type Opened = BTreeSet<(Inode, u32)>;

/// What was opened.
#[derive(Debug, Default)]
struct Seen {
    opened: Opened,
    /// Something was opened, and the kernel could not say what.
    unsure: bool,
}

impl Seen {
    fn drain(&mut self, events: &mut impl Read) -> io::Result<()> {
        let mut buffer = vec![0; 256 << 10];
        loop {
            match events.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(n) => self.take(&buffer[..n]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Takes what a read gave: one event after the other.
    fn take(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let length = number(bytes, 0) as usize;
            let Some(event) = bytes.get(..length).filter(|event| event.len() >= EVENT) else {
                self.unsure = true;
                return;
            };
            match inode(&event[EVENT..]) {
                Some(inode) => {
                    self.opened.insert((inode, number(event, PROCESS)));
                }
                None => self.unsure = true,
            }
            bytes = &bytes[length..];
        }
    }

    fn answer(&self) -> Vec<u8> {
        let mut answer = vec![u8::from(self.unsure)];
        answer.extend((self.opened.len() as u32).to_le_bytes());
        for (inode, process) in &self.opened {
            answer.extend([inode.number, inode.generation, *process].map(u32::to_le_bytes).concat());
        }
        answer
    }
}

/// The inode that an event's record names. The queue's overflow has none.
fn inode(record: &[u8]) -> Option<Inode> {
    let handle = record.get(HANDLE..HANDLE + 16)?;
    let plain =
        record[0] == FID && number(handle, 0) == 8 && number(handle, 4) == INODE_AND_GENERATION as u32;
    plain.then(|| Inode { number: number(handle, 8), generation: number(handle, 12) })
}

fn number(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).map_or(0, |b| u32::from_ne_bytes([b[0], b[1], b[2], b[3]]))
}

/// Asks the process that watches, which is told by its number.
fn ask(question: u8) -> io::Result<(UnixStream, u32)> {
    let mut stream = UnixStream::connect_addr(&SocketAddr::from_abstract_name(SOCKET)?)?;
    let watcher = rustix::net::sockopt::socket_peercred(&stream)?;
    if !watcher.uid.is_root() {
        return Err(io::Error::other("somebody else answers"));
    }
    stream.set_read_timeout(Some(ANSWER))?;
    stream.write_all(&[question])?;
    Ok((stream, watcher.pid.as_raw_nonzero().get().unsigned_abs()))
}

/// What was opened since this was asked last, or since the machine began to
/// boot, and the number of the process that knows.
pub(crate) fn list() -> io::Result<(Opened, u32)> {
    let mut answer = Vec::new();
    let (mut stream, watcher) = ask(LIST)?;
    stream.read_to_end(&mut answer)?;
    let unsure = || io::Error::other("it is not known what the boot has read");
    let (head, inodes) = answer.split_at_checked(5).ok_or_else(unsure)?;
    if head[0] != 0 || inodes.len() != 12 * u32::from_le_bytes([head[1], head[2], head[3], head[4]]) as usize
    {
        return Err(unsure());
    }
    let inode = |b: &[u8]| (Inode { number: number(b, 0), generation: number(b, 4) }, number(b, 8));
    Ok((inodes.chunks_exact(12).map(inode).collect(), watcher))
}

/// Ends the watch, if there is one.
pub(crate) fn end() {
    let _ = ask(END);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(kind: u8, bytes: u32, handle_type: i32, inode: u32, generation: u32) -> Vec<u8> {
        let mut event = (EVENT as u32 + 28).to_ne_bytes().to_vec();
        event.resize(EVENT, 0);
        event.extend([kind, 0, 28, 0]);
        event.extend([0; 8]);
        for number in [bytes, handle_type as u32, inode, generation] {
            event.extend(number.to_ne_bytes());
        }
        event
    }

    #[test]
    fn events_name_inodes() {
        let mut seen = Seen::default();
        seen.take(&[event(1, 8, 1, 12, 7), event(1, 8, 1, 13, 8), event(1, 8, 1, 12, 7)].concat());
        let opened = [(12, 7), (13, 8)].map(|(number, generation)| (Inode { number, generation }, 0));
        assert_eq!(seen.opened, BTreeSet::from(opened));
        assert!(!seen.unsure);
        let answer = seen.answer();
        assert_eq!(answer.len(), 5 + 24);
        assert_eq!(answer[..5], [0, 2, 0, 0, 0]);
    }

    #[test]
    fn what_is_not_understood_may_be_anything() {
        let mut overflow = (EVENT as u32).to_ne_bytes().to_vec();
        overflow.resize(EVENT, 0);
        for odd in [overflow, event(1, 0, 0xff, 0, 0), event(2, 8, 1, 1, 1), vec![1, 0, 0, 0], vec![9; 3]] {
            let mut seen = Seen::default();
            seen.take(&odd);
            assert!(seen.unsure, "{odd:?}");
        }
    }
}

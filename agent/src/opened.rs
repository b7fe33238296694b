//! Records which files of a machine's disk were opened since it began to boot.
//!
//! A snapshot can be retargeted only if the boot can't have depended on the changed files:
//! a file that was never opened could have had any content. The kernel records this
//! (fanotify, `include/uapi/linux/fanotify.h`), starting before the first program of the
//! disk runs. A process of the agent that survives the change of root holds the fanotify
//! descriptor. The agent takes the descriptor over an abstract socket; then the process
//! ends, so that forks don't have it.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};

use crate::protocol::{EARLY, Inode};

/// The name of the abstract socket.
const SOCKET: &[u8] = b"vimg.seen";
/// How long the process may take to send the descriptor.
const ANSWER: Duration = Duration::from_secs(30);

/// `sizeof(struct fanotify_event_metadata)`.
const EVENT: usize = 24;
/// The offset of the process id in it.
const PROCESS: usize = 20;
/// `FAN_EVENT_INFO_TYPE_FID`, and the offset of the handle in such a record: after four
/// bytes of header and eight bytes of the filesystem's id.
const FID: u8 = 1;
const HANDLE: usize = 12;
/// `FILEID_INO32_GEN` (`include/linux/exportfs.h`): the handle consists of the number of
/// an inode and its generation.
pub(crate) const INODE_AND_GENERATION: i32 = 1;

/// Makes the kernel record which files of the filesystem at `root` are opened, and starts
/// the process that holds the descriptor.
pub(crate) fn watch(root: &str) -> io::Result<()> {
    let path = std::ffi::CString::new(root)?;
    let flags = libc::FAN_CLASS_NOTIF
        | libc::FAN_CLOEXEC
        | libc::FAN_NONBLOCK
        | libc::FAN_UNLIMITED_QUEUE
        | libc::FAN_REPORT_FID;
    // SAFETY: the call takes two numbers and returns a descriptor that we own.
    let fd = unsafe {
        match libc::fanotify_init(flags, libc::O_RDONLY as u32) {
            -1 => return Err(io::Error::last_os_error()),
            fd => OwnedFd::from_raw_fd(fd),
        }
    };
    let what = libc::FAN_MARK_ADD | libc::FAN_MARK_FILESYSTEM;
    // SAFETY: `path` is terminated by zero and outlives the call.
    let marked =
        unsafe { libc::fanotify_mark(fd.as_raw_fd(), what, libc::FAN_OPEN, libc::AT_FDCWD, path.as_ptr()) };
    if marked != 0 {
        return Err(io::Error::last_os_error());
    }
    Command::new(EARLY)
        .arg("watch")
        .stdin(Stdio::from(fd))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .map(|_| ())
}

/// Runs the process that holds the fanotify descriptor, which is its standard input, until
/// the agent takes it over.
pub fn keep_watch() -> io::Result<()> {
    let listener = UnixListener::bind_addr(&SocketAddr::from_abstract_name(SOCKET)?)?;
    for stream in listener.incoming() {
        let stream = stream?;
        // Any user can connect.
        if !rustix::net::sockopt::socket_peercred(&stream).is_ok_and(|c| c.uid.is_root()) {
            continue;
        }
        let notes = [rustix::stdio::stdin()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        control.push(SendAncillaryMessage::ScmRights(&notes));
        sendmsg(&stream, &[IoSlice::new(b"w")], &mut control, SendFlags::NOSIGNAL)?;
        // The stream must close after standard input: both close at the end of the
        // process, in this order.
        std::mem::forget(stream);
        return Ok(());
    }
    Ok(())
}

/// Inodes, and the ids of the processes that opened them.
pub(crate) type Opened = BTreeSet<(Inode, u32)>;

/// The kernel's record of opened files.
pub(crate) struct Watch {
    events: File,
}

impl Watch {
    /// Takes the descriptor over from the process that holds it.
    pub(crate) fn take_over() -> io::Result<Self> {
        let mut stream = UnixStream::connect_addr(&SocketAddr::from_abstract_name(SOCKET)?)?;
        if !rustix::net::sockopt::socket_peercred(&stream)?.uid.is_root() {
            return Err(io::Error::other("the process that answers is not root's"));
        }
        stream.set_read_timeout(Some(ANSWER))?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut byte = [0];
        recvmsg(&stream, &mut [IoSliceMut::new(&mut byte)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
        let notes = control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut all) => all.next(),
            _ => None,
        });
        let notes = notes.ok_or_else(|| io::Error::other("the process sent no descriptor"))?;
        // The stream ends with the process: then only we hold the descriptor.
        stream.read_to_end(&mut Vec::new())?;
        Ok(Self { events: File::from(notes) })
    }

    /// Returns what was opened since the last call, or since the machine began to boot.
    pub(crate) fn opened(&mut self) -> io::Result<Opened> {
        let mut opened = Notes::default();
        opened.drain(&mut self.events)?;
        if opened.unsure {
            return Err(io::Error::other("the kernel could not identify all opened files"));
        }
        Ok(opened.opened)
    }

    /// Ends the kernel's recording.
    pub(crate) fn end(&self) {
        let what = libc::FAN_MARK_FLUSH | libc::FAN_MARK_FILESYSTEM;
        // SAFETY: the call takes numbers and a path, which may be null to flush marks.
        // An error costs only time and memory.
        unsafe { libc::fanotify_mark(self.events.as_raw_fd(), what, 0, libc::AT_FDCWD, std::ptr::null()) };
    }
}

/// Decoded events.
#[derive(Debug, Default)]
struct Notes {
    opened: Opened,
    /// Whether the kernel could not identify an opened file.
    unsure: bool,
}

impl Notes {
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

    /// Decodes the events of one read.
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
}

/// Decodes the inode in the record of an event. An overflow of the queue has none.
fn inode(record: &[u8]) -> Option<Inode> {
    let handle = record.get(HANDLE..HANDLE + 16)?;
    let plain =
        record[0] == FID && number(handle, 0) == 8 && number(handle, 4) == INODE_AND_GENERATION as u32;
    plain.then(|| Inode { number: number(handle, 8), generation: number(handle, 12) })
}

fn number(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).map_or(0, |b| u32::from_ne_bytes([b[0], b[1], b[2], b[3]]))
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
        let mut opened = Notes::default();
        opened.take(&[event(1, 8, 1, 12, 7), event(1, 8, 1, 13, 8), event(1, 8, 1, 12, 7)].concat());
        let wanted = [(12, 7), (13, 8)].map(|(number, generation)| (Inode { number, generation }, 0));
        assert_eq!(opened.opened, BTreeSet::from(wanted));
        assert!(!opened.unsure);
    }

    #[test]
    fn what_is_not_understood_may_be_anything() {
        let mut overflow = (EVENT as u32).to_ne_bytes().to_vec();
        overflow.resize(EVENT, 0);
        for odd in [overflow, event(1, 0, 0xff, 0, 0), event(2, 8, 1, 1, 1), vec![1, 0, 0, 0], vec![9; 3]] {
            let mut opened = Notes::default();
            opened.take(&odd);
            assert!(opened.unsure, "{odd:?}");
        }
    }
}

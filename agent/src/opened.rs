//! What has been opened of a machine's disk since it began to boot.
//!
//! Who boots a machine that is to be kept wants to know later what the boot
//! can't have depended on: a file that nobody opened may have had any content.
//! The kernel notes it (fanotify, `include/uapi/linux/fanotify.h`), from before
//! the first program of the disk runs. A process of ours that outlives the
//! change of root has the kernel's notes until the agent asks for them, at a
//! socket without a file, and ends then: forks of the machine are spared it.

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

use crate::protocol::Inode;

/// The socket's name.
const SOCKET: &[u8] = b"vimg.seen";
/// How long an answer may take.
const ANSWER: Duration = Duration::from_secs(30);

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

/// Has the kernel note what is opened of the filesystem at `root`, for whoever
/// takes the notes over.
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

/// The process that has the notes until they are taken over: they are its
/// standard input.
pub fn keep_watch() -> io::Result<()> {
    let listener = UnixListener::bind_addr(&SocketAddr::from_abstract_name(SOCKET)?)?;
    for stream in listener.incoming() {
        let stream = stream?;
        // Anybody may connect.
        if !rustix::net::sockopt::socket_peercred(&stream).is_ok_and(|c| c.uid.is_root()) {
            continue;
        }
        let notes = [rustix::stdio::stdin()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        control.push(SendAncillaryMessage::ScmRights(&notes));
        sendmsg(&stream, &[IoSlice::new(b"w")], &mut control, SendFlags::NOSIGNAL)?;
        // It closes with this process, after standard input.
        std::mem::forget(stream);
        return Ok(());
    }
    Ok(())
}

/// Inodes, and the numbers of the processes that opened them.
pub(crate) type Opened = BTreeSet<(Inode, u32)>;

/// The kernel's notes.
pub(crate) struct Watch {
    events: File,
}

impl Watch {
    /// Takes them over from the process that has them.
    pub(crate) fn take_over() -> io::Result<Self> {
        let mut stream = UnixStream::connect_addr(&SocketAddr::from_abstract_name(SOCKET)?)?;
        if !rustix::net::sockopt::socket_peercred(&stream)?.uid.is_root() {
            return Err(io::Error::other("somebody else answers"));
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
        let notes = notes.ok_or_else(|| io::Error::other("the notes did not come"))?;
        // It ends, and with it the stream: nobody else has the notes then.
        stream.read_to_end(&mut Vec::new())?;
        Ok(Self { events: File::from(notes) })
    }

    /// What was opened since this was asked last, or since the machine began
    /// to boot.
    pub(crate) fn opened(&mut self) -> io::Result<Opened> {
        let mut opened = Notes::default();
        opened.drain(&mut self.events)?;
        if opened.unsure {
            return Err(io::Error::other("it is not known what the boot has read"));
        }
        Ok(opened.opened)
    }

    /// Has the kernel note nothing more.
    pub(crate) fn end(&self) {
        let what = libc::FAN_MARK_FLUSH | libc::FAN_MARK_FILESYSTEM;
        // SAFETY: the call takes numbers and a path, which may be null for
        // this. What fails of it costs time and memory, and nothing else.
        unsafe { libc::fanotify_mark(self.events.as_raw_fd(), what, 0, libc::AT_FDCWD, std::ptr::null()) };
    }
}

/// What was opened.
#[derive(Debug, Default)]
struct Notes {
    opened: Opened,
    /// Something was opened, and the kernel could not say what.
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

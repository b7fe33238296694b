//! Copies large files past the page cache, so that a copy neither evicts other
//! data from memory nor waits for memory. Shares blocks if the filesystem can,
//! and uses the page cache if it can't be bypassed.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::JoinHandle;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

/// Size of a buffer, in bytes.
const PIECE: usize = 1 << 20;
/// Alignment of buffers and offsets, in bytes: no disk has larger sectors, and
/// no supported CPU larger pages.
const ALIGNED: usize = 4096;
/// Maximum number of buffers.
const PIECES: usize = 4;

/// Copies a file to several empty files. Returns these, each with its error if
/// it is incomplete.
///
/// # Errors
///
/// The source can't be read.
pub fn copy(from: &Path, to: Vec<File>) -> io::Result<Vec<io::Result<File>>> {
    let source = File::open(from)?;
    let length = source.metadata()?.len();
    let mut direct = pass_cache(&source, true);
    let (give_back, spent) = channel();
    let outs: Vec<Out> =
        to.into_iter().map(|file| Out::begin(&source, file, &give_back)).collect::<Result<_, _>>()?;
    drop(give_back);
    let mut pieces = Pieces { spent, idle: Vec::new(), made: 0 };
    let mut at = 0;
    while at < length && outs.iter().any(Out::writes) {
        let mut piece = pieces.take();
        let mut read = source.read_at(piece.all(), at);
        if direct && read.as_ref().is_err_and(|e| e.kind() == io::ErrorKind::InvalidInput) {
            direct = pass_cache(&source, false);
            read = source.read_at(piece.all(), at);
        }
        piece.length = read?;
        if piece.length == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let here = at;
        at += piece.length as u64;
        let piece = Arc::new(piece);
        for out in &outs {
            out.write(here, &piece);
        }
        pieces.idle.extend(Arc::into_inner(piece));
    }
    Ok(outs.into_iter().map(Out::finish).collect())
}

/// Turns direct I/O on or off. Returns whether it is on now.
fn pass_cache(file: &File, pass: bool) -> bool {
    let set = |flags: OFlags| {
        let flags = if pass { flags | OFlags::DIRECT } else { flags - OFlags::DIRECT };
        fcntl_setfl(file, flags)
    };
    fcntl_getfl(file).and_then(set).is_ok() && pass
}

/// A page-aligned buffer.
struct Piece {
    bytes: Box<[u8]>,
    start: usize,
    /// The number of valid bytes.
    length: usize,
}

impl Piece {
    fn new() -> Self {
        let bytes = vec![0; PIECE + ALIGNED].into_boxed_slice();
        let start = bytes.as_ptr().align_offset(ALIGNED);
        Self { bytes, start, length: 0 }
    }

    fn all(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + PIECE]
    }

    fn filled(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.length]
    }
}

/// Buffers that are reused.
struct Pieces {
    spent: Receiver<Arc<Piece>>,
    idle: Vec<Piece>,
    made: usize,
}

impl Pieces {
    /// Returns a buffer that all writers have finished, or a new one.
    fn take(&mut self) -> Piece {
        loop {
            if let Some(piece) = self.idle.pop() {
                return piece;
            }
            if self.made < PIECES {
                self.made += 1;
                return Piece::new();
            }
            match self.spent.recv() {
                // Only the last writer to return a buffer returns its memory.
                Ok(piece) => self.idle.extend(Arc::into_inner(piece)),
                // All writers have ended.
                Err(_) => return Piece::new(),
            }
        }
    }
}

/// A target file, and its writer.
enum Out {
    /// It shares the blocks of the source.
    Shares(File),
    /// A thread writes it; the channel passes the buffers.
    Writes(SyncSender<(u64, Arc<Piece>)>, JoinHandle<io::Result<File>>),
}

impl Out {
    fn begin(source: &File, file: File, give_back: &Sender<Arc<Piece>>) -> io::Result<Self> {
        if rustix::fs::ioctl_ficlone(&file, source).is_ok() {
            return Ok(Self::Shares(file));
        }
        let (pieces, incoming) = sync_channel(PIECES);
        let give_back = give_back.clone();
        let thread = std::thread::Builder::new().spawn(move || write(file, incoming, &give_back))?;
        Ok(Self::Writes(pieces, thread))
    }

    fn writes(&self) -> bool {
        matches!(self, Self::Writes(..))
    }

    fn write(&self, at: u64, piece: &Arc<Piece>) {
        if let Self::Writes(pieces, _) = self {
            // A panic of the thread is reported by `finish`.
            let _ = pieces.send((at, piece.clone()));
        }
    }

    fn finish(self) -> io::Result<File> {
        match self {
            Self::Shares(file) => Ok(file),
            Self::Writes(pieces, thread) => {
                drop(pieces);
                thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread that writes it panicked")))
            }
        }
    }
}

fn write(
    file: File,
    incoming: Receiver<(u64, Arc<Piece>)>,
    give_back: &Sender<Arc<Piece>>,
) -> io::Result<File> {
    let (mut direct, mut outcome) = (pass_cache(&file, true), Ok(()));
    for (at, piece) in incoming {
        if outcome.is_ok() {
            if direct && piece.length % ALIGNED != 0 {
                direct = pass_cache(&file, false);
            }
            outcome = file.write_all_at(piece.filled(), at);
            if direct && outcome.as_ref().is_err_and(|e| e.kind() == io::ErrorKind::InvalidInput) {
                direct = pass_cache(&file, false);
                outcome = file.write_all_at(piece.filled(), at);
            }
        }
        // The reader may wait for the buffer, unless it has read everything.
        let _ = give_back.send(piece);
    }
    pass_cache(&file, false);
    outcome.map(|()| file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn bytes(length: usize) -> Vec<u8> {
        (0..length as u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
    }

    #[test]
    fn all_get_the_same() {
        let dir = tempfile::tempdir().unwrap();
        // One filesystem with direct I/O, and one that may not have it.
        let other = tempfile::tempdir_in("/dev/shm").unwrap();
        for length in [0, 1, 4096, PIECE, PIECE + 1, 7 * PIECE, 9 * PIECE + 4096, 9 * PIECE + 5000] {
            let bytes = bytes(length);
            for source in [dir.path().join("source"), other.path().join("source")] {
                fs::write(&source, &bytes).unwrap();
                let paths = [dir.path().join("a"), dir.path().join("b"), other.path().join("c")];
                let files = paths.iter().map(|path| File::create(path).unwrap()).collect();
                assert!(copy(&source, files).unwrap().iter().all(Result::is_ok));
                for path in &paths {
                    assert!(fs::read(path).unwrap() == bytes, "{length} bytes in {}", path.display());
                }
            }
        }
    }

    #[test]
    fn a_failed_copy_delays_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let [source, a, b] = ["source", "a", "b"].map(|name| dir.path().join(name));
        let bytes = bytes(20 * PIECE);
        fs::write(&source, &bytes).unwrap();
        fs::write(&a, "").unwrap();
        // A file that is open for reading only.
        let done = copy(&source, vec![File::open(&a).unwrap(), File::create(&b).unwrap()]).unwrap();
        assert!(done[0].is_err() && done[1].is_ok());
        assert!(fs::read(&b).unwrap() == bytes);
        assert!(copy(&source, vec![File::open(&a).unwrap()]).unwrap()[0].is_err());
        assert!(copy(&dir.path().join("none"), vec![]).is_err());
    }
}

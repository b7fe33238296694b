//! Copies large files past the kernel's cache: what is not read again soon need
//! not push out what is, nor wait for memory. Where a filesystem shares blocks
//! nothing is copied, and where it can't pass the cache it does not.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::JoinHandle;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

/// What is moved at once, in bytes.
const PIECE: usize = 1 << 20;
/// What pieces and their places are multiples of, in bytes: no disk has larger
/// sectors, and no processor that this runs on larger pages.
const ALIGNED: usize = 4096;
/// How many pieces may be under way.
const PIECES: usize = 4;

/// Copies a file to others, which are empty. Returns those, with what is wrong
/// with each that lacks something.
///
/// # Errors
///
/// What the system says of the file that is copied.
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

/// Has a file's reads and writes pass the cache, or not. Whether they do now.
fn pass_cache(file: &File, pass: bool) -> bool {
    let set = |flags: OFlags| {
        let flags = if pass { flags | OFlags::DIRECT } else { flags - OFlags::DIRECT };
        fcntl_setfl(file, flags)
    };
    fcntl_getfl(file).and_then(set).is_ok() && pass
}

/// Bytes that begin where a page does.
struct Piece {
    bytes: Box<[u8]>,
    start: usize,
    /// How many are of use.
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

/// Pieces that go round.
struct Pieces {
    spent: Receiver<Arc<Piece>>,
    idle: Vec<Piece>,
    made: usize,
}

impl Pieces {
    /// One that all have written, or a new one.
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
                // The last who gives it back gives it whole.
                Ok(piece) => self.idle.extend(Arc::into_inner(piece)),
                // There is nobody to write to.
                Err(_) => return Piece::new(),
            }
        }
    }
}

/// A file that is written, and who writes to it.
enum Out {
    /// It shares what it holds.
    Shares(File),
    /// Its pieces, until they end.
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
            // Who panics says so in the end.
            let _ = pieces.send((at, piece.clone()));
        }
    }

    fn finish(self) -> io::Result<File> {
        match self {
            Self::Shares(file) => Ok(file),
            Self::Writes(pieces, thread) => {
                drop(pieces);
                thread.join().unwrap_or_else(|_| Err(io::Error::other("who writes it is gone")))
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
        // Others may wait for it; nobody does when all is read.
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
        // One filesystem that can pass its cache, and one that may not.
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
    fn who_fails_holds_up_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let [source, a, b] = ["source", "a", "b"].map(|name| dir.path().join(name));
        let bytes = bytes(20 * PIECE);
        fs::write(&source, &bytes).unwrap();
        fs::write(&a, "").unwrap();
        // Who can only read can't write.
        let done = copy(&source, vec![File::open(&a).unwrap(), File::create(&b).unwrap()]).unwrap();
        assert!(done[0].is_err() && done[1].is_ok());
        assert!(fs::read(&b).unwrap() == bytes);
        assert!(copy(&source, vec![File::open(&a).unwrap()]).unwrap()[0].is_err());
        assert!(copy(&dir.path().join("none"), vec![]).is_err());
    }
}

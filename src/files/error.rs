//! Why a file of the project can't be read.

use std::io;

use rustix::fs::{FileType, Stat};
use vimg_lang::{FileRef, ReadError};

/// Why a file could not be hashed or copied.
#[derive(Debug)]
pub struct FileError {
    /// The file.
    pub file: String,
    /// The reason.
    pub why: String,
    /// Whether its copy did not fit on the disk.
    pub is_full: bool,
}

pub(super) fn error(file: &FileRef, why: &str) -> FileError {
    FileError { file: file.to_string(), why: why.to_owned(), is_full: false }
}

pub(super) fn words(error: &io::Error) -> String {
    match read_error(error) {
        ReadError::NotFound => "it does not exist".into(),
        ReadError::Outside => "a symbolic link leads out of the project".into(),
        _ => error.to_string(),
    }
}

pub(super) fn read_error(error: &io::Error) -> ReadError {
    match rustix::io::Errno::from_io_error(error) {
        // RESOLVE_BENEATH fails with EXDEV if a path leads out.
        Some(rustix::io::Errno::XDEV) => ReadError::Outside,
        Some(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => ReadError::NotFound,
        Some(rustix::io::Errno::LOOP) => ReadError::Other("too many symbolic links".into()),
        // A socket can't be opened at all.
        Some(rustix::io::Errno::NXIO) => ReadError::NotAFile("a socket"),
        _ => ReadError::Other(error.to_string()),
    }
}

pub(super) fn kind_name(stat: &Stat) -> &'static str {
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => "a directory",
        FileType::Fifo => "a FIFO",
        FileType::Socket => "a socket",
        FileType::BlockDevice | FileType::CharacterDevice => "a device",
        _ => "a special file",
    }
}

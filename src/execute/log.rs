//! The output of a layer's programs: all of it in a compressed file, its last
//! lines in memory for the diagnostic, each line as an event.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;

use crate::event::stripped;

/// Lines that are kept for the diagnostic.
const TAIL: usize = 12;
/// Longest line that is shown, in bytes. The log has it whole.
const LINE: usize = 400;
/// The largest log, uncompressed, in bytes. The number of events has no limit
/// here; the report limits what it shows.
const MAX_LOG: u64 = 256 << 20;

/// A log that is being written.
pub(super) struct Log {
    out: zstd::Encoder<'static, File>,
    written: u64,
    partial: String,
    tail: VecDeque<String>,
}

impl Log {
    pub(super) fn create(path: &Path) -> io::Result<Self> {
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir)?;
        }
        let out = zstd::Encoder::new(File::create(path)?, 3)?;
        Ok(Self { out, written: 0, partial: String::new(), tail: VecDeque::new() })
    }

    /// Adds a heading, such as the name of a step.
    pub(super) fn heading(&mut self, text: &str) {
        self.write(format!("== {text}\n").as_bytes());
    }

    /// Adds what a program printed; `line` gets each whole line.
    pub(super) fn text(&mut self, text: &str, mut line: impl FnMut(&str)) {
        self.write(text.as_bytes());
        for piece in text.split_inclusive('\n') {
            if self.partial.len() < LINE {
                self.partial.push_str(piece);
            }
            if piece.ends_with('\n') {
                let whole = clean(&std::mem::take(&mut self.partial));
                if !whole.is_empty() {
                    line(&whole);
                    self.remember(whole);
                }
            }
        }
    }

    fn write(&mut self, bytes: &[u8]) {
        if self.written < MAX_LOG {
            self.written += bytes.len() as u64;
            // A log that can't be written is no reason to fail a layer.
            let _ = self.out.write_all(bytes);
        }
    }

    fn remember(&mut self, line: String) {
        self.tail.push_back(line);
        if self.tail.len() > TAIL {
            self.tail.pop_front();
        }
    }

    /// Ends the file; returns the last lines.
    pub(super) fn finish(mut self) -> Vec<String> {
        let rest = clean(&std::mem::take(&mut self.partial));
        if !rest.is_empty() {
            self.remember(rest);
        }
        let _ = self.out.finish().and_then(|file| file.sync_all());
        self.tail.into()
    }
}

/// Returns a line as a terminal would show it, without control characters, cut
/// to a reasonable length.
pub(super) fn clean(line: &str) -> String {
    let line = line.trim_end();
    // Progress bars return to the line's start and write over it.
    let line = line.rsplit('\r').next().unwrap_or(line);
    let mut out = stripped(line).replace('\t', " ");
    if out.len() > LINE {
        out.truncate(out.floor_char_boundary(LINE));
        out.push_str("...");
    }
    out
}

/// Reads a log that `Log` wrote, as far as possible. Also returns why the
/// rest can't be read, if that is so: vimg was killed before it had written the
/// end, or the file is damaged.
///
/// # Errors
///
/// Nothing can be read.
pub fn read(path: &Path) -> io::Result<(String, Option<io::Error>)> {
    let mut bytes = Vec::new();
    let decoder = zstd::Decoder::new(File::open(path)?)?;
    let broken = decoder.take(MAX_LOG * 2).read_to_end(&mut bytes).err();
    let text = String::from_utf8_lossy(&bytes).into_owned();
    match broken {
        Some(error) if text.is_empty() => Err(error),
        broken => Ok((text, broken)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_whole_clean_and_few() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log.zst");
        let mut log = Log::create(&path).unwrap();
        let mut seen = Vec::new();
        log.text("one\ntw", |l| seen.push(l.to_owned()));
        log.text("o\n10%\r100% \u{1b}[31mred\u{1b}[0m\n\n", |l| seen.push(l.to_owned()));
        log.text(&"x".repeat(100_000), |l| seen.push(l.to_owned()));
        for n in 0..100 {
            log.text(&format!("\n{n}"), |_| {});
        }
        assert_eq!(seen, ["one", "two", "100% red"]);
        let tail = log.finish();
        assert_eq!(tail.len(), TAIL);
        assert_eq!(tail.last().map(String::as_str), Some("99"));
        let (text, broken) = read(&path).unwrap();
        assert!(text.starts_with("one\ntwo\n10%") && broken.is_none());

        // A part of a log is returned, with the reason why it is only a part.
        let mut log = Log::create(&path).unwrap();
        (0..100_000_u64).for_each(|n| log.text(&format!("{}\n", n * n), |_| {}));
        log.finish();
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, &whole[..whole.len() - 3]).unwrap();
        let (text, broken) = read(&path).unwrap();
        assert!(text.starts_with("0\n1\n4\n") && broken.is_some());
        std::fs::write(&path, b"no log").unwrap();
        assert!(read(&path).is_err());
    }
}

//! What the text of a script says about how it runs.

use std::io::Read;

use vimg_lang::model::Content;
use vimg_lang::{Files, Root};

use super::project::Project;

/// How much of a script is examined, in bytes.
const MAX_SCRIPT: usize = 1 << 20;

impl Project {
    /// Whether a script has its own shell and continues after errors.
    pub fn goes_on(&self, content: &Content) -> bool {
        let text = match content {
            Content::Text(text) | Content::Rendered(text, _) => text.clone(),
            Content::File(file) => {
                let bytes = self.read(file, MAX_SCRIPT).unwrap_or_default();
                String::from_utf8_lossy(&bytes).into_owned()
            }
        };
        let mut lines = text.lines();
        let first = lines.next().and_then(|line| line.strip_prefix("#!")).unwrap_or_default();
        let mut words = first.split_whitespace();
        let is_shell = words
            .any(|word| ["sh", "bash", "dash"].iter().any(|shell| word.rsplit('/').next() == Some(*shell)));
        let stops = |word: &str| word.starts_with('-') && !word.starts_with("--") && word.contains('e');
        let says = |line: &str| {
            let line = line.trim_start();
            let mut words = line.strip_prefix("set ").unwrap_or_default().split_whitespace();
            words.any(|word| stops(word) || word == "errexit")
        };
        is_shell && !words.any(stops) && !lines.any(says)
    }

    /// Returns why a script can't run as it is.
    pub fn unfit(&self, content: &Content) -> Option<String> {
        let mut start = [0; 512];
        let read = match content {
            Content::Text(text) | Content::Rendered(text, _) => {
                let n = text.len().min(start.len());
                start[..n].copy_from_slice(&text.as_bytes()[..n]);
                n
            }
            // An unreadable file is reported where it is hashed.
            Content::File(file) if file.root == Root::Project => {
                self.open_file(&file.path).and_then(|mut opened| opened.read(&mut start)).unwrap_or(0)
            }
            Content::File(_) => 0,
        };
        let start = &start[..read];
        if start.starts_with(b"\xef\xbb\xbf") {
            return Some(
                "it begins with a byte order mark, which hides its `#!`; save it as UTF-8 without one".into(),
            );
        }
        let line = start.split(|b| *b == b'\n').next().unwrap_or_default();
        line.ends_with(b"\r").then(|| {
            "line 1 ends in a carriage return, as on Windows; convert the file with `dos2unix`".into()
        })
    }
}

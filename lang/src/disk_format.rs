//! The disk formats of outputs.

use serde::{Deserialize, Serialize};

/// A disk format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum DiskFormat {
    /// qcow2, compressed with zstd.
    Qcow2,
    /// Raw and sparse.
    Raw,
}

impl DiskFormat {
    /// All formats.
    pub const ALL: [Self; 2] = [Self::Qcow2, Self::Raw];

    /// Their names in recipes.
    pub(crate) const WORDS: &'static [&'static str] = &{
        let mut words = [""; Self::ALL.len()];
        let mut n = 0;
        while n < words.len() {
            words[n] = Self::ALL[n].name();
            n += 1;
        }
        words
    };

    /// Its name in recipes.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Qcow2 => "qcow2",
            Self::Raw => "raw",
        }
    }

    /// Finds a format by its name.
    pub(crate) fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|format| format.name() == word)
    }
}

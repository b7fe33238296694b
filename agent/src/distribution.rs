//! The distribution of the machine, as os-release(5) tells it.

use std::fmt;
use std::fs;

/// The places of the file, the first one first.
const PLACES: [&str; 2] = ["/etc/os-release", "/usr/lib/os-release"];

/// The distribution of a machine.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Distribution {
    id: Option<String>,
    like: Vec<String>,
}

impl Distribution {
    /// Reads the distribution of this machine. Without the file it is unknown.
    pub(crate) fn read() -> Self {
        PLACES
            .iter()
            .find_map(|path| fs::read_to_string(path).ok())
            .map_or_else(Self::default, |t| Self::of(&t))
    }

    /// Parses the text of the file.
    pub(crate) fn of(text: &str) -> Self {
        let value = |name: &str| {
            let line =
                text.lines().rev().find_map(|line| line.trim().strip_prefix(name)?.strip_prefix('='))?;
            Some(line.trim_matches(['"', '\'']).to_owned()).filter(|value| !value.is_empty())
        };
        let like = value("ID_LIKE").unwrap_or_default();
        Self { id: value("ID"), like: like.split_whitespace().map(str::to_owned).collect() }
    }

    /// Whether it is the distribution `family`, or derives from it.
    pub(crate) fn is_like(&self, family: &str) -> bool {
        self.id.iter().chain(&self.like).any(|name| name == family)
    }
}

impl fmt::Display for Distribution {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.id {
            Some(id) => write!(f, "the distribution `{id}`"),
            None => f.write_str("an unknown distribution"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_derivative_is_like_its_origin() {
        let debian = Distribution::of("PRETTY_NAME=\"Debian GNU/Linux 12\"\nVERSION_ID=\"12\"\nID=debian\n");
        assert!(debian.is_like("debian") && !debian.is_like("ubuntu"));
        let mint = Distribution::of("ID=linuxmint\nID_LIKE=\"ubuntu debian\"\n");
        assert!(mint.is_like("debian") && mint.is_like("ubuntu") && mint.is_like("linuxmint"));
        let fedora = Distribution::of("ID='fedora'\n");
        assert!(fedora.is_like("fedora") && !fedora.is_like("debian"));
        assert_eq!(fedora.to_string(), "the distribution `fedora`");
        assert!(!Distribution::of("").is_like(""));
    }
}

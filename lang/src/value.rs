//! The values of inputs and parameters, and how vimg parses them.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::source::FileRef;

/// A typed value.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Value {
    /// Text.
    String(String),
    /// An integer.
    Int(i64),
    /// A boolean.
    Bool(bool),
    /// A size in bytes.
    Size(u64),
    /// A duration in seconds.
    Duration(u64),
    /// A file or directory of the project.
    Path(FileRef),
    /// A list of strings.
    List(Vec<String>),
    /// A value that depends on a parameter without a value, as a text with a
    /// placeholder. Only [`crate::compile_part`] makes one.
    Open(String),
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::String(s) => write!(f, "{s:?}"),
            Value::Int(n) => write!(f, "{n}"),
            Value::Bool(b) => write!(f, "#{b}"),
            Value::Size(n) => write!(f, "{n} bytes"),
            Value::Duration(n) => write!(f, "{n}s"),
            Value::Path(p) => write!(f, "{p}"),
            Value::List(items) => write!(f, "{items:?}"),
            Value::Open(text) => f.write_str(text),
        }
    }
}

impl Value {
    /// Makes the value of a parameter that has none.
    pub(crate) fn open(name: &str) -> Self {
        Self::Open(format!("‹{name}›"))
    }
}

/// The type of an input or parameter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum InputType {
    /// Text.
    String,
    /// An integer.
    Int,
    /// A boolean.
    Bool,
    /// A size in bytes.
    Size,
    /// A duration.
    Duration,
    /// A file or directory of the project.
    Path,
    /// A list of strings.
    List,
}

impl InputType {
    /// The type with this name, one of [`crate::kind::INPUT_TYPES`].
    pub fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "string" => Self::String,
            "int" => Self::Int,
            "bool" => Self::Bool,
            "size" => Self::Size,
            "duration" => Self::Duration,
            "path" => Self::Path,
            "list" => Self::List,
            _ => return None,
        })
    }

    /// The name of the type in recipes.
    pub fn name(self) -> &'static str {
        match self {
            Self::String => "string",
            Self::Int => "int",
            Self::Bool => "bool",
            Self::Size => "size",
            Self::Duration => "duration",
            Self::Path => "path",
            Self::List => "list",
        }
    }

    /// Parses a value of the command line. Paths are relative to the project root;
    /// commas separate the items of a list. The error says what was expected.
    pub fn parse(self, text: &str) -> Result<Value, String> {
        match self {
            Self::String => Ok(Value::String(text.to_owned())),
            Self::Int => text.trim().parse().map(Value::Int).map_err(|_| "expected an integer".to_owned()),
            Self::Bool => match text.trim().trim_start_matches('#') {
                "true" => Ok(Value::Bool(true)),
                "false" => Ok(Value::Bool(false)),
                _ => Err("expected `true` or `false`".to_owned()),
            },
            Self::Size => size(text).map(Value::Size),
            Self::Duration => duration(text).map(Value::Duration),
            Self::Path => FileRef::project("")
                .join(text)
                .map(Value::Path)
                .ok_or_else(|| "expected a path inside the project".to_owned()),
            Self::List => Ok(Value::List(
                text.split(',').map(|s| s.trim().to_owned()).filter(|s| !s.is_empty()).collect(),
            )),
        }
    }
}

/// Guesses what a text that is no boolean of KDL means.
pub(crate) fn boolean(text: &str) -> Option<bool> {
    match text.to_ascii_lowercase().as_str() {
        "true" | "yes" | "on" | "1" => Some(true),
        "false" | "no" | "off" | "0" => Some(false),
        _ => None,
    }
}

/// Parses a size such as `4096`, `512MiB`, `8GiB` or `10GB`; returns bytes.
pub fn size(text: &str) -> Result<u64, String> {
    const UNITS: &[(&str, u64)] = &[
        ("", 1),
        ("B", 1),
        ("KiB", 1 << 10),
        ("MiB", 1 << 20),
        ("GiB", 1 << 30),
        ("TiB", 1 << 40),
        ("KB", 1_000),
        ("MB", 1_000_000),
        ("GB", 1_000_000_000),
        ("TB", 1_000_000_000_000),
    ];
    let (number, unit) = number_and_unit(text);
    let factor = UNITS
        .iter()
        .find(|(name, _)| *name == unit)
        .map(|(_, factor)| *factor)
        .ok_or("expected a number and a unit: B, KiB, MiB, GiB, TiB, KB, MB, GB or TB")?;
    number
        .parse::<u64>()
        .ok()
        .and_then(|n| n.checked_mul(factor))
        .ok_or_else(|| "expected an integer with a unit, less than 16 EiB".to_owned())
}

/// Parses a duration such as `90s`, `10m` or `1h`; returns seconds.
pub fn duration(text: &str) -> Result<u64, String> {
    let (number, unit) = number_and_unit(text);
    let factor = match unit {
        "s" => 1,
        "m" | "min" => 60,
        "h" => 3600,
        _ => return Err("expected a number and a unit: s, m or h".to_owned()),
    };
    number
        .parse::<u64>()
        .ok()
        .and_then(|n| n.checked_mul(factor))
        .filter(|n| *n > 0 && *n <= 7 * 24 * 3600)
        .ok_or_else(|| "expected an integer with a unit, more than 0 and at most a week".to_owned())
}

/// Checks an `http://` URL: it has a host and contains no password.
pub fn http_url(text: &str) -> Result<String, String> {
    let rest = text
        .strip_prefix("http://")
        .ok_or("expected a URL that starts with `http://`; for HTTPS, use `run`")?;
    let host = rest.split(['/', '?']).next().unwrap_or_default();
    let clean = text.bytes().all(|b| (0x21..0x7f).contains(&b) && b != b'#');
    if host.is_empty() || host.contains('@') || !clean {
        return Err("expected a URL such as `http://localhost:8080/path`, without spaces".to_owned());
    }
    Ok(text.to_owned())
}

/// Checks the URL of a mirror. mmdebstrap must not take it for an option, a file or a
/// line of `sources.list`.
pub fn mirror_url(text: &str) -> Result<String, String> {
    let rest = text.strip_prefix("http://").or_else(|| text.strip_prefix("https://"));
    let host = rest.and_then(|rest| rest.split('/').next()).unwrap_or_default();
    let clean = |b: u8| b.is_ascii_alphanumeric() || b"./:_~%+-".contains(&b);
    let named = host.starts_with(|c: char| c.is_ascii_alphanumeric());
    if named && text.len() <= 2000 && text.bytes().all(clean) {
        return Ok(text.to_owned());
    }
    Err("expected the URL of a mirror, such as `http://mirror.example.org/debian`, without a password"
        .to_owned())
}

/// Parses `Name: text`; returns the name of a header and the text.
pub fn http_header(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once(':').unwrap_or((text, ""));
    let token = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
    if name.is_empty() || !name.bytes().all(token) || !text.contains(':') {
        return Err("expected a header and text, such as `Content-Type: text/html`".to_owned());
    }
    Ok((name.to_owned(), value.trim().to_owned()))
}

fn number_and_unit(text: &str) -> (&str, &str) {
    let text = text.trim();
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    (&text[..split], text[split..].trim_start())
}

/// Parses permission bits in octal.
pub fn mode(text: &str) -> Result<u32, String> {
    u32::from_str_radix(text, 8)
        .ok()
        .filter(|mode| *mode <= 0o7777 && (3..=5).contains(&text.len()))
        .ok_or_else(|| "expected three or four octal digits, such as \"0644\"".to_owned())
}

/// Checks and normalises an absolute path in the machine.
pub fn guest_path(text: &str) -> Result<String, String> {
    if !text.starts_with('/') {
        return Err("expected a path that starts with `/`".to_owned());
    }
    if text.split('/').any(|part| part == "..") {
        return Err("expected a path without `..`".to_owned());
    }
    if text.contains(char::is_control) {
        return Err("expected a path without control characters".to_owned());
    }
    let parts: Vec<&str> = text.split('/').filter(|p| !p.is_empty() && *p != ".").collect();
    Ok(format!("/{}", parts.join("/")))
}

/// Whether `text` is a valid name of a declaration.
pub fn is_name(text: &str) -> bool {
    !text.is_empty()
        && text.len() <= 64
        && text.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
        && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
}

/// The name in templates of an input or parameter: `-` and `.` would be operators
/// there.
pub(crate) fn template_name(name: &str) -> String {
    name.replace(['-', '.'], "_")
}

/// Whether `text` is a template.
pub(crate) fn is_template(text: &str) -> bool {
    text.contains("{{") || text.contains("{%")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mirror_is_an_address_and_nothing_else() {
        for good in ["http://mirror.example.org/debian", "https://127.0.0.1:3142/debian-archive/~x/"] {
            assert_eq!(mirror_url(good).as_deref(), Ok(good));
        }
        for wrong in [
            "--setup-hook=id",
            "/etc/passwd",
            "-",
            "file:/srv/mirror",
            "copy:/srv",
            "deb [trusted=yes] http://evil.example ./",
            "http://",
            "http:///etc",
            "http://-x/",
            "http://user:secret@host/",
            "http://host/a b",
            "http://host/$(id)",
            "http://host/a\nb",
            "http://host/a#b&c",
        ] {
            assert!(mirror_url(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn sizes_and_durations() {
        assert_eq!(size("512MiB"), Ok(512 << 20));
        assert_eq!(size("10 GB"), Ok(10_000_000_000));
        assert!(size("99999999999TiB").is_err());
        assert!(size("1.5GiB").is_err());
        assert_eq!(duration("10m"), Ok(600));
        assert!(duration("0s").is_err());
        assert!(duration("900h").is_err());
    }

    #[test]
    fn modes_and_paths() {
        assert_eq!(mode("0644"), Ok(0o644));
        assert_eq!(mode("4755"), Ok(0o4755));
        assert!(mode("7").is_err());
        assert!(mode("0999").is_err());
        assert_eq!(guest_path("/a//b/./c/"), Ok("/a/b/c".into()));
        assert!(guest_path("a").is_err());
        assert!(guest_path("/a/../b").is_err());
    }
}

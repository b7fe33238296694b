//! Cache specs, such as `type=s3,bucket=b,prefix=p`, in the grammar of
//! BuildKit's `--cache-from` and `--cache-to`.

use std::collections::BTreeMap;
use std::time::Duration;

use super::kind::{COMMON, Says};
pub use super::kind::{Kind, is_plain};

/// Default retry budget of a cache.
const RETRY_BUDGET: Duration = Duration::from_secs(60);
/// Default age at which used objects are refreshed, so that a bucket's expiry
/// rule does not delete them.
const TOUCH: Duration = Duration::from_secs(24 * 60 * 60);

/// How much a build sends to a cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    /// All states but sealed disks.
    #[default]
    Min,
    /// Every state.
    Max,
}

/// A parsed spec.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spec {
    /// The type of the cache.
    pub kind: Kind,
    /// Options of the service, in the service's own words.
    pub options: BTreeMap<String, String>,
    /// How much a build sends to it.
    pub mode: Mode,
    /// Whether a failed upload is only a note, and not an error.
    pub ignore_error: bool,
    /// The trust domains that are read, in their order; for `--cache-to`, the
    /// first one is written. If it is empty, vimg takes them from the
    /// environment.
    pub domains: Vec<String>,
    /// The name of the project in the cache [default: the project's name].
    pub name: Option<String>,
    /// The retry budget: the delay that failures may add to a build.
    pub timeout: Duration,
    /// Refresh used objects that are older than this.
    pub touch_refresh: Duration,
    /// Ignore records that were written longer ago.
    pub max_age: Option<Duration>,
    /// Its name in messages, without secrets.
    pub label: String,
}

impl Spec {
    /// Parses a spec of `--cache-from`, or of `--cache-to` if `to`.
    ///
    /// # Errors
    ///
    /// The mistake in the spec.
    pub fn parse(text: &str, to: bool) -> Result<Self, String> {
        let mut words = BTreeMap::new();
        for field in fields(text)? {
            // BuildKit's short form of a registry.
            let (name, value) = match field.split_once('=') {
                Some((name, value)) => (name.trim().to_owned(), value.to_owned()),
                None if !field.is_empty() && words.is_empty() && !text.contains('=') => {
                    words.insert("type".to_owned(), "registry".to_owned());
                    ("ref".to_owned(), field)
                }
                // The field is not printed: it may be the rest of a password.
                None => {
                    return Err(format!(
                        "expected NAME=VALUE after `{}`",
                        words.keys().next_back().map_or("", String::as_str)
                    ));
                }
            };
            if words.insert(name.clone(), value).is_some() {
                return Err(format!("duplicate field `{name}`"));
            }
        }
        let all = || Kind::ALL.iter().filter(|(_, k)| *k != Kind::Memory).map(|(word, _)| *word);
        let Some(kind) = words.remove("type") else {
            let known: Vec<&str> = all().collect();
            return Err(format!("missing field `type`: expected one of {}", known.join(", ")));
        };
        let Some((word, kind)) = Kind::ALL.iter().find(|(word, _)| *word == kind).copied() else {
            let known: Vec<&str> = all().collect();
            return Err(format!("unknown type `{kind}`: expected one of {}", known.join(", ")));
        };
        let mut spec = Self {
            kind,
            options: BTreeMap::new(),
            mode: Mode::Min,
            // A failing cache should not fail a build.
            ignore_error: true,
            domains: Vec::new(),
            name: None,
            timeout: RETRY_BUDGET,
            touch_refresh: TOUCH,
            max_age: None,
            label: String::new(),
        };
        for name in kind.required(to) {
            if words.get(*name).is_none_or(String::is_empty) {
                return Err(format!("type={word} needs `{name}`"));
            }
        }
        spec.label = word.to_owned();
        for field in kind.fields() {
            let Some(value) = words.get(field.name).filter(|v| !v.is_empty()) else { continue };
            let shown = match field.says {
                Says::Place => value.as_str(),
                Says::Url => value.rsplit_once('@').map_or(value.as_str(), |(_, rest)| rest),
                Says::Address | Says::Plain | Says::Private => continue,
            };
            spec.label.push(if spec.label.contains(' ') { '/' } else { ' ' });
            spec.label.push_str(shown);
        }
        for (name, value) in words {
            spec.set(&name, value)?;
        }
        Ok(spec)
    }

    fn set(&mut self, name: &str, value: String) -> Result<(), String> {
        let yes = |value: &str| match value {
            "true" | "1" | "" => Ok(true),
            "false" | "0" => Ok(false),
            _ => Err(format!("invalid `{name}`: expected `true` or `false`")),
        };
        match name {
            "mode" => {
                self.mode = match value.as_str() {
                    "min" => Mode::Min,
                    "max" => Mode::Max,
                    _ => return Err("invalid `mode`: expected `min` or `max`".into()),
                }
            }
            "ignore-error" => self.ignore_error = yes(&value)?,
            "domain" => {
                self.domains = value.split(';').map(str::to_owned).collect();
                if let Some(domain) = self.domains.iter().find(|d| !is_name(d)) {
                    return Err(format!("invalid domain `{domain}`: expected {NAMES}"));
                }
            }
            "name" if is_name(&value) => self.name = Some(value),
            "name" => return Err(format!("invalid name `{value}`: expected {NAMES}")),
            "timeout" => self.timeout = duration(name, &value)?,
            "touch_refresh" => self.touch_refresh = duration(name, &value)?,
            "max-age" => self.max_age = Some(duration(name, &value)?),
            "use_path_style" => {
                // The service's option has the opposite meaning.
                self.options.insert("enable_virtual_host_style".into(), (!yes(&value)?).to_string());
            }
            _ => {
                let own = self.kind.fields();
                let Some(field) = own.iter().find(|field| field.name == name) else {
                    let known: Vec<&str> = own.iter().chain(COMMON).map(|field| field.name).collect();
                    return Err(format!(
                        "unknown field `{name}` of type={}: expected one of {}",
                        self.kind.word(),
                        known.join(", ")
                    ));
                };
                self.options.insert(field.option.to_owned(), value);
            }
        }
        Ok(())
    }

    /// Returns an option of its service.
    pub fn option(&self, name: &str) -> Option<&str> {
        self.options.get(name).map(String::as_str)
    }
}

const NAMES: &str = "1 to 48 letters, digits, `.`, `-` or `_`, no `.` first";

/// Whether a text is a valid domain or name, which can be part of an object's
/// name in every service.
pub fn is_name(text: &str) -> bool {
    (1..=48).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
        && !text.starts_with('.')
}

/// Parses a number of seconds, or a number with the unit `s`, `m`, `h` or `d`.
pub fn duration(name: &str, text: &str) -> Result<Duration, String> {
    let fail = || format!("invalid `{name}`: expected a time such as `90s`, `10m`, `24h` or `30d`");
    let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    let unit = match unit {
        "" | "s" => 1,
        "m" => 60,
        "h" => 60 * 60,
        "d" => 24 * 60 * 60,
        _ => return Err(fail()),
    };
    let number: u64 = number.parse().map_err(|_| fail())?;
    number.checked_mul(unit).map(Duration::from_secs).ok_or_else(fail)
}

/// Splits at commas, as CSV does: a field can be in double quotes, in which two
/// quotes stand for one.
pub fn fields(text: &str) -> Result<Vec<String>, String> {
    let mut fields = Vec::new();
    let mut rest = text;
    loop {
        let field = if let Some(quoted) = rest.strip_prefix('"') {
            let mut value = String::new();
            let mut chars = quoted.char_indices();
            let end = loop {
                match chars.next() {
                    Some((at, '"')) if quoted[at + 1..].starts_with('"') => {
                        chars.next();
                        value.push('"');
                    }
                    Some((at, '"')) => break at + 1,
                    Some((_, c)) => value.push(c),
                    None => return Err("a quote is not closed".into()),
                }
            };
            rest = &quoted[end..];
            if !rest.is_empty() && !rest.starts_with(',') {
                return Err("expected a comma after a closing quote".into());
            }
            value
        } else {
            let end = rest.find(',').unwrap_or(rest.len());
            let value = rest[..end].to_owned();
            rest = &rest[end..];
            value
        };
        fields.push(field);
        match rest.strip_prefix(',') {
            Some(more) => rest = more,
            None => return Ok(fields),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn people_can_write_what_they_know_from_elsewhere() {
        let s3 = Spec::parse(
            "type=s3,region=eu-west-1,bucket=b,prefix=p/,endpoint_url=http://127.0.0.1:9,use_path_style=true,\
             access_key_id=a,secret_access_key=s,mode=max,ignore-error=false,timeout=5s",
            true,
        )
        .unwrap();
        assert_eq!((s3.kind, s3.mode, s3.ignore_error), (Kind::S3, Mode::Max, false));
        assert_eq!(s3.options["enable_virtual_host_style"], "false");
        assert_eq!(s3.options["endpoint"], "http://127.0.0.1:9");
        assert_eq!((s3.label.as_str(), s3.timeout), ("s3 b/p/", Duration::from_secs(5)));
        let local = Spec::parse("type=local,src=/a b", false).unwrap();
        assert_eq!((local.options["root"].as_str(), local.mode), ("/a b", Mode::Min));
        let quoted = Spec::parse("type=local,\"dest=/a,\"\"b\"", true).unwrap();
        assert_eq!(quoted.options["root"], "/a,\"b");
        let short = Spec::parse("host:5000/cache/web", false).unwrap();
        assert_eq!((short.kind, short.options["ref"].as_str()), (Kind::Registry, "host:5000/cache/web"));
        let domains = Spec::parse("type=gha,domain=pr-7;main", false).unwrap();
        assert_eq!(domains.domains, ["pr-7", "main"]);
        let dav = Spec::parse("type=webdav,url=http://user:secret@host/x", false).unwrap();
        assert_eq!(dav.label, "webdav host/x");
    }

    #[test]
    fn mistakes_are_named() {
        let wrong = |text: &str, why: &str| {
            let error = Spec::parse(text, true).unwrap_err();
            assert!(error.contains(why), "{text}: {error}");
        };
        wrong("type=s4", "unknown type `s4`");
        wrong("bucket=b", "missing field `type`");
        wrong("type=s3", "needs `bucket`");
        wrong("type=local,src=/x", "needs `dest`");
        wrong("type=s3,bucket=b,buckett=c", "unknown field `buckett`");
        wrong("type=s3,bucket=b,bucket=c", "duplicate field `bucket`");
        wrong("type=s3,bucket=b,mode=some", "`min` or `max`");
        wrong("type=gha,domain=a/b", "invalid domain");
        wrong("type=gha,timeout=fast", "expected a time");
        wrong("type=gha,timeout=99999999999999999999d", "expected a time");
        wrong("type=gha,\"x", "not closed");
        wrong("type=gha,x", "expected NAME=VALUE");
    }

    #[test]
    fn no_text_makes_it_panic() {
        use proptest::prelude::*;
        proptest!(|(text in "(type=(s3|gha|local))?[\",=a-z;\u{e9} ]{0,40}")| {
            let _ = Spec::parse(&text, true);
        });
    }
}

//! Permissions that a project needs from the user.
//!
//! A recipe decides what happens in guests, with the project's files. The user
//! decides about trusted keys, caches and secrets. A permission covers the exact
//! setting; a changed setting needs a new permission.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use vimg_lang::model::{Secret, SecretSource};
use vimg_lang::{Setting, Settings, Takes};

use super::global::Global;
use super::output::Error;
use super::settings;

/// The request for the name and password in a proxy's address. Permissions
/// store this text, so a change revokes them.
pub(super) const PROXY_PASSWORD: &str = "the password of the proxy, for guests";
/// The file with all permissions, beside the user's settings.
pub(super) const FILE: &str = "trusted.kdl";
/// The lines of this file: a project's root and a request.
const KNOWN: &[Setting] = &[("allow", Takes::Texts(2))];

/// The permissions of a project.
#[derive(Debug, Clone)]
pub(super) struct Consent {
    root: PathBuf,
    allowed: BTreeSet<String>,
    /// Whether this run allows everything (`--trust`).
    all: bool,
    /// The sources of secrets for this run, by their names (`--secret`).
    pub(super) given: Vec<(String, SecretSource)>,
}

impl Consent {
    /// Reads the permissions of the project at `root`.
    pub(super) fn of(root: &Path, global: &Global) -> Result<Self, Error> {
        let allowed =
            noted()?.into_iter().filter(|(path, _)| Path::new(path) == root).map(|(_, request)| request);
        let given = global.secret.clone();
        Ok(Self { root: root.to_owned(), allowed: allowed.collect(), all: global.trust, given })
    }

    /// Creates permissions for a test.
    #[cfg(test)]
    pub(super) fn for_tests(root: &Path, allowed: &[&str], given: Vec<(String, SecretSource)>) -> Self {
        let allowed = allowed.iter().map(|request| (*request).to_owned()).collect();
        Self { root: root.to_owned(), allowed, all: false, given }
    }

    /// The project's root.
    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    fn allows(&self, request: &str) -> bool {
        self.all || self.allowed.contains(request)
    }

    /// Returns the project's settings that are allowed, and the requests that are
    /// not.
    pub(super) fn settings(&self) -> Result<(Settings, Vec<String>), Error> {
        let mut refused = Vec::new();
        let mut allowed = Settings::new();
        for (name, all) in settings::project(&self.root)? {
            for texts in all {
                let request = setting(&name, &texts);
                if self.allows(&request) {
                    allowed.entry(name.clone()).or_default().push(texts);
                } else {
                    refused.push(request);
                }
            }
        }
        Ok((allowed, refused))
    }

    /// Whether guests get the name and password of the user's proxies.
    pub(super) fn allows_proxy_password(&self) -> bool {
        self.allows(PROXY_PASSWORD)
    }

    /// Returns why scripts do not get a secret; `None` if they do.
    pub(super) fn refuses(&self, secret: &Secret) -> Option<String> {
        let from = origin(&self.root, secret)?;
        (!self.allows(&request(&from, secret)))
            .then(|| format!("{from} is not allowed; see `vimg trust`, or pass it with --secret"))
    }
}

/// Returns a notice about requests that are not allowed, if there are any.
pub(super) fn notice(refused: &[String]) -> Option<String> {
    let first = refused.first()?;
    let more = match refused.len() {
        1 => String::new(),
        n => format!(" and {} more", n - 1),
    };
    let file = settings::PROJECT_SETTINGS;
    Some(format!("ignored `{}` of {file}{more}: you have not allowed it; see `vimg trust`", shown(first)))
}

/// Prepares a text from a project for a terminal: escapes characters that could
/// hide text or move the cursor.
pub(super) fn shown(text: &str) -> String {
    let quoted = vimg_lang::quoted(text);
    let plain = text.chars().filter(|c| matches!(c, '"' | '\\')).count() + text.len() + 2 == quoted.len();
    if plain { text.to_owned() } else { quoted }
}

/// Returns the request for a setting of a project.
pub(super) fn setting(name: &str, texts: &[String]) -> String {
    std::iter::once(name).chain(texts.iter().map(String::as_str)).collect::<Vec<_>>().join(" ")
}

/// Returns the request for a secret whose value comes from `from`.
pub(super) fn request(from: &str, secret: &Secret) -> String {
    format!("{from} as the secret `{}`", secret.name)
}

/// Returns where a secret comes from; `None` for a file of the project itself.
/// Other files are named by their real path, with all links resolved.
pub(super) fn origin(root: &Path, secret: &Secret) -> Option<String> {
    match &secret.source {
        SecretSource::Env(name) => Some(format!("the variable {name}")),
        SecretSource::File(path) if is_inside(path) => None,
        SecretSource::File(path) => {
            let path = root.join(path);
            let path = path.canonicalize().unwrap_or(path);
            Some(format!("the file {}", path.display()))
        }
    }
}

/// Whether a path stays inside the project. Does not resolve links: the caller
/// must open the path beneath the root.
pub(super) fn is_inside(path: &str) -> bool {
    use std::path::Component;
    Path::new(path).components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir))
}

/// Reads all permissions: projects' roots and requests.
pub(super) fn noted() -> Result<Vec<(String, String)>, Error> {
    let Some(dir) = settings::dir() else { return Ok(Vec::new()) };
    let found = settings::read(&dir.join(FILE), KNOWN)?;
    let pairs = found.into_values().flatten().filter_map(|texts| match <[String; 2]>::try_from(texts) {
        Ok([root, request]) => Some((root, request)),
        Err(_) => None,
    });
    Ok(pairs.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_paths_that_go_down_are_the_projects_own() {
        assert!(is_inside("keys/token") && is_inside("./a"));
        for path in ["/etc/shadow", "../x", "a/../../x", "a/.."] {
            assert!(!is_inside(path), "{path}");
        }
    }

    #[test]
    fn what_is_asked_for_is_shown_as_it_is() {
        assert_eq!(shown("cache-to type=local,dest=\\x \"y\""), "cache-to type=local,dest=\\x \"y\"");
        assert_eq!(shown("a\u{1b}[1A"), "\"a\\u{1b}[1A\"");
        assert_eq!(shown("a\u{202e}b"), "\"a\\u{202e}b\"");
    }

    #[test]
    fn requests_are_named_once() {
        assert_eq!(notice(&[]), None);
        let one = notice(&["cache-to type=local,dest=/x".into()]).unwrap();
        assert!(one.contains("cache-to type=local") && !one.contains("more"));
        assert!(notice(&["a".into(), "b".into(), "c".into()]).unwrap().contains("and 2 more"));
    }
}

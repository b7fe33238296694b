//! Permissions that a project needs from the user, and `vimg trust`.
//!
//! A recipe and its `vimg.kdl` may decide what happens in guests, with the
//! project's files. The user decides about trusted keys, about caches, and about
//! secrets. A permission covers the exact setting; a changed one needs another.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde_json::json;
use vimg_lang::model::{Secret, SecretSource};
use vimg_lang::{Setting, Settings, Takes};

use super::{Error, Global, Outcome, print, print_json, project, settings};
use crate::report::Style;

/// The request for what a proxy's address has before the `@`.
const PROXY_PASSWORD: &str = "the password of the proxy, for guests";
/// Where it is noted, beside the user's settings.
const FILE: &str = "trusted.kdl";
/// A project's root, and what it asks for.
const KNOWN: &[Setting] = &[("allow", Takes::Texts(2))];

/// Allow a project's secrets, caches and trusted keys
///
/// vimg ignores these settings of a project until you allow them. A changed
/// setting needs a new permission. In CI, `VIMG_TRUST=1` allows everything for
/// one run.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The project's directory [default: the project here]
    path: Option<PathBuf>,
    /// List permissions and the requests of this project; change nothing
    #[arg(long, conflicts_with = "revoke")]
    list: bool,
    /// Revoke the project's permissions
    #[arg(long)]
    revoke: bool,
}

/// What a project was allowed.
#[derive(Debug, Clone)]
pub(super) struct Consent {
    root: PathBuf,
    allowed: BTreeSet<String>,
    /// This run allows everything.
    all: bool,
    /// Where this run takes secrets from, by their names.
    pub(super) given: Vec<(String, SecretSource)>,
}

impl Consent {
    /// What the project at `root` was allowed.
    pub(super) fn of(root: &Path, global: &Global) -> Result<Self, Error> {
        let allowed =
            noted()?.into_iter().filter(|(path, _)| Path::new(path) == root).map(|(_, request)| request);
        let given = global.secret.clone();
        Ok(Self { root: root.to_owned(), allowed: allowed.collect(), all: global.trust, given })
    }

    /// A project that was allowed this much.
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

    /// The project's settings, as far as they are allowed, and what is not.
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

    /// Says why a secret is not handed over, if it is not.
    pub(super) fn refuses(&self, secret: &Secret) -> Option<String> {
        let from = origin(&self.root, secret)?;
        (!self.allows(&request(&from, secret)))
            .then(|| format!("{from} is not allowed; see `vimg trust`, or pass it with --secret"))
    }
}

/// The notice about requests that are not allowed.
pub(super) fn notice(refused: &[String]) -> Option<String> {
    let first = refused.first()?;
    let more = match refused.len() {
        1 => String::new(),
        n => format!(" and {} more", n - 1),
    };
    let file = super::caching::PROJECT_SETTINGS;
    Some(format!("ignored `{}` of {file}{more}: you have not allowed it; see `vimg trust`", shown(first)))
}

/// A text of a project for a terminal: characters that could hide text or move the
/// cursor are escaped.
fn shown(text: &str) -> String {
    let quoted = vimg_lang::quoted(text);
    let plain = text.chars().filter(|c| matches!(c, '"' | '\\')).count() + text.len() + 2 == quoted.len();
    if plain { text.to_owned() } else { quoted }
}

/// A setting of a project, as a request.
fn setting(name: &str, texts: &[String]) -> String {
    std::iter::once(name).chain(texts.iter().map(String::as_str)).collect::<Vec<_>>().join(" ")
}

/// A secret from there, as a request.
fn request(from: &str, secret: &Secret) -> String {
    format!("{from} as the secret `{}`", secret.name)
}

/// Where a secret comes from; `None` if that is the project's own file. A file
/// elsewhere is named by its real path, whatever links lead there.
fn origin(root: &Path, secret: &Secret) -> Option<String> {
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

/// Whether a path can only lead to a file of the project. Does not resolve links:
/// the caller must open it beneath the root.
pub(super) fn is_inside(path: &str) -> bool {
    use std::path::Component;
    Path::new(path).components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir))
}

/// All that was allowed: roots and requests.
fn noted() -> Result<Vec<(String, String)>, Error> {
    let Some(dir) = settings::dir() else { return Ok(Vec::new()) };
    let found = settings::read(&dir.join(FILE), KNOWN)?;
    let pairs = found.into_values().flatten().filter_map(|texts| match <[String; 2]>::try_from(texts) {
        Ok([root, request]) => Some((root, request)),
        Err(_) => None,
    });
    Ok(pairs.collect())
}

fn note(all: &BTreeSet<(String, String)>) -> Outcome {
    let dir = settings::dir().ok_or_else(|| Error::host("neither XDG_CONFIG_HOME nor HOME is set"))?;
    let path = dir.join(FILE);
    let line = |(root, request): &(String, String)| {
        let quoted = |text: &str| vimg_lang::quoted(text);
        format!("allow {} {}\n", quoted(root), quoted(request))
    };
    let text: String = all.iter().map(line).collect();
    crate::store::replace(&path, text.as_bytes())
        .map_err(|e| Error::host(format!("{} can't be written: {e}", path.display())))
}

/// The requests of the project at `root`. If the recipe does not compile, its
/// secrets are not among them, and the second value is its error.
fn requests(root: &Path, here: &Global) -> Result<(BTreeSet<String>, Outcome), Error> {
    let mut found: BTreeSet<String> = BTreeSet::new();
    for (name, all) in settings::project(root)? {
        found.extend(all.iter().map(|texts| setting(&name, texts)));
    }
    let compiled = project::load(here);
    if let Ok(loaded) = &compiled {
        let of = |secret: &Secret| Some(request(&origin(root, secret)?, secret));
        found.extend(loaded.model.secrets.iter().filter_map(of));
    }
    if settings::proxies().have_password() {
        found.insert(PROXY_PASSWORD.to_owned());
    }
    Ok((found, compiled.map(|_| ())))
}

pub(super) fn run(args: &Args, global: &Global, style: Style) -> Outcome {
    let mut all: BTreeSet<(String, String)> = noted()?.into_iter().collect();
    if let Some(path) = args.path.as_ref().filter(|path| !path.exists()) {
        let help = "name a directory with a `main.vimg`".to_owned();
        let message = format!("there is no project at {}", path.display());
        return Err(Error::Message(message, Some(help), super::RECIPE));
    }
    let here = Global { file: args.path.clone().or_else(|| global.file.clone()), ..global.clone() };
    let found = project::find(&here);
    if args.list {
        // Without a project here, the list is still of use.
        let asked = match found {
            Ok((root, _)) => {
                let (root, name) = named(&root)?;
                let asked = requests(&root, &here)?.0;
                asked
                    .into_iter()
                    .map(|request| (name.clone(), request))
                    .filter(|one| !all.contains(one))
                    .collect()
            }
            Err(_) => BTreeSet::new(),
        };
        return list(&all, &asked, style);
    }
    let (root, name) = named(&found?.0)?;
    if args.revoke {
        let before = all.len();
        all.retain(|(path, _)| *path != name);
        note(&all)?;
        let n = before - all.len();
        if style.json {
            return print_json(&json!({ "project": name, "revoked": n }));
        }
        return print(&format!("{name}: revoked {n} permission{}\n", if n == 1 { "" } else { "s" }));
    }
    let (requests, compiled) = requests(&root, &here)?;
    let new: Vec<String> = requests
        .iter()
        .filter(|request| !all.contains(&(name.clone(), (*request).clone())))
        .cloned()
        .collect();
    if !new.is_empty() {
        all.extend(new.iter().map(|request| (name.clone(), request.clone())));
        note(&all)?;
    }
    if style.json {
        print_json(&json!({ "project": name, "allowed": new }))?;
        return compiled;
    }
    if requests.is_empty() && compiled.is_err() {
        // What the recipe would ask for is not known.
        return compiled;
    }
    let mut out = String::new();
    match (requests.is_empty(), new.is_empty()) {
        (true, _) => out.push_str(&format!("{name} needs no permissions\n")),
        (_, true) => out.push_str(&format!("{name}: everything it asks for is already allowed\n")),
        _ => out.push_str(&format!("allowed for {name}:\n")),
    }
    for request in &new {
        out.push_str(&format!("  {}\n", shown(request)));
    }
    print(&out)?;
    // Its secrets are not known: that is worth an error, after what was done.
    compiled
}

/// A project's root, and its name in the list.
fn named(root: &Path) -> Result<(PathBuf, String), Error> {
    let fail = |e: std::io::Error| Error::Message(format!("{}: {e}", root.display()), None, super::RECIPE);
    let root = root.canonicalize().map_err(fail)?;
    let name = root.to_str().ok_or_else(|| Error::host("the project's path is not UTF-8"))?.to_owned();
    Ok((root, name))
}

fn list(all: &BTreeSet<(String, String)>, asked: &BTreeSet<(String, String)>, style: Style) -> Outcome {
    if style.json {
        let entry = |name: &'static str| move |(root, request): &(String, String)| json!({ "project": root, name: request });
        let trusted: Vec<_> = all.iter().map(entry("allowed")).collect();
        let asked: Vec<_> = asked.iter().map(entry("asked")).collect();
        return print_json(&json!({ "trusted": trusted, "asked": asked }));
    }
    let mut out = String::new();
    let mut part = |entries: &BTreeSet<(String, String)>, heading: &dyn Fn(&str) -> String| {
        let mut last = "";
        for (root, request) in entries {
            if root != last {
                out.push_str(&heading(root));
                last = root;
            }
            out.push_str(&format!("  {}\n", shown(request)));
        }
    };
    part(all, &|root| format!("{root}\n"));
    part(asked, &|root| format!("{root} asks for, and you have not allowed:\n"));
    if all.is_empty() {
        out.insert_str(0, "no project has any permissions\n");
    }
    print(&out)
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

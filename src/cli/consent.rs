//! What the user lets a checkout have beyond its rights, and `vimg trust`.
//!
//! A recipe and its `vimg.kdl` are strangers: they say what happens in guests,
//! with the project's files. Whom the user's store believes, where states are
//! sent, and which of the user's secrets a script gets is the user's to say.
//! Consent covers the exact setting; a changed one needs a new consent.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde_json::json;
use vimg_lang::model::{Secret, SecretSource};
use vimg_lang::{Setting, Settings, Takes};

use super::{Error, Global, Outcome, print, print_json, project, settings};
use crate::report::Style;

/// Where it is noted, beside the user's settings.
const FILE: &str = "trusted.kdl";
/// A project's root, and a wish of it.
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
    /// List permissions, and change nothing
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
        let allowed = noted()?.into_iter().filter(|(path, _)| Path::new(path) == root).map(|(_, wish)| wish);
        let given = global.secret.clone();
        Ok(Self { root: root.to_owned(), allowed: allowed.collect(), all: global.trust, given })
    }

    /// The project's root.
    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    fn allows(&self, wish: &str) -> bool {
        self.all || self.allowed.contains(wish)
    }

    /// The project's settings, as far as they are allowed, and what is not.
    pub(super) fn settings(&self) -> Result<(Settings, Vec<String>), Error> {
        let mut refused = Vec::new();
        let mut allowed = Settings::new();
        for (name, all) in settings::project(&self.root)? {
            for texts in all {
                let wish = setting(&name, &texts);
                if self.allows(&wish) {
                    allowed.entry(name.clone()).or_default().push(texts);
                } else {
                    refused.push(wish);
                }
            }
        }
        Ok((allowed, refused))
    }

    /// Says why a secret is not handed over, if it is not.
    pub(super) fn refuses(&self, secret: &Secret) -> Option<String> {
        let wish = source(secret)?;
        (!self.allows(&wish)).then(|| {
            format!("the recipe asks for {wish}: allow it with `vimg trust`, or pass it with --secret")
        })
    }
}

/// What is told of wishes that are not allowed.
pub(super) fn notice(refused: &[String]) -> Option<String> {
    let first = refused.first()?;
    let more = match refused.len() {
        1 => String::new(),
        n => format!(" and {} more", n - 1),
    };
    let file = super::caching::PROJECT_SETTINGS;
    Some(format!("ignored `{first}` of {file}{more}: you have not allowed it; see `vimg trust`"))
}

/// A setting of a project, as a wish.
fn setting(name: &str, texts: &[String]) -> String {
    std::iter::once(name).chain(texts.iter().map(String::as_str)).collect::<Vec<_>>().join(" ")
}

/// Where a secret comes from, as a wish; `None` if that is the project's own.
fn source(secret: &Secret) -> Option<String> {
    match &secret.source {
        SecretSource::Env(name) => Some(format!("the variable {name} as the secret `{}`", secret.name)),
        SecretSource::File(path) if is_inside(path) => None,
        SecretSource::File(path) => Some(format!("the file {path} as the secret `{}`", secret.name)),
    }
}

/// Whether a path can only lead to a file of the project. Links in it are
/// another matter, for who opens it.
pub(super) fn is_inside(path: &str) -> bool {
    use std::path::Component;
    Path::new(path).components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir))
}

/// All that was allowed: roots and wishes.
fn noted() -> Result<Vec<(String, String)>, Error> {
    let Some(dir) = settings::dir() else { return Ok(Vec::new()) };
    let found = settings::read(&dir.join(FILE), KNOWN)?;
    let pairs = found.into_values().flatten().filter_map(|texts| match <[String; 2]>::try_from(texts) {
        Ok([root, wish]) => Some((root, wish)),
        Err(_) => None,
    });
    Ok(pairs.collect())
}

fn note(all: &BTreeSet<(String, String)>) -> Outcome {
    let dir = settings::dir().ok_or_else(|| Error::host("neither XDG_CONFIG_HOME nor HOME is set"))?;
    let path = dir.join(FILE);
    let line = |(root, wish): &(String, String)| {
        let quoted = |text: &str| vimg_lang::quoted(text);
        format!("allow {} {}\n", quoted(root), quoted(wish))
    };
    let text: String = all.iter().map(line).collect();
    crate::store::replace(&path, text.as_bytes())
        .map_err(|e| Error::host(format!("{} can't be written: {e}", path.display())))
}

pub(super) fn run(args: &Args, global: &Global, style: Style) -> Outcome {
    let mut all: BTreeSet<(String, String)> = noted()?.into_iter().collect();
    if args.list {
        let list: Vec<_> =
            all.iter().map(|(root, wish)| json!({ "project": root, "allowed": wish })).collect();
        if style.json {
            return print_json(&json!({ "trusted": list }));
        }
        if all.is_empty() {
            return print("no project has any permissions\n");
        }
        let mut out = String::new();
        let mut last = "";
        for (root, wish) in &all {
            if root != last {
                out.push_str(&format!("{root}\n"));
                last = root;
            }
            out.push_str(&format!("  {wish}\n"));
        }
        return print(&out);
    }
    let here = Global { file: args.path.clone().or_else(|| global.file.clone()), ..global.clone() };
    let (root, _) = project::find(&here)?;
    let fail = |e: std::io::Error| Error::Message(format!("{}: {e}", root.display()), None, super::RECIPE);
    let root = root.canonicalize().map_err(fail)?;
    let name = root.to_str().ok_or_else(|| Error::host("the project's path is not UTF-8"))?.to_owned();
    if args.revoke {
        let before = all.len();
        all.retain(|(path, _)| *path != name);
        note(&all)?;
        let n = before - all.len();
        return print(&format!("{name}: revoked {n} permission{}\n", if n == 1 { "" } else { "s" }));
    }
    let mut wishes: BTreeSet<String> = BTreeSet::new();
    for (setting_name, all) in settings::project(&root)? {
        wishes.extend(all.iter().map(|texts| setting(&setting_name, texts)));
    }
    // A recipe that does not compile yet has no secrets that are known.
    let compiled = project::load(&here);
    if let Ok(loaded) = &compiled {
        wishes.extend(loaded.model.secrets.iter().filter_map(source));
    }
    let new: Vec<&String> =
        wishes.iter().filter(|wish| !all.contains(&(name.clone(), (*wish).clone()))).collect();
    let mut out = String::new();
    match (wishes.is_empty(), new.is_empty()) {
        (true, _) => out.push_str(&format!("{name} needs no permissions\n")),
        (_, true) => out.push_str(&format!("{name}: everything it asks for is already allowed\n")),
        _ => out.push_str(&format!("allowed for {name}:\n")),
    }
    for wish in &new {
        out.push_str(&format!("  {wish}\n"));
    }
    if !new.is_empty() {
        let new: Vec<String> = new.into_iter().cloned().collect();
        all.extend(new.into_iter().map(|wish| (name.clone(), wish)));
        note(&all)?;
    }
    print(&out)?;
    // Its secrets are not known: that is worth an error, after what was done.
    compiled.map(|_| ())
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
    fn wishes_are_named_once() {
        assert_eq!(notice(&[]), None);
        let one = notice(&["cache-to type=local,dest=/x".into()]).unwrap();
        assert!(one.contains("cache-to type=local") && !one.contains("more"));
        assert!(notice(&["a".into(), "b".into(), "c".into()]).unwrap().contains("and 2 more"));
    }
}

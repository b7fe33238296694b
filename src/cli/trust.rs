//! `vimg trust`: shows what a project asks for, allows it and revokes it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde_json::json;
use vimg_lang::model::Secret;

use super::consent::{FILE, PROXY_PASSWORD, noted, origin, request, setting, shown};
use super::global::Global;
use super::output::{Error, Outcome, RECIPE, print, print_json};
use super::{project, settings};
use crate::report::Style;

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

/// Returns the requests of the project at `root`. If the recipe does not compile,
/// its secrets are not among them, and the second value is its error.
fn requests(root: &Path, here: &Global) -> Result<(BTreeSet<String>, Outcome), Error> {
    let mut found: BTreeSet<String> = BTreeSet::new();
    for (name, all) in settings::project(root)? {
        found.extend(all.iter().map(|texts| setting(&name, texts)));
    }
    let compiled = project::load(here, &vimg_lang::Partial::default());
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
        return Err(Error::Message(message, Some(help), RECIPE));
    }
    let here = Global { file: args.path.clone().or_else(|| global.file.clone()), ..global.clone() };
    let found = project::find(&here);
    if args.list {
        // The list is useful without a project here, too.
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
        // The recipe's requests are unknown, so "needs no permissions" may be wrong.
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
    // If the recipe does not compile, its secrets are unknown, which is an error.
    compiled
}

/// Returns the real path of a project's root, and its name in the list.
fn named(root: &Path) -> Result<(PathBuf, String), Error> {
    let fail = |e: std::io::Error| Error::Message(format!("{}: {e}", root.display()), None, RECIPE);
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

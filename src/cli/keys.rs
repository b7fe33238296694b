//! The keys of caches: creates a signing key, and trusts others.

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use super::caching;
use super::global::Global;
use super::output::{Error, HOST, Outcome, print, unwritten};
use super::{project, read, settings};
use crate::cache::sign::{PublicKey, Signer};
use crate::cache::spec::is_name;

/// Creates a signing key.
pub(super) fn keygen(file: Option<&PathBuf>) -> Outcome {
    let signer = Signer::generate().map_err(|e| Error::host(format!("can't create a key: {e}")))?;
    if file.is_some_and(|file| file.as_os_str() == "-") {
        return print(&format!("{}\n{}\n", signer.secret(), signer.public()));
    }
    let path = match file {
        Some(file) => file.clone(),
        None => caching::key_path().ok_or_else(|| Error::host("neither XDG_CONFIG_HOME nor HOME is set"))?,
    };
    let fail = |e: std::io::Error| {
        if e.kind() != std::io::ErrorKind::AlreadyExists {
            return unwritten(&path, &e, HOST);
        }
        let help = "others may trust this key: delete the file only if no one needs it".to_owned();
        Error::Message(format!("can't write {}: {e}", path.display()), Some(help), HOST)
    };
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).map_err(fail)?;
    }
    let mut opened =
        std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path).map_err(fail)?;
    opened.write_all(format!("{}\n", signer.secret()).as_bytes()).map_err(fail)?;
    // A closed standard error is no reason to fail.
    let _ = writeln!(std::io::stderr(), "wrote {}; readers must trust its public half:", path.display());
    print(&format!("{}\n", signer.public()))
}

/// Adds a trusted key to the settings of the user or of the project.
pub(super) fn trust(key: &str, domain: &str, in_project: bool, global: &Global) -> Outcome {
    let wrong = |why: String| Error::Message(why, None, 2);
    let key: PublicKey = key.parse().map_err(wrong)?;
    if !is_name(domain.strip_suffix('*').filter(|d| !d.is_empty()).unwrap_or(domain)) && domain != "*" {
        return Err(wrong(format!(
            "invalid trust domain `{domain}`: expected letters, digits, `.`, `-`, `_`; `*` only last"
        )));
    }
    let path = match in_project {
        true => project::find(global)?.0.join(settings::PROJECT_SETTINGS),
        false => settings::dir()
            .ok_or_else(|| Error::host("neither XDG_CONFIG_HOME nor HOME is set"))?
            .join("config.kdl"),
    };
    let mut text = match path.exists() {
        true => read::read_recipe(&path)?,
        false => String::new(),
    };
    let line = format!("trust \"{domain}\" \"{key}\"\n");
    if text.contains(line.trim_end()) {
        return print(&format!("{} already trusts this key for `{domain}`\n", path.display()));
    }
    if !text.is_empty() && !text.ends_with('\n') {
        text.push('\n');
    }
    text.push_str(&line);
    crate::store::replace(&path, text.as_bytes())
        .map_err(|e| Error::host(format!("can't write {}: {e}", path.display())))?;
    print(&format!("added to {}: {line}", path.display()))
}

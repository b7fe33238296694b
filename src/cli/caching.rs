//! Chooses the caches, trusted keys and trust domains of a run. A flag wins over
//! a variable, a variable over the project's `vimg.kdl`, and that over the user's
//! settings.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use vimg_lang::Settings;

use super::ci::{CiDomains, ci_domains};
use super::consent::{self, Consent};
use super::output::Error;
use super::settings;
use crate::cache::Caches;
use crate::cache::remote::Remote;
use crate::cache::sign::{PublicKey, Signer, Trust};
use crate::cache::spec::{Kind, Spec, fields, is_name, is_plain};
use crate::event::{Event, Sink};
use crate::store::{Area, Store, TrustsOrigin};

/// Options that name the caches of a build.
#[derive(Debug, Clone, Default, clap::Args)]
pub(super) struct CacheArgs {
    /// Fetch states from this cache, such as `type=s3,bucket=B`; can be
    /// repeated, with the nearest cache first
    #[arg(long, value_name = "SPEC")]
    cache_from: Vec<String>,
    /// Send states to this cache; can be repeated
    #[arg(long, value_name = "SPEC")]
    cache_to: Vec<String>,
}

/// Open caches, and notices about those that could not be opened.
#[derive(Default)]
pub(super) struct Opened {
    pub(super) caches: Caches,
    pub(super) notices: Vec<String>,
    /// Decides which fetched states in the local store a build may use.
    pub(super) trusts: Option<TrustsOrigin>,
}

/// The specs of caches, before they are opened, and the trusted keys.
struct Named {
    from: Vec<String>,
    to: Vec<String>,
    ci_domains: CiDomains,
    opened: Opened,
    /// Trust domains that this run reads or writes.
    domains: BTreeSet<String>,
}

impl Opened {
    /// Restricts the store to the states that this run may use.
    pub(super) fn store(&self, store: &Store) -> Store {
        match &self.trusts {
            Some(trusts) => store.clone().trusting(trusts.clone()),
            None => store.clone(),
        }
    }
}

impl CacheArgs {
    fn named(&self, consent: &Consent) -> Result<Named, Error> {
        let (project, refused) = consent.settings()?;
        let files = [project, settings::user()?];
        let said = |flags: &[String], variable: &str, name: &str| -> Result<Vec<String>, Error> {
            if !flags.is_empty() {
                return Ok(flags.iter().filter(|f| !f.is_empty()).cloned().collect());
            }
            if let Some(lines) = variable_lines(variable) {
                return Ok(lines);
            }
            let found = files.iter().find_map(|file| file.get(name));
            Ok(found.into_iter().flatten().filter_map(|texts| texts.first().cloned()).collect())
        };
        let from = said(&self.cache_from, "VIMG_CACHE_FROM", "cache-from")?;
        let to = said(&self.cache_to, "VIMG_CACHE_TO", "cache-to")?;
        let ci_domains = ci_domains();
        let mut opened = trust_roots(consent.root(), &files)?;
        opened.notices.extend(consent::notice(&refused));
        let mut domains: BTreeSet<String> =
            ci_domains.read.iter().chain(&ci_domains.write).cloned().collect();
        let named = from.iter().map(|text| Spec::parse(text, false));
        domains.extend(named.flatten().flat_map(|spec| spec.domains));
        let named = to.iter().map(|text| Spec::parse(text, true));
        domains.extend(named.flatten().flat_map(|spec| spec.domains));
        opened.trusts = Some(trusts(&opened.caches.trust, &domains));
        Ok(Named { from, to, ci_domains, opened, domains })
    }

    /// Restricts the store to the states that a build may use. Ignores mistakes in
    /// settings; the commands that use caches report them.
    pub(super) fn store(&self, consent: &Consent, store: Store) -> Store {
        let Ok(Named { to, ci_domains, mut opened, domains, .. }) = self.named(consent) else { return store };
        if opened.caches.signer.is_some() {
            for spec in to.iter().filter_map(|text| Spec::parse(text, true).ok()) {
                if let Some(domain) = spec.domains.first().or(ci_domains.write.as_ref()) {
                    opened.caches.trust.add_written(domain);
                }
            }
        }
        store.trusting(trusts(&opened.caches.trust, &domains))
    }

    /// Opens the caches of a project, without sending a request.
    pub(super) fn open(&self, consent: &Consent, store: &Store) -> Result<Opened, Error> {
        let Named { from, to, ci_domains, mut opened, domains } = self.named(consent)?;
        if from.is_empty() && to.is_empty() {
            return Ok(opened);
        }
        opened.caches.seen = Some(store.dir(Area::Seen));
        for (n, text) in from.iter().enumerate() {
            let mut spec = parse(text, false, "--cache-from")?;
            // Only the last directory must exist: vimg creates nearer ones, and
            // fills them from the caches after them.
            if n + 1 == from.len() && is_missing(&spec) {
                let filled = |text: &String| {
                    Spec::parse(text, true).is_ok_and(|s| is_missing(&s) && s.label == spec.label)
                };
                if !to.iter().any(filled) {
                    opened.notices.push(format!("cache {} does not exist", spec.label));
                }
                continue;
            }
            if spec.domains.is_empty() {
                spec.domains.clone_from(&ci_domains.read);
            }
            match Remote::open(spec.clone()) {
                Ok(remote) => opened.caches.from.push(Arc::new(remote)),
                // A build works without its cache, so this is no error.
                Err(why) => opened.notices.push(format!("cache {} is ignored: {why}", spec.label)),
            }
        }
        if opened.caches.trust.is_empty() && !opened.caches.from.is_empty() {
            opened.caches.from.clear();
            opened.notices.push(
                "caches are ignored: no trusted keys are configured; add one with `vimg cache trust`".into(),
            );
        }
        for text in &to {
            let mut spec = parse(text, true, "--cache-to")?;
            if spec.domains.is_empty() {
                let Some(write) = &ci_domains.write else {
                    opened.notices.push(format!("nothing is sent to {}: {}", spec.label, ci_domains.why));
                    continue;
                };
                spec.domains.push(write.clone());
                // States that these domains have need not be sent again.
                spec.domains.extend(ci_domains.read.iter().filter(|d| *d != write).cloned());
            }
            if opened.caches.signer.is_none() {
                let why = "there is no signing key; create one with `vimg cache keygen`";
                if !spec.ignore_error {
                    return Err(Error::Message(format!("{}: {why}", spec.label), None, 2));
                }
                opened.notices.push(format!("nothing is sent to {}: {why}", spec.label));
                continue;
            }
            opened.caches.trust.add_written(&spec.domains[0]);
            match Remote::open(spec.clone()) {
                Ok(remote) => opened.caches.to.push(Arc::new(remote)),
                Err(why) if spec.ignore_error => {
                    opened.notices.push(format!("nothing is sent to {}: {why}", spec.label));
                }
                Err(why) => return Err(Error::Message(format!("{}: {why}", spec.label), None, 2)),
            }
        }
        // Once more, because the trust now includes the domains that this run
        // writes to.
        opened.trusts = Some(trusts(&opened.caches.trust, &domains));
        Ok(opened)
    }
}

/// Accepts a fetched state in the local store if a cache with these domains could
/// provide it.
fn trusts(trust: &Trust, domains: &BTreeSet<String>) -> TrustsOrigin {
    let (trust, domains) = (trust.clone(), domains.clone());
    Arc::new(move |domain, key| domains.contains(domain) && trust.trusts_tag(domain, key))
}

/// Whether a cache is a directory that does not exist.
fn is_missing(spec: &Spec) -> bool {
    spec.kind == Kind::Local && spec.option("root").is_some_and(|root| !Path::new(root).exists())
}

/// Sends notices about caches that can't be used.
pub(super) fn tell(sink: &Sink, notices: Vec<String>) {
    notices.into_iter().for_each(|text| sink(Event::Notice { text }));
}

/// Opens the one cache that a `vimg cache` command works on.
pub(super) fn one(text: &str, to: bool, consent: &Consent) -> Result<(Opened, Arc<Remote>), Error> {
    let ci_domains = ci_domains();
    let mut spec = parse(text, to, "the cache")?;
    if spec.domains.is_empty() {
        spec.domains.clone_from(&ci_domains.read);
    }
    let files = [consent.settings()?.0, settings::user()?];
    Ok((trust_roots(consent.root(), &files)?, remote(spec)?))
}

/// Returns the spec of the first cache that builds use, the default of `vimg
/// cache` commands.
pub(super) fn first(consent: &Consent) -> Result<Option<String>, Error> {
    for (variable, name) in [("VIMG_CACHE_FROM", "cache-from"), ("VIMG_CACHE_TO", "cache-to")] {
        if let Some(first) = variable_lines(variable).and_then(|lines| lines.into_iter().next()) {
            return Ok(Some(first));
        }
        for file in [consent.settings()?.0, settings::user()?] {
            if let Some(text) = file.get(name).and_then(|all| all.first()?.first().cloned()) {
                return Ok(Some(text));
            }
        }
    }
    Ok(None)
}

fn parse(text: &str, to: bool, what: &str) -> Result<Spec, Error> {
    // A command on a local cache accepts `src` and `dest` alike: both name the
    // directory.
    let spec = Spec::parse(text, to).or_else(|e| {
        Spec::parse(text, !to).ok().filter(|s| s.kind == Kind::Local && what == "the cache").ok_or(e)
    });
    spec.map_err(|why| Error::Message(format!("invalid value `{}` for {what}: {why}", shown(text)), None, 2))
}

/// Returns a spec for messages. It hides every value that may be secret: all but
/// those of fields that are known to be harmless.
fn shown(text: &str) -> String {
    let Ok(fields) = fields(text) else { return "...".into() };
    let fields = fields.iter().map(|field| match field.split_once('=') {
        Some((name, _)) if is_plain(name) => field.clone(),
        Some((name, _)) => format!("{name}=..."),
        None => "...".to_owned(),
    });
    fields.collect::<Vec<_>>().join(",")
}

fn remote(spec: Spec) -> Result<Arc<Remote>, Error> {
    Remote::open(spec).map(Arc::new).map_err(|why| Error::Message(why, None, 2))
}

fn variable_lines(name: &str) -> Option<Vec<String>> {
    let text = std::env::var(name).ok()?;
    let lines: Vec<String> =
        text.lines().map(str::trim).filter(|l| !l.is_empty()).map(str::to_owned).collect();
    // CI systems set variables without a value to the empty string.
    (!lines.is_empty()).then_some(lines)
}

/// Collects the trusted keys, the signing key and the project's name in caches.
fn trust_roots(root: &Path, [project, user]: &[Settings; 2]) -> Result<Opened, Error> {
    let mut trust = Trust::default();
    let wrong = |what: String, why: String| Error::Message(format!("{what}: {why}"), None, 2);
    for line in variable_lines("VIMG_CACHE_TRUST").unwrap_or_default() {
        let (domain, key) = line
            .split_once('=')
            .ok_or_else(|| wrong("VIMG_CACHE_TRUST".into(), "expected DOMAIN=KEY in each line".into()))?;
        let key: PublicKey = key.parse().map_err(|why| wrong("VIMG_CACHE_TRUST".into(), why))?;
        trust.add(domain.trim(), key);
    }
    for (file, settings) in [(settings::PROJECT_SETTINGS, project), ("config.kdl", user)] {
        for texts in settings.get("trust").into_iter().flatten() {
            if let [domain, key] = texts.as_slice() {
                trust.add(domain, key.parse().map_err(|why| wrong(format!("`trust` in {file}"), why))?);
            }
        }
    }
    let signer = signer()?;
    if let Some(signer) = &signer {
        trust.add_own(signer.public());
        ci_domains().write.iter().for_each(|domain| trust.add_written(domain));
    }
    // A repository has the same name everywhere, unlike its checkouts.
    let repository = ["GITHUB_REPOSITORY", "CI_PROJECT_PATH"].iter().find_map(std::env::var_os);
    let name = repository.map(PathBuf::from).unwrap_or_else(|| root.to_owned());
    let name = name.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let plain = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '-' };
    let name: String = name.chars().map(plain).take(48).collect();
    let name = if is_name(&name) { name } else { "project".to_owned() };
    let caches = Caches::new(trust, signer, name);
    Ok(Opened { caches, notices: Vec::new(), trusts: None })
}

/// Returns the path of the user's signing key.
pub(super) fn key_path() -> Option<PathBuf> {
    Some(settings::dir()?.join("cache.key"))
}

fn signer() -> Result<Option<Signer>, Error> {
    if let Some(text) = std::env::var("VIMG_CACHE_KEY").ok().filter(|v| !v.trim().is_empty()) {
        let signer = Signer::parse(&text);
        return signer.map(Some).map_err(|why| Error::Message(format!("VIMG_CACHE_KEY: {why}"), None, 2));
    }
    let Some(path) = key_path().filter(|path| path.exists()) else { return Ok(None) };
    let text = super::read::read_recipe(&path)?;
    let signer = Signer::parse(&text);
    signer.map(Some).map_err(|why| Error::Message(format!("{}: {why}", path.display()), None, 2))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_secret_is_shown() {
        assert_eq!(shown("type=s3,secret_access_key=x,bucket=b"), "type=s3,secret_access_key=...,bucket=b");
        assert_eq!(
            shown("type=webdav,url=http://u:p@h,password=a,b"),
            "type=webdav,url=...,password=...,..."
        );
    }
}

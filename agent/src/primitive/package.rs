//! `package`: installs Debian packages, all of a step in one transaction.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use super::context::Context;
use super::pending::Held;
use crate::command;
use crate::failure::Failure;
use crate::ledger::Entry;
use crate::offline;
use crate::packages::{self, Package};
use crate::protocol::Digest;

/// How long the network may take to come up.
const NETWORK: Duration = Duration::from_secs(60);
/// Time limit of one call of apt.
const TIMEOUT: Duration = Duration::from_secs(3600);

/// Options for dpkg: no questions, and no sync for each file.
const DPKG: [&str; 5] = [
    "--option=Dpkg::Options::=--force-confdef",
    "--option=Dpkg::Options::=--force-confold",
    "--option=Dpkg::Options::=--force-unsafe-io",
    "--option=Dpkg::Use-Pty=0",
    "--option=DPkg::Lock::Timeout=300",
];

pub(super) fn apply(names: &[String], context: &mut Context) -> Result<bool, Failure> {
    let list = packages::list();
    let there = packages::parse(&list);
    let missing: Vec<&String> = names.iter().filter(|name| !installed(name, &there)).collect();
    let others: Vec<&String> = names.iter().filter(|name| is_automatic(name, &there)).collect();
    if missing.is_empty() && others.is_empty() {
        // If they were preinstalled, their services start at this step.
        return Ok(context.switch.wants(context.ledger.page()));
    }
    let before = context.ledger.keep(list.as_bytes())?;
    let noted = |after| Entry::Packages { names: names.to_vec(), before, after };
    context.ledger.note(&noted(None))?;
    if !missing.is_empty() {
        context.network(true)?;
        get(&missing, context)?;
    }
    if !others.is_empty() {
        // They were installed as dependencies, and would be removed with the package that
        // needs them.
        mark("manual", &others, context)?;
    }
    let list = packages::list();
    let after = context.ledger.keep(list.as_bytes())?;
    context.ledger.note(&noted(Some(after)))?;
    Ok(list.as_bytes() != context.ledger.kept(&before)?.as_slice())
}

/// Refreshes the lists of packages and installs what is missing.
fn get(missing: &[&String], context: &Context) -> Result<(), Failure> {
    refresh(context)?;
    install(missing, context)?;
    let there = packages::parse(&packages::list());
    // apt may succeed with another version than the requested one.
    let versioned = |name: &&&String| name.contains('=') && !installed(name, &there);
    if let Some(name) = missing.iter().find(versioned) {
        return Err(Failure::new(format!("apt-get did not install {name}: a pin may forbid it")));
    }
    // The cache of .deb files is of no use to the next machine.
    apt(apt_get().arg("clean"), "apt-get clean", context)
}

/// How long fetched lists count as current. The agent of a server may run for months.
const CURRENT: Duration = Duration::from_secs(600);

/// Fetches apt's lists, unless this agent has just fetched them from the same sources:
/// which versions are installed must not depend on when a layer below was built.
fn refresh(context: &Context) -> Result<(), Failure> {
    static FETCHED: Mutex<Option<(Digest, SystemTime)>> = Mutex::new(None);
    wait_for_network()?;
    let now = sources();
    let mut fetched = FETCHED.lock().unwrap_or_else(PoisonError::into_inner);
    let current = fetched.is_some_and(|(sources, at)| {
        sources == now && at.elapsed().is_ok_and(|age| age < CURRENT) && has_lists()
    });
    if !current {
        let mut update = apt_get();
        update.args(["--option=APT::Update::Error-Mode=any", "--option=Acquire::Retries=3", "update"]);
        apt(&mut update, "apt-get update", context)?;
        *fetched = Some((now, SystemTime::now()));
    }
    Ok(())
}

/// Whether apt has lists of packages. Scripts often delete them.
fn has_lists() -> bool {
    let lists = fs::read_dir("/var/lib/apt/lists").into_iter().flatten().flatten();
    lists.map(|entry| entry.file_name()).any(|name| name.to_string_lossy().contains("_Packages"))
}

/// Computes a digest of everything that decides which packages apt offers: sources, keys,
/// pins, settings.
fn sources() -> Digest {
    const PLACES: [&str; 3] = ["/etc/apt", "/usr/share/keyrings", "/var/lib/dpkg/arch"];
    let mut hasher = blake3::Hasher::new();
    let mut open: Vec<PathBuf> = PLACES.iter().map(PathBuf::from).collect();
    while let Some(path) = open.pop() {
        hasher.update(path.as_os_str().as_encoded_bytes());
        hasher.update(b"\0");
        match fs::read_dir(&path) {
            Ok(entries) => {
                let mut inner: Vec<PathBuf> = entries.flatten().map(|e| e.path()).collect();
                inner.sort();
                open.extend(inner);
            }
            Err(_) => {
                let bytes = fs::read(&path).unwrap_or_default();
                hasher.update(&(bytes.len() as u64).to_le_bytes());
                hasher.update(&bytes);
            }
        }
    }
    Digest(*hasher.finalize().as_bytes())
}

/// Preinstalls packages of a new layer, before the `leaving` layers are reverted. Their
/// services start only with the new layer. The ledger records the packages as if the
/// leaving layers had already been reverted.
pub(super) fn ahead(names: &[String], leaving: &[String], context: &mut Context) -> Result<bool, Failure> {
    let there = packages::parse(&packages::list());
    let missing: Vec<&String> = names.iter().filter(|name| !installed(name, &there)).collect();
    if context.switch.ahead == Some(false) {
        return Ok(false);
    }
    if !missing.is_empty() {
        context.network(true)?;
        refresh(context)?;
        if offline::Hold::is_taken() || would_remove(missing.iter().copied())? {
            context.say("can't install the new packages before the old ones are removed")?;
            context.switch.ahead = Some(false);
            return Ok(false);
        }
    }
    context.switch.ahead = Some(true);
    let mut base = there.clone();
    let pages = context.ledger.pages()?;
    for page in leaving.iter().filter_map(|layer| pages.iter().find(|page| page.layer == *layer)) {
        for entry in page.entries.iter().rev() {
            let Entry::Packages { before, after: Some(after), .. } = entry else { continue };
            without(&mut base, &kept(before, context)?, &kept(after, context)?);
        }
    }
    let before = context.ledger.keep(packages::write(&base).as_bytes())?;
    let noted = |after| Entry::Packages { names: names.to_vec(), before, after };
    context.ledger.note(&noted(None))?;
    let asked = match missing.as_slice() {
        [] => String::new(),
        missing => {
            let hold = offline::Hold::enter().map_err(|e| Failure::at(offline::HELD, e))?;
            get(missing, context)?;
            hold.asked()
        }
    };
    let list = packages::list();
    let after = context.ledger.keep(list.as_bytes())?;
    context.ledger.note(&noted(Some(after)))?;
    let packages = packages::parse(&list).into_keys().filter(|name| !there.contains_key(name)).collect();
    context.switch.hold(context.ledger.page(), Held { packages, asked });
    Ok(!missing.is_empty())
}

/// Reverts in the list `there` the changes from `before` to `after`.
fn without(there: &mut Packages, before: &Packages, after: &Packages) {
    for (name, package) in after {
        match before.get(name) {
            None => drop(there.remove(name)),
            Some(was) if was != package => drop(there.insert(name.clone(), was.clone())),
            Some(_) => {}
        }
    }
    for (name, was) in before.iter().filter(|(name, _)| !after.contains_key(*name)) {
        there.insert(name.clone(), was.clone());
    }
}

type Packages = BTreeMap<String, Package>;

/// Reads a stored list.
fn kept(digest: &Digest, context: &Context) -> Result<Packages, Failure> {
    let bytes = context.ledger.kept(digest)?;
    Ok(packages::parse(&String::from_utf8_lossy(&bytes)))
}

/// Finds the packages that came with a layer, are still installed, and are named by no
/// other layer. Returns those that no other package needs, and the rest.
fn idle_of(
    before: &Packages,
    after: &Packages,
    others: &[String],
    context: &Context,
) -> Result<(Vec<String>, Vec<String>), Failure> {
    let now = packages::parse(&packages::list());
    let came: Vec<&String> = after
        .keys()
        .filter(|name| !before.contains_key(*name) && now.contains_key(*name) && !asked(name, others))
        .collect();
    if came.is_empty() {
        return Ok((Vec::new(), Vec::new()));
    }
    mark("auto", &came, context)?;
    let idle = idle()?;
    Ok(came.into_iter().cloned().partition(|name| idle.contains(bare(name))))
}

fn asked(name: &str, others: &[String]) -> bool {
    others.iter().any(|other| bare(other) == bare(name))
}

/// Splits the installed packages that came with a layer into those that [`revert`] would
/// purge, and the rest.
pub(super) fn partition(
    before: &Digest,
    after: &Digest,
    others: &[String],
    context: &Context,
    gone: &mut Vec<String>,
    rest: &mut Vec<String>,
) -> Result<(), Failure> {
    let (before, after) = (kept(before, context)?, kept(after, context)?);
    let (idle, _) = idle_of(&before, &after, others, context)?;
    let now = packages::parse(&packages::list());
    let came = after.into_keys().filter(|name| !before.contains_key(name) && now.contains_key(name));
    rest.extend(came.filter(|name| !idle.contains(name)));
    gone.extend(idle);
    Ok(())
}

/// Reverts packages: purges new packages that nothing else needs, and installs replaced or
/// removed packages again. `others` are the packages that other layers name.
pub(super) fn revert(
    before: &Digest,
    after: Option<&Digest>,
    others: &[String],
    context: &Context,
) -> Result<(), Failure> {
    let before = kept(before, context)?;
    let after = match after {
        Some(after) => kept(after, context)?,
        None => packages::parse(&packages::list()),
    };
    let (gone, needed) = idle_of(&before, &after, others, context)?;
    // During a switch, the new layer often needs it, so this is not worth a message.
    for name in needed.iter().filter(|_| !context.switch.is_on()) {
        context.say(&format!("{name} stays: another package needs it"))?;
    }
    if !gone.is_empty() {
        apt(apt_get().args(DPKG).args(["--yes", "purge", "--"]).args(&gone), "apt-get purge", context)?;
    }
    let now = packages::parse(&packages::list());
    let mut back: Vec<String> = before
        .iter()
        .filter(|(name, was)| after.get(*name).is_none_or(|after| after.version != was.version))
        .filter(|(name, was)| now.get(*name).is_none_or(|now| now.version != was.version))
        .map(|(name, was)| format!("{name}={}", was.version))
        .collect();
    if !back.is_empty() {
        wait_for_network()?;
        apt(apt_get().arg("update"), "apt-get update", context)?;
    }
    if context.switch.is_on() {
        let mut free = Vec::new();
        for spec in back {
            if would_remove([&spec])? {
                context.say(&format!("{spec} is not restored: it conflicts with new packages"))?;
            } else {
                free.push(spec);
            }
        }
        back = free;
    }
    if !back.is_empty() {
        let mut install = apt_get();
        install.args(DPKG).args(["--yes", "--no-install-recommends"]);
        install.args(despite(&back.iter().collect::<Vec<_>>())).args(["install", "--"]);
        apt(install.args(&back), "apt-get install", context)?;
        apt(apt_get().arg("clean"), "apt-get clean", context)?;
    }
    // Packages that only this layer named are automatic again.
    let now = packages::parse(&packages::list());
    let automatic: Vec<&String> = before
        .iter()
        .filter(|(name, was)| {
            was.automatic && now.get(*name).is_some_and(|now| !now.automatic) && !asked(name, others)
        })
        .map(|(name, _)| name)
        .collect();
    if automatic.is_empty() { Ok(()) } else { mark("auto", &automatic, context) }
}

/// Returns a package's name without version, suite and architecture.
pub(super) fn bare(name: &str) -> &str {
    name.split(['=', '/', ':']).next().unwrap_or(name)
}

/// Returns a package's name without version and suite, in the form that apt-mark takes.
fn unversioned(name: &str) -> &str {
    name.split(['=', '/']).next().unwrap_or(name)
}

fn mark(how: &str, names: &[&String], context: &Context) -> Result<(), Failure> {
    let mut mark = command::command("apt-mark");
    mark.arg("--quiet=2").arg(how).arg("--").args(names.iter().map(|name| unversioned(name)));
    apt(&mut mark, "apt-mark", context)
}

/// Lists automatic packages that no other package needs.
fn idle() -> Result<HashSet<String>, Failure> {
    let mut simulate = apt_get();
    let (done, text) =
        command::query(simulate.args(["--simulate", "--purge", "autoremove"]), command::QUESTION)?;
    if !done {
        return Err(Failure::new("apt-get can't list the packages that nothing needs"));
    }
    // `Purg NAME [VERSION]`, or `Remv` if it would keep configuration files.
    let words = text.lines().filter_map(|l| l.strip_prefix("Purg ").or_else(|| l.strip_prefix("Remv ")));
    Ok(words.filter_map(|l| Some(bare(l.split_whitespace().next()?).to_owned())).collect())
}

/// Whether installing these packages would remove others.
fn would_remove<'a>(names: impl IntoIterator<Item = &'a String>) -> Result<bool, Failure> {
    let mut simulate = apt_get();
    let names: Vec<&String> = names.into_iter().collect();
    simulate.args(["--simulate", "--yes", "--no-install-recommends"]).args(despite(&names));
    simulate.arg("install").arg("--").args(names);
    let (done, text) = command::query(&mut simulate, command::QUESTION)?;
    // If the simulation fails, the real installation will report why.
    Ok(!done || text.lines().any(|line| line.starts_with("Remv ") || line.starts_with("Purg ")))
}

/// Options for packages with an explicit version or suite, which takes precedence over
/// holds and newer versions.
fn despite(names: &[&String]) -> &'static [&'static str] {
    match names.iter().any(|name| name.contains(['=', '/'])) {
        true => &["--allow-downgrades", "--allow-change-held-packages"],
        false => &[],
    }
}

fn install(names: &[&String], context: &Context) -> Result<(), Failure> {
    let mut apt_get = apt_get();
    apt_get.args(DPKG).args(["--yes", "--no-install-recommends", "--option=Acquire::Retries=3"]);
    apt_get.args(despite(names)).args(["install", "--"]).args(names);
    apt(&mut apt_get, "apt-get install", context)
}

fn apt_get() -> Command {
    let mut command = command::command("apt-get");
    command
        .env("DEBIAN_FRONTEND", "noninteractive")
        .env("DEBCONF_NONINTERACTIVE_SEEN", "true")
        .env("APT_LISTCHANGES_FRONTEND", "none")
        .env("NEEDRESTART_MODE", "l")
        .env("EDITOR", "true")
        .envs(offline::proxies())
        .arg("--quiet=2");
    command
}

fn apt(command: &mut Command, what: &str, context: &Context) -> Result<(), Failure> {
    command::run(command, TIMEOUT, &context.output()).map_err(|mut failure| {
        failure.message = format!("{what}: {}", failure.message);
        failure
    })
}

/// Whether a package is installed, in the requested version if there is one. Returns
/// `false` for a package with a suite: only apt knows the versions of a suite.
fn installed(spec: &str, there: &BTreeMap<String, Package>) -> bool {
    let version = spec.split_once('=').map(|(_, version)| version);
    let fits = |package: &Package| version.is_none_or(|version| version == package.version);
    !spec.contains('/') && find(spec, there).any(fits)
}

/// Whether a package is installed only as a dependency.
fn is_automatic(spec: &str, there: &BTreeMap<String, Package>) -> bool {
    find(spec, there).any(|package| package.automatic)
}

/// Finds the packages with a name, optionally with an architecture.
fn find<'a>(spec: &str, there: &'a BTreeMap<String, Package>) -> impl Iterator<Item = &'a Package> {
    let name = unversioned(spec).to_owned();
    let named = move |own: &String| *own == name || (!name.contains(':') && bare(own) == name);
    there.iter().filter(move |(own, _)| named(own)).map(|(_, package)| package)
}

/// Waits for a default route. Without a network card, it returns at once: apt may have
/// local sources.
fn wait_for_network() -> Result<(), Failure> {
    let cards = fs::read_dir("/sys/class/net").map(|d| d.flatten().filter(|e| e.file_name() != "lo").count());
    if cards.unwrap_or(0) == 0 {
        return Ok(());
    }
    let start = Instant::now();
    loop {
        let routes = fs::read_to_string("/proc/net/route").unwrap_or_default();
        let default = routes.lines().skip(1).any(|l| l.split_whitespace().nth(1) == Some("00000000"));
        if default {
            return Ok(());
        }
        if start.elapsed() > NETWORK {
            return Err(Failure::new(format!("the machine has no network after {} s", NETWORK.as_secs())));
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_layer_did_to_packages_can_be_taken_out_of_a_list() {
        let list = packages::parse;
        let (before, after) =
            (list("a 1 manual\nb 1 auto\nc 1 manual\n"), list("a 2 manual\nb 1 manual\nd 1 auto\n"));
        // Another layer has added `e`, and removed nothing.
        let mut there = list("a 2 manual\nb 1 manual\nd 1 auto\ne 1 manual\n");
        without(&mut there, &before, &after);
        assert_eq!(there, list("a 1 manual\nb 1 auto\nc 1 manual\ne 1 manual\n"));
    }

    #[test]
    fn what_is_installed_is_found_by_any_name_that_apt_takes() {
        let there = packages::parse("a:amd64 1-1 auto\nb:all 2 manual\nc:i386 3 manual\n");
        for spec in ["a", "a:amd64", "a=1-1", "b", "b=2", "c", "c:i386"] {
            assert!(installed(spec, &there), "{spec}");
        }
        assert_eq!(["a", "a:i386", "a=1", "a:i386/sid"].map(unversioned), ["a", "a:i386", "a", "a:i386"]);
        for spec in ["a=2", "a/bookworm", "a:i386", "d", "b=2-1", "c:amd64"] {
            assert!(!installed(spec, &there), "{spec}");
        }
    }
}

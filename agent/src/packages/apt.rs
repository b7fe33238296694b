//! apt and dpkg, and Debian's rule for what packages start.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use super::control::{field, installed, lacking};
use super::manager::{Hold, List, Mark, Package, Packages, With, parse};
use super::route;
use crate::command::{self, Output};
use crate::failure::Failure;
use crate::init::Verb;
use crate::offline;
use crate::protocol::Digest;

/// Time limit of one call of apt.
const TIMEOUT: Duration = Duration::from_secs(3600);

/// How long fetched lists count as current. The agent of a server may run for months.
const CURRENT: Duration = Duration::from_secs(600);

/// dpkg's list of packages, and apt's of those that it installed as dependencies.
const STATUS: &str = "/var/lib/dpkg/status";
const AUTOMATIC: &str = "/var/lib/apt/extended_states";

/// apt's program for scripts.
const APT_GET: &str = "/usr/bin/apt-get";

/// Options for dpkg: no questions, and no sync for each file.
const DPKG: [&str; 5] = [
    "--option=Dpkg::Options::=--force-confdef",
    "--option=Dpkg::Options::=--force-confold",
    "--option=Dpkg::Options::=--force-unsafe-io",
    "--option=Dpkg::Use-Pty=0",
    "--option=DPkg::Lock::Timeout=300",
];

/// The program that Debian's `invoke-rc.d` and `deb-systemd-invoke` ask before they start
/// a service; exit code 101 forbids it (Debian's policy, "invoke-rc.d interface").
const POLICY: &str = "/usr/sbin/policy-rc.d";
const FORBIDS: &str = "#!/bin/sh\n# Nothing is started while vimg applies a layer offline.\nexit 101\n";

/// The file that records which actions packages have asked for meanwhile.
const HELD: &str = "/run/vimg-held";

/// apt and dpkg.
pub(super) struct Apt;

impl Packages for Apt {
    fn name(&self) -> &'static str {
        "apt"
    }

    fn is_installed(&self) -> bool {
        Path::new(STATUS).exists() && Path::new(APT_GET).exists()
    }

    fn list(&self) -> String {
        let read = |path| fs::read_to_string(path).unwrap_or_default();
        list_of(&read(STATUS), &read(AUTOMATIC))
    }

    /// Only apt knows the versions of a suite.
    fn has(&self, spec: &str, there: &List) -> bool {
        let version = spec.split_once('=').map(|(_, version)| version);
        let fits = |package: &Package| version.is_none_or(|version| version == package.version);
        !spec.contains('/') && find(spec, there).any(fits)
    }

    fn is_automatic(&self, spec: &str, there: &List) -> bool {
        find(spec, there).any(|package| package.automatic)
    }

    fn bare<'a>(&self, spec: &'a str) -> &'a str {
        bare(spec)
    }

    /// Which versions are installed must not depend on when a layer below was built, so
    /// lists count as current only if this agent has just fetched them from the same
    /// sources.
    fn refresh(&self, output: &Output) -> Result<(), Failure> {
        static FETCHED: Mutex<Option<(Digest, SystemTime)>> = Mutex::new(None);
        route::wait()?;
        let now = sources();
        let mut fetched = FETCHED.lock().unwrap_or_else(PoisonError::into_inner);
        let current = fetched.is_some_and(|(sources, at)| {
            sources == now && at.elapsed().is_ok_and(|age| age < CURRENT) && has_lists()
        });
        if !current {
            let mut update = apt_get();
            update.args(["--option=APT::Update::Error-Mode=any", "--option=Acquire::Retries=3", "update"]);
            apt(&mut update, "apt-get update", output)?;
            *fetched = Some((now, SystemTime::now()));
        }
        Ok(())
    }

    fn install(&self, specs: &[&String], with: With, output: &Output) -> Result<(), Failure> {
        self.refresh(output)?;
        let mut install = apt_get();
        let recommended = match with {
            With::Needed => "--no-install-recommends",
            With::Recommended => "--install-recommends",
        };
        install.args(DPKG).args(["--yes", recommended, "--option=Acquire::Retries=3"]);
        install.args(despite(specs)).args(["install", "--"]).args(specs);
        apt(&mut install, "apt-get install", output)?;
        let there = parse(&self.list());
        // apt may succeed with another version than the requested one.
        let versioned = |name: &&&String| name.contains('=') && !self.has(name, &there);
        if let Some(name) = specs.iter().find(versioned) {
            return Err(Failure::new(format!("apt-get did not install {name}: a pin may forbid it")));
        }
        clean(output)
    }

    fn lacking(&self, spec: &str) -> Vec<Vec<String>> {
        lacking(&fs::read_to_string(STATUS).unwrap_or_default(), bare(spec))
    }

    fn with_file(&self, name: &str) -> Vec<String> {
        let mut search = command::command("dpkg-query");
        let found =
            command::query(search.args(["--search", "--"]).arg(format!("*/{name}")), command::QUESTION);
        let text = found.map(|(_, text)| text).unwrap_or_default();
        let owners: BTreeSet<&str> = owners(&text).into_values().flatten().collect();
        owners.into_iter().map(str::to_owned).collect()
    }

    fn restore(
        &self,
        packages: &[(&String, &String)],
        careful: bool,
        output: &Output,
    ) -> Result<Vec<String>, Failure> {
        if packages.is_empty() {
            return Ok(Vec::new());
        }
        route::wait()?;
        apt(apt_get().arg("update"), "apt-get update", output)?;
        let (mut back, mut left_out) = (Vec::new(), Vec::new());
        for (name, version) in packages {
            let spec = format!("{name}={version}");
            if careful && self.would_remove(&[&spec])? { left_out.push(spec) } else { back.push(spec) }
        }
        if !back.is_empty() {
            let mut install = apt_get();
            install.args(DPKG).args(["--yes", "--no-install-recommends"]);
            install.args(despite(&back.iter().collect::<Vec<_>>())).args(["install", "--"]);
            apt(install.args(&back), "apt-get install", output)?;
            clean(output)?;
        }
        Ok(left_out)
    }

    fn remove(&self, names: &[String], output: &Output) -> Result<(), Failure> {
        apt(apt_get().args(DPKG).args(["--yes", "purge", "--"]).args(names), "apt-get purge", output)
    }

    fn mark(&self, mark: Mark, specs: &[&String], output: &Output) -> Result<(), Failure> {
        let how = match mark {
            Mark::Manual => "manual",
            Mark::Automatic => "auto",
        };
        let mut mark = command::command("apt-mark");
        mark.arg("--quiet=2").arg(how).arg("--").args(specs.iter().map(|spec| unversioned(spec)));
        apt(&mut mark, "apt-mark", output)
    }

    fn idle(&self) -> Result<HashSet<String>, Failure> {
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

    fn would_remove(&self, specs: &[&String]) -> Result<bool, Failure> {
        let mut simulate = apt_get();
        simulate.args(["--simulate", "--yes", "--no-install-recommends"]).args(despite(specs));
        simulate.arg("install").arg("--").args(specs);
        let (done, text) = command::query(&mut simulate, command::QUESTION)?;
        // If the simulation fails, the real installation will report why.
        Ok(!done || text.lines().any(|line| line.starts_with("Remv ") || line.starts_with("Purg ")))
    }

    fn ask(&self, name: &str) -> Result<(), String> {
        let mut dpkg = command::command("dpkg-query");
        dpkg.args(["--show", "--showformat=${db:Status-Status}\n", "--", name]);
        let (_, text) = command::query(&mut dpkg, command::QUESTION).map_err(|f| f.message)?;
        match text.lines().next() {
            Some("installed") => Ok(()),
            Some(status) if !status.is_empty() => Err(format!("its dpkg status is {status}")),
            _ => Err("it is not installed".into()),
        }
    }

    fn files_of(&self, packages: &[String]) -> Result<String, Failure> {
        if packages.is_empty() {
            return Ok(String::new());
        }
        let mut list = command::command("dpkg-query");
        Ok(command::query(list.args(["--listfiles", "--"]).args(packages), command::QUESTION)?.1)
    }

    fn owns_alone(&self, packages: &[String], paths: &[&str]) -> Result<bool, Failure> {
        let mut search = command::command("dpkg-query");
        let (_, text) = command::query(search.args(["--search", "--"]).args(paths), command::QUESTION)?;
        let owners = owners(&text);
        let purged = |owner: &&str| packages.iter().any(|name| bare(name) == *owner);
        Ok(paths.iter().any(|path| owners.get(path).is_none_or(|names| names.iter().all(purged))))
    }

    fn forbids(&self) -> Option<(&'static str, &'static str)> {
        Some((POLICY, FORBIDS))
    }

    fn can_hold(&self) -> bool {
        fs::symlink_metadata(POLICY).is_err()
    }

    fn hold(&self) -> Result<Box<dyn Hold>, Failure> {
        let hold = Held::enter().map_err(|e| Failure::at(HELD, e))?;
        Ok(Box::new(hold))
    }

    fn caches(&self) -> &'static [&'static str] {
        &["/var/lib/apt/lists", "/var/cache/apt"]
    }
}

/// The policy that records what packages ask for. Drop removes it.
struct Held;

impl Held {
    fn enter() -> io::Result<Self> {
        fs::write(HELD, "")?;
        let text = format!("#!/bin/sh\necho \"$*\" >>{HELD}\nexit 101\n");
        let mut file = fs::File::options().write(true).create_new(true).mode(0o755).open(POLICY)?;
        let held = Self;
        file.write_all(text.as_bytes())?;
        Ok(held)
    }
}

impl Hold for Held {
    fn asked(&self) -> Vec<(String, Verb)> {
        asked(&fs::read_to_string(HELD).unwrap_or_default())
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let _ = fs::remove_file(POLICY);
        let _ = fs::remove_file(HELD);
    }
}

/// Parses the arguments of `policy-rc.d`, one call per line. The starts of new services
/// are left out: all units of new packages are started.
fn asked(lines: &str) -> Vec<(String, Verb)> {
    let lines: BTreeSet<&str> = lines.lines().collect();
    let one = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().filter(|word| !word.starts_with('-')).collect();
        let [unit, action, ..] = words[..] else { return None };
        let verb = match action {
            "restart" | "try-restart" => Verb::TryRestart,
            "reload" | "force-reload" => Verb::TryReload,
            _ => return None,
        };
        Some((unit.to_owned(), verb))
    };
    lines.into_iter().filter_map(one).collect()
}

fn list_of(status: &str, automatic: &str) -> String {
    let automatic: HashSet<&str> = automatic
        .split("\n\n")
        .filter(|stanza| field(stanza, "Auto-Installed") == Some("1"))
        .filter_map(|stanza| field(stanza, "Package"))
        .collect();
    let mut lines: Vec<String> = installed(status)
        .filter_map(|stanza| {
            let (name, version) = (field(stanza, "Package")?, field(stanza, "Version")?);
            let architecture = field(stanza, "Architecture")?;
            let how = if automatic.contains(name) { "auto" } else { "manual" };
            Some(format!("{name}:{architecture} {version} {how}\n"))
        })
        .collect();
    lines.sort();
    lines.concat()
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

/// Returns a package's name without version, suite and architecture.
fn bare(name: &str) -> &str {
    name.split(['=', '/', ':']).next().unwrap_or(name)
}

/// Returns a package's name without version and suite, in the form that apt-mark takes.
fn unversioned(name: &str) -> &str {
    name.split(['=', '/']).next().unwrap_or(name)
}

/// Options for packages with an explicit version or suite, which takes precedence over
/// holds and newer versions.
fn despite(names: &[&String]) -> &'static [&'static str] {
    match names.iter().any(|name| name.contains(['=', '/'])) {
        true => &["--allow-downgrades", "--allow-change-held-packages"],
        false => &[],
    }
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
        .arg("--quiet=2")
        // apt would give package scripts a search path of its own.
        .arg(format!("--option=DPkg::Path={}", offline::path()));
    command
}

/// Deletes the .deb files that apt fetched: they are of no use to the next machine.
fn clean(output: &Output) -> Result<(), Failure> {
    apt(apt_get().arg("clean"), "apt-get clean", output)
}

fn apt(command: &mut Command, what: &str, output: &Output) -> Result<(), Failure> {
    command::run(command, TIMEOUT, output).map_err(|mut failure| {
        failure.message = format!("{what}: {}", failure.message);
        failure
    })
}

/// Finds the packages with a name, optionally with an architecture.
fn find<'a>(spec: &str, there: &'a List) -> impl Iterator<Item = &'a Package> {
    let name = unversioned(spec).to_owned();
    let named = move |own: &String| *own == name || (!name.contains(':') && bare(own) == name);
    there.iter().filter(move |(own, _)| named(own)).map(|(_, package)| package)
}

/// Parses the output of `dpkg-query --search`: paths, and the packages that contain them.
fn owners(text: &str) -> BTreeMap<&str, Vec<&str>> {
    let mut owners: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for line in text.lines().filter(|line| !line.starts_with("diversion by ")) {
        let Some((names, path)) = line.split_once(": ") else { continue };
        owners.entry(path).or_default().extend(names.split(", ").map(bare));
    }
    owners
}

#[cfg(test)]
mod tests {
    use super::super::manager::write;
    use super::*;

    #[test]
    fn packages_are_read_from_the_files_of_dpkg_and_apt() {
        let status = "Package: b\nStatus: install ok installed\nVersion: 2:1-1\nArchitecture: all\n\n\
                      Package: a\nStatus: install ok installed\nDescription: Version\n Version: 9\n\
                      Version: 1\nArchitecture: amd64\n\n\
                      Package: c\nStatus: deinstall ok config-files\nVersion: 3\nArchitecture: amd64\n";
        let automatic = "Package: a\nArchitecture: amd64\nAuto-Installed: 1\n\n\
                         Package: b\nArchitecture: amd64\nAuto-Installed: 0\n";
        let list = list_of(status, automatic);
        assert_eq!(list, "a:amd64 1 auto\nb:all 2:1-1 manual\n");
        let parsed = parse(&list);
        assert_eq!(parsed["b"], Package { version: "2:1-1".into(), automatic: false });
        assert!(parsed["a:amd64"].automatic);
        assert_eq!(parse(&write(&parsed)), parsed);
    }

    #[test]
    fn what_is_installed_is_found_by_any_name_that_apt_takes() {
        let there = parse("a:amd64 1-1 auto\nb:all 2 manual\nc:i386 3 manual\n");
        for spec in ["a", "a:amd64", "a=1-1", "b", "b=2", "c", "c:i386"] {
            assert!(Apt.has(spec, &there), "{spec}");
        }
        assert_eq!(["a", "a:i386", "a=1", "a:i386/sid"].map(unversioned), ["a", "a:i386", "a", "a:i386"]);
        for spec in ["a=2", "a/bookworm", "a:i386", "d", "b=2-1", "c:amd64"] {
            assert!(!Apt.has(spec, &there), "{spec}");
        }
    }

    #[test]
    fn owners_are_read_as_dpkg_tells_them() {
        let text = "nginx-common, base-files: /etc\nnginx-common: /etc/nginx\n\
                    diversion by x from: /etc/nginx\nlibc6:amd64, libc6:i386: /lib\n";
        let owners = owners(text);
        assert_eq!(owners["/etc"], ["nginx-common", "base-files"]);
        assert_eq!((owners["/etc/nginx"].len(), owners["/lib"][0]), (1, "libc6"));
    }

    #[test]
    fn what_packages_asked_for_is_done_once() {
        let lines = "--quiet nginx.service restart 5\nssh reload\nssh reload\nnew.service start\nodd\n";
        let expected = [("nginx.service".to_owned(), Verb::TryRestart), ("ssh".to_owned(), Verb::TryReload)];
        assert_eq!(asked(lines), expected);
    }
}

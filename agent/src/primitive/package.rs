//! `package`: Debian packages, all of a layer in one transaction.

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant, SystemTime};

use super::Context;
use crate::command;
use crate::failure::Failure;

/// apt's lists older than this are fetched anew.
const LISTS_AGE: Duration = Duration::from_secs(12 * 3600);
/// How long the network may take to come up.
const NETWORK: Duration = Duration::from_secs(60);
/// How long one run of apt may take.
const TIMEOUT: Duration = Duration::from_secs(3600);

pub(super) fn apply(names: &[String], context: &Context) -> Result<bool, Failure> {
    let missing: Vec<&String> = names.iter().filter(|name| !installed(name)).collect();
    if missing.is_empty() {
        return Ok(false);
    }
    wait_for_network()?;
    let fresh = !lists_are_fresh();
    if fresh {
        apt(apt_get().arg("update"), "apt-get update", context)?;
    }
    let first = install(&missing, context);
    if first.is_err() && !fresh {
        // The mirror may have moved on since the lists were fetched.
        apt(apt_get().arg("update"), "apt-get update", context)?;
        install(&missing, context)?;
    } else {
        first?;
    }
    // The cache of .deb files is of no use to the next machine.
    apt(apt_get().arg("clean"), "apt-get clean", context)?;
    Ok(true)
}

fn install(names: &[&String], context: &Context) -> Result<(), Failure> {
    let mut apt_get = apt_get();
    apt_get.args([
        "--yes",
        "--no-install-recommends",
        "--option=Dpkg::Options::=--force-confdef",
        "--option=Dpkg::Options::=--force-confold",
        "--option=Dpkg::Options::=--force-unsafe-io",
        "--option=Dpkg::Use-Pty=0",
        "--option=DPkg::Lock::Timeout=300",
        "--option=Acquire::Retries=3",
        "install",
        "--",
    ]);
    apt_get.args(names);
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
        .arg("--quiet=2");
    command
}

fn apt(command: &mut Command, what: &str, context: &Context) -> Result<(), Failure> {
    command::run(command, TIMEOUT, &context.output()).map_err(|mut failure| {
        failure.message = format!("{what}: {}", failure.message);
        failure
    })
}

/// Whether a package is there in the version asked for, if one was.
fn installed(spec: &str) -> bool {
    let (name, version) = match spec.split_once('=') {
        Some((name, version)) => (name, Some(version)),
        None => (spec, None),
    };
    let name = name.split('/').next().unwrap_or(name);
    let mut query = command::command("dpkg-query");
    query.args(["--show", "--showformat=${db:Status-Abbrev}\t${Version}\n", "--", name]);
    let Ok((_, answer)) = command::query(&mut query, command::QUESTION) else { return false };
    answer.lines().any(|line| {
        let (status, found) = line.split_once('\t').unwrap_or((line, ""));
        status.starts_with("ii") && version.is_none_or(|v| v == found)
    })
}

fn lists_are_fresh() -> bool {
    let Ok(entries) = fs::read_dir("/var/lib/apt/lists") else { return false };
    let newest = entries
        .flatten()
        .filter(|e| e.file_name().to_string_lossy().contains("_Packages"))
        .filter_map(|e| e.metadata().ok()?.modified().ok())
        .max();
    // `apt-get update` leaves a list's own date on it, but it touches the
    // directory.
    let fetched = fs::metadata("/var/lib/apt/lists").and_then(|m| m.modified());
    match (newest, fetched) {
        (Some(_), Ok(at)) => SystemTime::now().duration_since(at).is_ok_and(|age| age < LISTS_AGE),
        _ => false,
    }
}

/// Waits for a default route; without a network card there is nothing to wait
/// for, and apt may still have local sources.
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

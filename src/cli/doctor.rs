//! `vimg doctor`

use serde::Serialize;
use serde_json::json;

use super::global::Global;
use super::output::{Error, HOST, Outcome, print, print_json};
use super::project;
use super::settings::{Explained, ProviderArgs};
use crate::base;
use crate::host::network::{Reach, Tools};
use crate::provider::host;
use crate::provider::qemu::{self, Kvm};
use crate::report::{Style, bytes};
use crate::store::Store;
use crate::store::gc::Kind;

/// Test this host, and say what to install
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    provider: ProviderArgs,
}

/// How good a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Level {
    /// All is well.
    Ok,
    /// It works, but slowly, or not for long.
    Warning,
    /// Something does not work.
    Bad,
}

impl Level {
    fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warning => "warn",
            Self::Bad => "BAD",
        }
    }
}

struct Finding {
    what: &'static str,
    level: Level,
    said: String,
    help: Option<String>,
}

fn finding(what: &'static str, result: Result<String, (String, Option<String>)>) -> Finding {
    match result {
        Ok(said) => Finding { what, level: Level::Ok, said, help: None },
        Err((said, help)) => Finding { what, level: Level::Bad, said, help },
    }
}

fn warning(what: &'static str, said: String, help: impl Into<String>) -> Finding {
    Finding { what, level: Level::Warning, said, help: Some(help.into()) }
}

/// Whether a directory is on NFS, where file locks may have no effect
/// (`NFS_SUPER_MAGIC` in linux/magic.h).
fn is_nfs(path: &std::path::Path) -> bool {
    rustix::fs::statfs(path).is_ok_and(|fs| fs.f_type == 0x6969)
}

pub(super) fn run(args: &Args, global: &Global, style: Style) -> Outcome {
    let path = project::store_path(global)?;
    let store = Store::open(&path);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| Error::host(format!("can't start the async runtime: {e}")))?;
    let mut findings = Vec::new();
    let programs = runtime.block_on(qemu::Programs::find(None));
    findings.push(finding(
        "qemu",
        match &programs {
            Ok(p) => Ok(format!("{} at {}", p.version, p.system.display())),
            Err(e) => Err((e.message.clone(), e.help.clone())),
        },
    ));
    if let (Ok(_), Ok(store)) = (&programs, &store) {
        findings.extend(of_machines(&args.provider.explain(store)?));
    }
    if let Ok(store) = &store
        && let Some(isolation) = runtime.block_on(host::isolation(store.root()))
    {
        findings.push(finding("isolation", Ok(isolation)));
    }
    findings.push(finding(
        "network",
        match (args.provider.access(false)?.reach, Tools::find()) {
            (reach, _) if reach.all => Ok("guests use the host's network directly (as asked)".into()),
            (reach, Ok(_)) => Ok(reached(&reach)),
            (_, Err(e)) => Err((e.message, Some(e.help))),
        },
    ));
    findings.extend(base::BUILT_IN.iter().map(|distribution| {
        let found = match distribution.missing() {
            None => Ok(format!("{}: what it needs is installed", distribution.name())),
            Some(e) => Err((format!("{}: {}", distribution.name(), e.message), e.help)),
        };
        finding("bootstrap", found)
    }));
    match &store {
        Ok(store) => findings.extend(of_store(store)),
        Err(e) => {
            let help = "name another place with --store DIR or VIMG_STORE".to_owned();
            findings.push(finding("store", Err((e.to_string(), Some(help)))));
        }
    }
    show(&findings, style)?;
    if findings.iter().all(|f| f.level != Level::Bad) { Ok(()) } else { Err(Error::Code(HOST)) }
}

/// Says how layers are applied and machines are booted. Without KVM and without
/// containers everything works, but more slowly.
fn of_machines(explained: &Explained) -> Vec<Finding> {
    let kvm = match &explained.kvm {
        Some(kvm @ Kvm::Fails(_)) => {
            let help = "without it, machines are emulated, which is many times slower";
            warning("kvm", kvm.to_string(), help)
        }
        Some(kvm) => finding("kvm", Ok(kvm.to_string())),
        None => finding("kvm", Ok("not tested: the accelerator was chosen".into())),
    };
    let said = format!("applied {}", explained.offline.text);
    let layers = match &explained.offline.trouble {
        Some(trouble) => {
            let help = trouble.help.as_ref().map_or_else(String::new, |help| format!("; {help}"));
            warning("layers", said, format!("layers run {}{help}", host::SLOWER))
        }
        None => finding("layers", Ok(said)),
    };
    vec![kvm, layers, finding("machines", Ok(format!("booted {}", explained.booted)))]
}

/// Says what the store takes in total, as `vimg store du` counts it.
fn size_of(store: &Store) -> Finding {
    let usage = match store.usage() {
        Ok(usage) => usage,
        Err(e) => return finding("store", Err((e.to_string(), None))),
    };
    let of = |kind: Kind| usage.iter().filter(move |item| item.kind == kind);
    let sum = |kind: Kind| of(kind).map(|item| item.bytes).sum::<u64>();
    let all: u64 = usage.iter().map(|item| item.bytes).sum();
    let states = of(Kind::State).count();
    let mut said = format!(
        "{} in {}: {states} state{} ({})",
        bytes(all),
        store.root().display(),
        plural(states),
        bytes(sum(Kind::State))
    );
    for (kind, what) in [
        (Kind::Snapshot, "memory snapshots"),
        (Kind::Failed, "failed layers"),
        (Kind::Server, "servers"),
        (Kind::Blob, "kernels"),
    ] {
        if sum(kind) > 0 {
            said.push_str(&format!(", {what} ({})", bytes(sum(kind))));
        }
    }
    finding("store", Ok(said))
}

fn plural(n: usize) -> &'static str {
    if n == 1 { "" } else { "s" }
}

/// Tests the store and the filesystem that it is on.
fn of_store(store: &Store) -> Vec<Finding> {
    let mut findings = vec![size_of(store)];
    if is_nfs(store.root()) {
        let help = "use a local disk: file locks of NFS may not work between hosts".to_owned();
        findings.push(finding("locks", Err(("the store is on NFS".into(), Some(help)))));
    }
    let broken = store.states().iter().filter(|r| store.chain(&r.key).is_none()).count();
    findings.push(match broken {
        0 => finding("states", Ok("every state has all its disks".into())),
        n => {
            let lack = if n == 1 { "lacks" } else { "lack" };
            let said = format!("{n} state{} {lack} a disk of a state below", plural(n));
            warning("states", said, "harmless: a build makes them again; `vimg store gc` removes the others")
        }
    });
    let free = rustix::fs::statvfs(store.root()).map(|fs| fs.f_bavail * fs.f_frsize);
    findings.push(match free {
        Ok(free) => room(free),
        Err(e) => finding("space", Err((e.to_string(), None))),
    });
    findings
}

/// Judges the free space of the disk with the store, in bytes.
fn room(free: u64) -> Finding {
    let help = "a base and its layers take 1 to 4 GiB; `vimg store gc` removes what nothing needs";
    let said = format!("{} free", bytes(free));
    match free >> 30 {
        0 => finding("space", Err((format!("only {said}"), Some(help.into())))),
        1..4 => warning("space", said, help),
        _ => finding("space", Ok(said)),
    }
}

fn show(findings: &[Finding], style: Style) -> Outcome {
    if style.json {
        let list: Vec<_> = findings
            .iter()
            .map(|f| {
                let good = f.level != Level::Bad;
                json!({ "what": f.what, "level": f.level, "good": good, "said": f.said, "help": f.help })
            })
            .collect();
        return print_json(&json!({ "findings": list }));
    }
    let mut out = String::new();
    for f in findings {
        let lead = format!("{:4}  {:9}  ", f.level.word(), f.what);
        let indent = " ".repeat(lead.len());
        let help = f.help.iter().map(|help| format!("\n{help}"));
        let text = f.said.clone() + &help.collect::<String>();
        let lines = text.lines().flat_map(|line| textwrap::wrap(line, WIDTH - lead.len()));
        let lines: Vec<String> = lines.map(|line| line.into_owned()).collect();
        out.push_str(&format!("{lead}{}\n", lines.join(&format!("\n{indent}"))));
    }
    print(&out)
}

/// Width of the table, in columns.
const WIDTH: usize = 80;

/// Says what guests reach.
fn reached(reach: &Reach) -> String {
    let mut allowed: Vec<String> = reach.nets.iter().map(ToString::to_string).collect();
    if reach.host {
        allowed.insert(0, "services on this host".into());
    }
    match (allowed.is_empty(), reach.host) {
        (true, _) => "guests reach the internet, not this host or private networks".into(),
        (_, true) => format!("guests reach the internet and, as allowed, {}", allowed.join(", ")),
        _ => format!("guests reach the internet and, as allowed, {}; not this host", allowed.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::HostError;

    #[test]
    fn what_is_slow_is_a_warning_with_its_remedy() {
        let explained = |kvm: Option<Kvm>, trouble: Option<HostError>| {
            let offline = host::Offline { text: "in an appliance".into(), trouble };
            of_machines(&Explained { offline, kvm, booted: "emulated".into() })
        };
        let fails = Some(Kvm::Fails("there is no /dev/kvm".into()));
        let missing =
            HostError::new("`bwrap` is not installed").help("install it: apt-get install bubblewrap");
        let [kvm, layers, machines] = &explained(fails.clone(), Some(missing))[..] else { panic!() };
        assert_eq!((kvm.level, layers.level, machines.level), (Level::Warning, Level::Warning, Level::Ok));
        let help = layers.help.as_ref().unwrap();
        assert!(help.contains("six times slower") && help.contains("apt-get install bubblewrap"), "{help}");
        // An accelerator that was asked for is no trouble.
        for (kvm, level) in [(fails, Level::Warning), (Some(Kvm::Works), Level::Ok), (None, Level::Ok)] {
            assert_eq!(explained(kvm, None)[0].level, level);
        }
    }

    #[test]
    fn space_is_judged_by_what_a_build_takes() {
        for (mib, level) in
            [(900, Level::Bad), (1100, Level::Warning), (4000, Level::Warning), (4100, Level::Ok)]
        {
            assert_eq!(room(mib << 20).level, level, "{mib} MiB");
        }
    }
}

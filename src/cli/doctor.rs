//! `vimg doctor`

use serde_json::json;

use super::global::Global;
use super::output::{Error, HOST, Outcome, print, print_json};
use super::project;
use super::settings::ProviderArgs;
use crate::base;
use crate::host::network::{Reach, Tools};
use crate::provider::{host, qemu};
use crate::report::{Style, bytes};
use crate::store::{Area, Store};

/// Test this host, and say what to install
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    provider: ProviderArgs,
}

struct Finding {
    what: &'static str,
    good: bool,
    said: String,
    help: Option<String>,
}

fn finding(what: &'static str, result: Result<String, (String, Option<String>)>) -> Finding {
    match result {
        Ok(said) => Finding { what, good: true, said, help: None },
        Err((said, help)) => Finding { what, good: false, said, help },
    }
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
    if let (Ok(programs), Ok(store)) = (&programs, &store) {
        let said = qemu::kvm_report(programs, &store.dir(Area::Probes)).to_string();
        // Without KVM everything works, but more slowly.
        findings.push(finding("kvm", Ok(said)));
        let explained = args.provider.explain(store)?;
        findings.push(finding("layers", Ok(format!("applied {}", explained.offline))));
        findings.push(finding("machines", Ok(format!("booted {}", explained.booted))));
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
    if findings.iter().all(|f| f.good) { Ok(()) } else { Err(Error::Code(HOST)) }
}

/// Tests the store and the filesystem that it is on.
fn of_store(store: &Store) -> Vec<Finding> {
    let states = store.states();
    let used: u64 = states.iter().map(|r| r.bytes).sum();
    let said = format!("{} states, {}, in {}", states.len(), bytes(used), store.root().display());
    let mut findings = vec![finding("store", Ok(said))];
    if is_nfs(store.root()) {
        let help = "use a local disk: file locks of NFS may not work between hosts".to_owned();
        findings.push(finding("locks", Err(("the store is on NFS".into(), Some(help)))));
    }
    let broken = states.iter().filter(|r| store.chain(&r.key).is_none()).count();
    findings.push(finding(
        "states",
        if broken == 0 {
            Ok("every state has all its disks".into())
        } else {
            let help = "vimg rebuilds them when they are needed".to_owned();
            Err((format!("{broken} states lack a disk of a state below them"), Some(help)))
        },
    ));
    findings.push(finding(
        "space",
        match rustix::fs::statvfs(store.root()) {
            Ok(fs) => {
                let free = fs.f_bavail * fs.f_frsize;
                if free > 4 << 30 {
                    Ok(format!("{} free", bytes(free)))
                } else {
                    let help = "a base and its layers take 1 to 4 GiB".to_owned();
                    Err((format!("only {} free", bytes(free)), Some(help)))
                }
            }
            Err(e) => Err((e.to_string(), None)),
        },
    ));
    findings
}

fn show(findings: &[Finding], style: Style) -> Outcome {
    if style.json {
        let list: Vec<_> = findings
            .iter()
            .map(|f| json!({ "what": f.what, "good": f.good, "said": f.said, "help": f.help }))
            .collect();
        return print_json(&json!({ "findings": list }));
    }
    let mut out = String::new();
    for f in findings {
        out.push_str(&format!("{:4}  {:9}  {}\n", if f.good { "ok" } else { "BAD" }, f.what, f.said));
        if let Some(help) = &f.help {
            out.push_str(&format!("                 {help}\n"));
        }
    }
    print(&out)
}

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

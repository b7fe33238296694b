//! Tests whether KVM works. `/dev/kvm` proves nothing: on some hosts it opens,
//! but Linux hangs in its machines. So vimg boots a tiny machine until it
//! prints its first word, once for each host, kernel and QEMU, and stores the
//! result.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use tokio::io::AsyncReadExt;

use super::args;
use super::programs::{Accel, Programs};
use crate::agent;
use crate::digest::Digest;
use crate::host::HostError;
use crate::host::{self, child};

/// Timeout of the test machine. Under a working KVM it prints within a second.
const DEADLINE: Duration = Duration::from_secs(15);
const HELLO: &str = "vimg-probe-hello";

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Answer {
    works: bool,
    why: String,
    /// When it was tested, in seconds since 1970.
    #[serde(default)]
    at: u64,
}

/// How long a result is valid, in seconds. After a failure the host may only
/// have been busy; after a success its hypervisor may have changed.
const LASTS: u64 = 24 * 3600;
/// Maximum output before the expected word, in bytes.
const CHATTER: usize = 1 << 20;

/// Chooses the accelerator. If it is not KVM, tells the reason once in the time
/// that a result is valid; `vimg doctor` always tells it. `None` if a test needs
/// a kernel and there is none.
pub(super) async fn choose(
    programs: &Programs,
    kernel: Option<&Path>,
    probes: &Path,
    tell: &impl Fn(String),
) -> Result<Option<Accel>, HostError> {
    let file = answer_file(programs, probes);
    let answer = match usable() {
        Err(why) => Answer { works: false, why, at: now() },
        Ok(()) => match (read(&file), kernel) {
            (Some(answer), _) => answer,
            (None, None) => return Ok(None),
            (None, Some(kernel)) => {
                let answer = run(programs, kernel, probes).await?;
                keep(&file, &answer);
                answer
            }
        },
    };
    if answer.works {
        return Ok(Some(Accel::Kvm));
    }
    let why = answer.why;
    let text = format!(
        "KVM is not used ({why}); machines are emulated, which is many times slower; see `vimg doctor`"
    );
    tell_once(&file.with_extension("told"), &text, tell);
    Ok(Some(Accel::Tcg))
}

/// Tells a text, unless it was told in the time that a result is valid. `told` is
/// the file that remembers it.
pub(super) fn tell_once(told: &Path, text: &str, tell: &impl Fn(String)) {
    if read(told).is_none_or(|told| told.why != text) {
        keep(told, &Answer { works: false, why: text.to_owned(), at: now() });
        tell(text.to_owned());
    }
}

/// The state of knowledge about KVM on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kvm {
    /// A machine has booted with it.
    Works,
    /// It can't be used, and why.
    Fails(String),
    /// It was not tested yet; the first machine will test it.
    Unknown,
}

impl std::fmt::Display for Kvm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Works => f.write_str("works: a machine has booted with it"),
            Self::Fails(why) => write!(f, "does not work: {why}"),
            Self::Unknown => f.write_str("can be opened; the first build tests whether it works"),
        }
    }
}

/// Returns what is known, without a test.
pub(super) fn report(programs: &Programs, probes: &Path) -> Kvm {
    match usable() {
        Err(why) => Kvm::Fails(why),
        Ok(()) => {
            let file = answer_file(programs, probes);
            match read(&file) {
                Some(Answer { works: true, .. }) => Kvm::Works,
                Some(Answer { works: false, why, .. }) => {
                    let again = "vimg tests it again after 24 hours, or if you delete";
                    Kvm::Fails(format!("{why}; {again} {}", file.display()))
                }
                None => Kvm::Unknown,
            }
        }
    }
}

fn usable() -> Result<(), String> {
    match std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(_) => Ok(()),
        Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => {
            Err("you may not open /dev/kvm; join the group `kvm`".into())
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Err("there is no /dev/kvm".into()),
        Err(e) => Err(format!("/dev/kvm: {e}")),
    }
}

/// One result for each QEMU, host kernel and processor.
fn answer_file(programs: &Programs, probes: &Path) -> PathBuf {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let cpu = cpu.lines().find(|l| l.starts_with("model name")).unwrap_or_default();
    let size = std::fs::metadata(&programs.system).map_or(0, |m| m.len());
    let host = format!("{}\0{size}\0{release}\0{cpu}", programs.version);
    probes.join(format!("kvm-{}.json", &Digest::of(host.as_bytes()).to_string()[..16]))
}

fn read(file: &Path) -> Option<Answer> {
    let answer: Answer = serde_json::from_slice(&std::fs::read(file).ok()?).ok()?;
    (now().saturating_sub(answer.at) < LASTS).then_some(answer)
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

fn keep(file: &Path, answer: &Answer) {
    // If the result can't be stored, the next build tests again.
    if let Ok(bytes) = serde_json::to_vec(answer) {
        let _ = std::fs::write(file, bytes);
    }
}

async fn run(programs: &Programs, kernel: &Path, probes: &Path) -> Result<Answer, HostError> {
    let fail = |e: std::io::Error| HostError::io("can't run the KVM probe", &e);
    let initrd = temporary(probes, &agent::initramfs(&[])).map_err(fail)?;
    let mut command = host::command(&programs.system);
    command
        .args(args::base())
        .args(args::words("-machine q35 -accel kvm -cpu host -m 256M -serial stdio"))
        .arg("-kernel")
        .arg(kernel)
        .arg("-initrd")
        .arg(&initrd.0)
        .args(["-append", &agent::probe_line()])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    child::die_with_us(&mut command);
    let mut child = command.spawn().map_err(fail)?;
    let mut seen = String::new();
    let mut out = child.stdout.take();
    let spoke = tokio::time::timeout(DEADLINE, async {
        let mut buffer = [0; 4096];
        while let Some(out) = &mut out {
            match out.read(&mut buffer).await {
                Ok(n) if n > 0 => seen.push_str(&String::from_utf8_lossy(&buffer[..n])),
                _ => return false,
            }
            if seen.contains(HELLO) {
                return true;
            }
            if seen.len() > CHATTER {
                return false;
            }
        }
        false
    })
    .await;
    let mut words = String::new();
    if let (Ok(false), Some(mut err)) = (&spoke, child.stderr.take()) {
        let _ = tokio::time::timeout(Duration::from_secs(2), err.read_to_string(&mut words)).await;
    }
    let _ = child.kill().await;
    Ok(match spoke {
        Ok(true) => Answer { works: true, why: String::new(), at: now() },
        Ok(false) => {
            let why = words.lines().find(|l| !l.trim().is_empty()).unwrap_or("no message").trim();
            Answer { works: false, why: format!("QEMU failed: {why}"), at: now() }
        }
        Err(_) => {
            let why = format!("a test machine hung: no output for {} s", DEADLINE.as_secs());
            Answer { works: false, why, at: now() }
        }
    })
}

/// A file that is removed when dropped.
struct Temporary(PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Creates a temporary file in the store, where other users can't replace it by
/// a link.
fn temporary(probes: &Path, bytes: &[u8]) -> std::io::Result<Temporary> {
    let path = probes.join(format!("hello-{}.cpio", std::process::id()));
    std::fs::write(&path, bytes)?;
    Ok(Temporary(path))
}

//! Explains why a guest stopped: turns the reason into a failure that says what
//! happened, where, and what to do.

use std::time::Duration;

use vimg_agent::protocol::{Around, Order};
use vimg_model::Tool;

use super::guest::Stopped;
use super::log::clean;
use super::node::NodeContext;
use super::node_failure::{FailureKind, NodeFailure};
use super::order::{Needs, Task};
use super::session::SessionError;
use crate::host::space;
use crate::provider::{Ended, Instance, Provider};

/// How long to wait for the end of a machine whose agent is gone. The end often
/// tells the cause, such as a panic.
const LAST_WORDS: Duration = Duration::from_secs(20);

/// What the kernel prints when it panics (`kernel/panic.c`).
const PANIC: &str = "Kernel panic - not syncing";
/// How many lines of a console are shown, and how many of them are before a panic.
const SHOWN: usize = 12;
const BEFORE_PANIC: usize = 4;

/// Picks the lines of a console that tell why the machine stopped: those around
/// a panic, or the last ones.
fn telling(lines: Vec<String>) -> Vec<String> {
    let last = lines.len().saturating_sub(SHOWN);
    let panic = lines.iter().position(|line| line.contains(PANIC));
    let start = panic.map_or(last, |at| at.saturating_sub(BEFORE_PANIC).min(last));
    lines.into_iter().skip(start).take(SHOWN).collect()
}

/// Makes a failure that says what happened, where, and what to do. `tail` has
/// the last lines of output; `None` if no step has run.
pub(super) async fn explain<P: Provider>(
    site: &NodeContext<'_, P>,
    instance: &mut P::Instance,
    trouble: Stopped,
    tail: Option<Vec<String>>,
) -> Box<NodeFailure> {
    let console = |instance: &P::Instance| {
        let text = instance.console();
        telling(text.lines().map(|l| clean(l.trim())).filter(|l| !l.is_empty()).collect())
    };
    let trouble = match cause(instance, trouble).await {
        // Without a device that tells QEMU of a panic, the kernel reboots or stops.
        Stopped::Ended(Ended::Off | Ended::AgentGone)
        | Stopped::Session(SessionError::Silent(_) | SessionError::Broken(_))
            if instance.console().contains(PANIC) =>
        {
            Stopped::Ended(Ended::Panic)
        }
        other => other,
    };
    let recipe = |message: String, help: &str| {
        let mut failure = site.failure(FailureKind::Recipe, message);
        failure.help = Some(help.to_owned());
        failure
    };
    let host = |message: String, help: &str| {
        let mut failure = site.failure(FailureKind::Host, message);
        failure.help = Some(help.to_owned());
        failure
    };
    let mut failure = match trouble {
        trouble if is_full(site, &trouble) => site.full(None),
        Stopped::Session(SessionError::Step { step, message, layer }) => {
            let failure = step_failure(site, step, &message, tail.unwrap_or_default());
            return Box::new(NodeFailure { layer, ..failure });
        }
        Stopped::Session(SessionError::Refused(why)) => {
            site.failure(FailureKind::Host, format!("the agent can't {}", clean(&why)))
        }
        Stopped::Session(SessionError::Endless(time)) => recipe(
            format!("the machine did not finish within {} s", time.as_secs()),
            "`vimg log` shows where it stopped; maybe a program waits for something",
        ),
        Stopped::Session(SessionError::Silent(time)) if tail.is_none() => recipe(
            format!("the machine did not answer within {} s of its boot", time.as_secs()),
            "does the image boot, and does it contain the agent? Its last console lines are above",
        ),
        Stopped::Session(SessionError::Silent(time)) => recipe(
            format!("the machine has been silent for {} s", time.as_secs()),
            "does the layer stop the agent, or use all CPUs or memory? `machine` gives it more. If \
             the host's disk was stuck, build again",
        ),
        Stopped::Session(SessionError::Broken(why)) => {
            host(format!("the connection to the agent broke: {why}"), "if it happens again, please report it")
        }
        Stopped::Ended(ended) => end_failure(site, ended),
    };
    failure.tail = console(instance);
    failure
}

/// Waits for the cause of what looks like an effect.
async fn cause<I: Instance>(instance: &mut I, trouble: Stopped) -> Stopped {
    let trouble = match trouble {
        // A broken channel is often an effect, so wait for its cause.
        Stopped::Session(SessionError::Broken(why)) => {
            match tokio::time::timeout(Duration::from_millis(500), instance.ended()).await {
                Ok(ended) => Stopped::Ended(ended),
                Err(_) => Stopped::Session(SessionError::Broken(why)),
            }
        }
        other => other,
    };
    match trouble {
        Stopped::Ended(Ended::AgentGone) => match tokio::time::timeout(LAST_WORDS, instance.ended()).await {
            Ok(ended) => Stopped::Ended(ended),
            Err(_) => Stopped::Ended(Ended::AgentGone),
        },
        other => other,
    }
}

/// Makes the failure of a step or a probe. `tail` has the last lines of output.
fn step_failure<P>(site: &NodeContext<'_, P>, step: usize, message: &str, tail: Vec<String>) -> NodeFailure {
    let message: String = message.lines().map(clean).collect::<Vec<_>>().join(" ");
    let mut failure = *site.failure(FailureKind::Recipe, message.clone());
    if let Task::Layer { layer, .. } = &site.node.task
        && let Some(name) = layer.labels.get(step)
    {
        failure.message = format!("{name} failed: {message}");
        let offline = site.node.needs == Needs::Disk;
        failure.help = advice(&site.node.name, &layer.steps[step], offline, &message, &tail);
    }
    if let Task::Check(check) = &site.node.task
        && let Some(name) = check.labels.get(step)
    {
        failure.message = format!("{name}: {message}");
    }
    failure.step = Some(step);
    failure.tail = tail;
    failure
}

/// Makes the failure for the end of a guest.
fn end_failure<P>(site: &NodeContext<'_, P>, ended: Ended) -> Box<NodeFailure> {
    let failure = |kind, message: String, help: &str| {
        let failure = NodeFailure::new(&site.node.name, kind, message);
        Box::new(NodeFailure { help: Some(help.to_owned()), ..failure })
    };
    let recipe = |message: String, help: &str| failure(FailureKind::Recipe, message, help);
    let host = |message: String, help: &str| failure(FailureKind::Host, message, help);
    let offline = site.node.needs == Needs::Disk;
    match ended {
        Ended::Panic => recipe(
            "the machine's kernel panicked".into(),
            "its console's lines are above; does a layer change the kernel, its initrd or the root \
                 filesystem, or need more memory?",
        ),
        Ended::Hangs(seconds) => host(
            format!("the machine hangs: its processors have been stuck for {seconds} s"),
            "its console's last lines are above; build again: finished layers are stored",
        ),
        Ended::Off if offline => recipe(
            "the appliance or container of the layer stopped".into(),
            "did it use more than 1 GiB of memory? A layer that needs more must have `needs \"booted\"`",
        ),
        Ended::Killed(words) if offline => host(
            format!("the appliance or container of the layer was killed or crashed: {words}"),
            "was the host short of memory? build again: finished layers are stored",
        ),
        Ended::Off => recipe(
            "the machine switched itself off or rebooted".into(),
            "does a script call reboot or poweroff? Use the step `reboot` instead",
        ),
        Ended::AgentGone => recipe(
            "the agent in the machine died".into(),
            match offline {
                true => "does a script kill processes, or use more than 1 GiB of memory?",
                false => {
                    "does a script kill processes, or run out of memory? `machine memory=` gives it more"
                }
            },
        ),
        Ended::HostDiskFull => site.full(None),
        Ended::DiskError(why) => {
            host(format!("the machine's disk failed: {why}"), "check the host's disk and its kernel log")
        }
        Ended::Killed(words) => host(
            format!("QEMU was killed or crashed: {words}"),
            "was the host short of memory? build again: finished layers are stored",
        ),
    }
}

/// Whether a guest probably stopped because the disk that holds the store is
/// full. The kernel kills a program whose memory is a file on a full disk. In a
/// container, programs see only that their disk failed.
fn is_full<P>(site: &NodeContext<'_, P>, trouble: &Stopped) -> bool {
    let may_be = match trouble {
        Stopped::Ended(Ended::Killed(_) | Ended::DiskError(_)) => true,
        Stopped::Ended(
            Ended::Off | Ended::Panic | Ended::Hangs(_) | Ended::AgentGone | Ended::HostDiskFull,
        ) => false,
        Stopped::Session(SessionError::Broken(_)) => true,
        Stopped::Session(SessionError::Step { .. }) => site.node.needs == Needs::Disk,
        Stopped::Session(SessionError::Refused(_) | SessionError::Endless(_) | SessionError::Silent(_)) => {
            false
        }
    };
    may_be && space::is_scarce(site.worker.store.root())
}

/// Messages of programs that need a booted machine.
const NOT_BOOTED: &[&str] = &[
    "System has not been booted with systemd",
    "Failed to connect to bus",
    "Running in chroot, ignoring",
    "Could not connect to",
    "could not connect to server",
    "connection to server",
    "Connection refused",
    "Can't connect to",
    "Cannot connect to",
    "is the server running",
    "Read-only file system",
    "Operation not permitted",
    "must be superuser",
    "No such device",
    "Module not found",
    "could not insert",
];

/// Messages of programs that have no network.
const NO_NETWORK: &[&str] = &[
    "Temporary failure in name resolution",
    "Temporary failure resolving",
    "Could not resolve",
    "Couldn't resolve",
    "could not resolve",
    "Name or service not known",
    "Failed to resolve",
    "failed to lookup address",
    "unable to resolve host",
    "getaddrinfo",
    "EAI_AGAIN",
    "Network is unreachable",
    "No route to host",
];

/// Returns a help text for a failed step; `None` if its cause is unknown.
fn advice(node: &str, step: &Order, offline: bool, message: &str, tail: &[String]) -> Option<String> {
    let said = |text: &str| message.contains(text) || tail.iter().any(|l| l.contains(text));
    if tail.iter().any(|line| space::says_full(line)) || space::says_full(message) {
        return Some(
            "the machine's disk is full: give it more with `machine disk=` where it is bootstrapped".into(),
        );
    }
    let lost = || NO_NETWORK.iter().any(|text| said(text));
    let primitive = match step {
        Order::Make(primitive) => primitive,
        Order::Revert { .. } => {
            return Some(
                "with `by=\"rebuild\"`, vimg rebuilds the layers above instead of reverting this one".into(),
            );
        }
        Order::Preinstall { .. } | Order::Leave { .. } | Order::Layer { .. } => return None,
    };
    match primitive.tool() {
        Tool::Packages if lost() && !offline => Some(
            "the booted machine can't reach the mirror: does its own /etc/resolv.conf name a server that it \
             can reach? Offline layers use that of vimg; allow a private network with `network-allow`"
                .into(),
        ),
        Tool::Packages if lost() || said("no network") => Some(
            "can't reach the mirror: check the host's network; allow a private mirror with `network-allow`"
                .into(),
        ),
        Tool::Packages if said("Unable to locate package") => Some(
            "check the package's name and that its suite has it; if a step adds its source, put the \
             package after that step"
                .into(),
        ),
        Tool::Script(around) => Some(script_advice(node, around, offline, message, &said)),
        Tool::Init if !offline => Some("the last lines of the unit's journal are above".into()),
        Tool::Packages | Tool::Init | Tool::Agent => None,
    }
}

/// Returns a help text for a failed script of the layer `node`.
fn script_advice(
    node: &str,
    around: &Around,
    offline: bool,
    message: &str,
    said: &dyn Fn(&str) -> bool,
) -> String {
    let lost = NO_NETWORK.iter().any(|text| said(text));
    if lost && !around.network {
        "the script has no network; to allow it: `run network=#true`".into()
    } else if lost {
        "scripts reach only the internet; allow private networks with `network-allow`".into()
    } else if offline && ["no new privileges", "effective uid is not 0"].iter().any(|text| said(text)) {
        "set-user-id programs such as sudo have no effect in an offline layer: leave out `user=` to run \
         the script as root, or add `needs \"booted\"`"
            .into()
    } else if said("did not end within") {
        format!("its time limit is {} s; raise it with `timeout=`", around.timeout)
    } else if message.ends_with("exit code 141") {
        // 128 and the number of SIGPIPE.
        "SIGPIPE: the reader of a pipe ended first, as in `yes | head`. To ignore it: \
         `{ yes || true; } | head`"
            .into()
    } else if offline && NOT_BOOTED.iter().any(|text| said(text)) {
        "the machine is switched off while this layer is applied; if the script needs running \
         services or the machine's kernel, add `needs \"booted\"`"
            .into()
    } else {
        format!(
            "fix the script and build again: vimg continues from the last good layer. `vimg shell --failed \
             {node}` opens the machine as the script left it"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_shown_with_the_lines_before_it() {
        let line = |n: usize| format!("line {n}");
        let calm: Vec<String> = (0..30).map(line).collect();
        assert_eq!(telling(calm.clone()), calm[18..]);
        assert_eq!(telling(calm[..5].to_vec()), calm[..5]);
        let panic = format!("[    3.1] {PANIC}: VFS: Unable to mount root fs on unknown-block(0,0)");
        let mut lines = calm.clone();
        lines.insert(10, panic.clone());
        let shown = telling(lines.clone());
        assert_eq!((shown.len(), shown[BEFORE_PANIC].as_str()), (SHOWN, panic.as_str()));
        assert_eq!(shown[0], "line 6");
        // At the end, nothing is lost.
        lines.remove(10);
        lines.push(panic.clone());
        assert_eq!(telling(lines).last(), Some(&panic));
    }
}

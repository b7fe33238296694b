//! The agent's pulse: it says that it is alive, unless it is stuck. A disk
//! that never answers leaves no other trace.

use std::fs;
use std::time::{Duration, Instant};

use crate::fetch::Sender;
use crate::protocol::{FromAgent, HEARTBEAT_EVERY};

/// How long the kernel may hold a thread without letting it run once: after
/// as long a time it complains itself (`kernel.hung_task_timeout_secs`).
const STUCK: Duration = Duration::from_secs(120);

/// Says every few seconds that the thread that calls this is alive, from
/// another one, until nobody listens any more.
pub(crate) fn start(sender: Sender) {
    let thread = rustix::thread::gettid();
    std::thread::spawn(move || {
        let mut heartbeat = Heartbeat::default();
        loop {
            std::thread::sleep(Duration::from_secs(HEARTBEAT_EVERY));
            let status = fs::read_to_string(format!("/proc/self/task/{thread}/status"));
            let alive = heartbeat.beats(held(&status.unwrap_or_default()), Instant::now());
            if alive && sender.send(&FromAgent::Heartbeat).is_err() {
                return;
            }
        }
    });
}

/// How often a thread has been switched to, if the kernel holds it at
/// something that can't be interrupted (proc(5)).
fn held(status: &str) -> Option<u64> {
    let field = |name: &str| status.lines().find_map(|line| Some(line.strip_prefix(name)?.trim()));
    field("State:")?.starts_with('D').then_some(())?;
    field("voluntary_ctxt_switches:")?.parse().ok()
}

/// What was seen of a thread that is held.
#[derive(Default)]
struct Heartbeat {
    since: Option<(u64, Instant)>,
}

impl Heartbeat {
    /// Whether the thread has run lately. Long work in the kernel is many
    /// short waits; what is stuck is one.
    fn beats(&mut self, held: Option<u64>, now: Instant) -> bool {
        match (held, self.since) {
            (Some(switches), Some((then, since))) if switches == then => now - since < STUCK,
            (held, _) => {
                self.since = held.map(|switches| (switches, now));
                true
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_one_long_wait_is_no_life() {
        let (mut heartbeat, start) = (Heartbeat::default(), Instant::now());
        let mut at = |held, seconds| heartbeat.beats(held, start + Duration::from_secs(seconds));
        assert!(at(Some(7), 0) && at(Some(7), 119));
        assert!(!at(Some(7), 120) && !at(Some(7), 1000));
        // It has run in between.
        assert!(at(Some(8), 1001) && at(Some(8), 1120) && !at(Some(8), 1121));
        assert!(at(None, 1200) && at(Some(8), 1201));
    }

    #[test]
    fn what_can_be_interrupted_is_not_held() {
        let status = |state: &str| format!("Name:\tx\nState:\t{state}\nvoluntary_ctxt_switches:\t12\n");
        assert_eq!(held(&status("D (disk sleep)")), Some(12));
        assert_eq!(held(&status("S (sleeping)")), None);
        assert_eq!(held(""), None);
    }

    #[test]
    fn the_kernel_says_so_of_a_real_thread() {
        let status = fs::read_to_string("/proc/thread-self/status").unwrap();
        assert!(status.contains("\nState:\t") && status.contains("\nvoluntary_ctxt_switches:\t"));
    }
}

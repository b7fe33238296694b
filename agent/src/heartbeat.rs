//! The heartbeat: the agent's sign of life, which stops if the agent is stuck. A disk
//! that never answers has no other symptom.

use std::fs;
use std::time::{Duration, Instant};

use crate::fetch::Sender;
use crate::protocol::{FromAgent, HEARTBEAT_EVERY};

/// How long the kernel may block a thread before it counts as stuck: the kernel's own
/// limit (`kernel.hung_task_timeout_secs`).
const STUCK: Duration = Duration::from_secs(120);

/// Starts a thread that sends heartbeats for the calling thread, until sending fails.
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

/// Returns how often a thread has been switched to, if it is in an uninterruptible wait
/// (proc(5)).
fn held(status: &str) -> Option<u64> {
    let field = |name: &str| status.lines().find_map(|line| Some(line.strip_prefix(name)?.trim()));
    field("State:")?.starts_with('D').then_some(())?;
    field("voluntary_ctxt_switches:")?.parse().ok()
}

/// The state of a thread.
#[derive(Default)]
struct Heartbeat {
    /// The number of switches of a blocked thread, and since when it has not changed.
    since: Option<(u64, Instant)>,
}

impl Heartbeat {
    /// Whether the thread has run lately. Long work in the kernel is many short waits; a
    /// stuck thread is in a single long wait.
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
        // The thread has run in between.
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

//! What `systemctl show` says about a unit.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

use super::manager::{Observed, State};

/// The properties that [`observed`] reads.
pub(super) const PROPERTIES: &str = "LoadState,ActiveState,SubState,Result,Type,NRestarts,ConditionResult,\
    ConditionTimestampMonotonic,ActiveEnterTimestampMonotonic,ExecMainExitTimestampMonotonic";

/// The share of the boot for which a service must run, and the limits of that time. Most
/// services that can't work end within the first seconds, when they read their settings.
const SHARE: u32 = 2;
const SHORTEST: Duration = Duration::from_secs(5);
const LONGEST: Duration = Duration::from_secs(30);

/// Returns the time on the clock of systemd's timestamps.
pub(super) fn now() -> Duration {
    let time = clock_gettime(ClockId::Monotonic);
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec.unsigned_abs() as u32)
}

/// Returns how long a service must run, from the time in microseconds at which the boot was
/// complete.
pub(super) fn moment(finished: &str) -> Duration {
    match microseconds(finished.trim()) {
        Some(boot) => (boot / SHARE).clamp(SHORTEST, LONGEST),
        None => LONGEST,
    }
}

/// Reads a time. `None` if it has not come yet.
fn microseconds(text: &str) -> Option<Duration> {
    text.parse().ok().filter(|time| *time > 0).map(Duration::from_micros)
}

/// Reads what a unit does from its properties. Some types of units have only a few of them.
///
/// # Errors
///
/// The unit can't come up.
pub(super) fn observed(text: &str, now: Duration) -> Result<Observed, String> {
    let property = |name: &str| {
        let line = text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix('='));
        line.unwrap_or_default()
    };
    match property("LoadState") {
        "not-found" => return Err("the machine has no such unit".into()),
        "masked" => return Err("it is masked".into()),
        _ => {}
    }
    let (active, sub, result) = (property("ActiveState"), property("SubState"), property("Result"));
    let time = |name: &str| microseconds(property(name));
    let is_service = !property("Type").is_empty();
    let is_done = property("Type") == "oneshot"
        && result == "success"
        && time("ExecMainExitTimestampMonotonic").is_some();
    let state = match active {
        "active" | "reloading" | "refreshing" if !is_service || sub == "exited" => State::Stands,
        "active" | "reloading" | "refreshing" => {
            let since = time("ActiveEnterTimestampMonotonic").unwrap_or(now);
            State::Runs(now.saturating_sub(since))
        }
        "inactive" if is_done => State::Stands,
        "failed" => State::Failed,
        _ => State::Down,
    };
    let skipped = property("ConditionResult") == "no" && time("ConditionTimestampMonotonic").is_some();
    let words = match active {
        "inactive" if skipped => "it was not started, because one of its conditions is not met".to_owned(),
        "" => "systemd does not answer".to_owned(),
        _ => format!("it is {active} ({})", [sub, result].join(", ")),
    };
    Ok(Observed { state, restarts: property("NRestarts").parse().unwrap_or(0), words })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at_40_s(text: &str) -> Observed {
        observed(text, Duration::from_secs(40)).unwrap()
    }

    #[test]
    fn a_service_runs_since_it_became_active() {
        let runs = at_40_s(
            "Type=notify\nNRestarts=2\nResult=success\nActiveState=active\nSubState=running\n\
             ActiveEnterTimestampMonotonic=37500000\nLoadState=loaded\n",
        );
        assert_eq!((runs.state, runs.restarts), (State::Runs(Duration::from_millis(2500)), 2));
    }

    #[test]
    fn what_has_no_process_stands() {
        for up in [
            "LoadState=loaded\nActiveState=active\nSubState=waiting\nResult=success\n",
            "Type=oneshot\nActiveState=active\nSubState=exited\nResult=success\n",
            "Type=forking\nActiveState=active\nSubState=exited\nResult=success\n",
            "Type=oneshot\nActiveState=inactive\nResult=success\nExecMainExitTimestampMonotonic=5\n",
        ] {
            assert_eq!(at_40_s(up).state, State::Stands, "{up}");
        }
    }

    #[test]
    fn a_unit_that_is_not_up_says_why() {
        for (text, state, words) in [
            (
                "Type=oneshot\nActiveState=inactive\nSubState=dead\nResult=success\nExecMainExitTimestampMonotonic=0\n",
                State::Down,
                "it is inactive (dead, success)",
            ),
            (
                "Type=simple\nActiveState=failed\nSubState=failed\nResult=exit-code\n",
                State::Failed,
                "it is failed (failed, exit-code)",
            ),
            (
                "Type=simple\nActiveState=activating\nSubState=auto-restart\nResult=exit-code\n",
                State::Down,
                "it is activating (auto-restart, exit-code)",
            ),
            (
                "Type=simple\nActiveState=inactive\nConditionResult=no\nConditionTimestampMonotonic=7\n",
                State::Down,
                "it was not started, because one of its conditions is not met",
            ),
        ] {
            let seen = at_40_s(text);
            assert_eq!((seen.state, seen.words.as_str()), (state, words));
        }
        assert!(observed("LoadState=not-found\nActiveState=inactive\n", Duration::ZERO).is_err());
        assert!(observed("LoadState=masked\nActiveState=inactive\n", Duration::ZERO).is_err());
    }

    #[test]
    fn a_slow_machine_has_a_longer_moment() {
        let moments = ["3000000\n", "28000000\n", "90000000\n", "0\n", ""].map(moment);
        assert_eq!(moments.map(|moment| moment.as_secs()), [5, 14, 30, 30, 30]);
    }
}

//! Finds out from its console that a machine hangs.
//!
//! Under emulation a boot may hang for good, about once in some thousand: its
//! processors wait for each other, and only the kernel's watchdog still speaks
//! (`kernel/watchdog.c`: `BUG: soft lockup - CPU#0 stuck for 120s!`).

/// After so many seconds without progress of a processor, a machine hangs.
/// What recovers does so sooner, even on a busy host.
const STUCK: u64 = 120;
/// An earlier message is needed, too: a machine whose host was suspended
/// prints one with a long time, and continues.
const BEFORE: u64 = 60;

/// What the watchdog prints before the number of the processor.
const LOCKUP: &str = "BUG: soft lockup - CPU#";

/// Whether console output mentions a lockup.
pub(super) fn mentioned(output: &[u8]) -> bool {
    output.windows(LOCKUP.len()).any(|window| window == LOCKUP.as_bytes())
}

/// Returns for how many seconds a processor has been stuck, if a console says
/// that its machine hangs.
pub(super) fn hangs(console: &str) -> Option<u64> {
    let mut last: Vec<(&str, u64)> = Vec::new();
    let mut hangs = None;
    for line in console.lines() {
        let Some((_, line)) = line.split_once(LOCKUP) else { continue };
        let Some((cpu, line)) = line.split_once(" stuck for ") else { continue };
        let Some(seconds) = line.split_once('s').and_then(|(seconds, _)| seconds.parse::<u64>().ok()) else {
            continue;
        };
        let before = last.iter_mut().find(|(of, _)| *of == cpu);
        // A smaller time than before belongs to another lockup.
        if before.as_ref().is_some_and(|(_, before)| (BEFORE..seconds).contains(before)) && seconds >= STUCK {
            hangs = Some(seconds);
        }
        match before {
            Some((_, before)) => *before = seconds,
            None => last.push((cpu, seconds)),
        }
    }
    hangs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_hangs_if_its_watchdog_says_so_again_and_again() {
        let line = |cpu: u32, seconds: u64| {
            format!(
                "[  84.6] watchdog: BUG: soft lockup - CPU#{cpu} stuck for {seconds}s! [modprobe:116]\r\n"
            )
        };
        let lines = |all: &[(u32, u64)]| -> String { all.iter().map(|(cpu, s)| line(*cpu, *s)).collect() };
        assert_eq!(hangs(&lines(&[(0, 752), (1, 752), (0, 778)])), Some(778));
        assert_eq!(hangs(&lines(&[(0, 26), (0, 52), (0, 78), (0, 104)])), None, "it may recover");
        assert_eq!(hangs(&lines(&[(0, 26), (0, 52), (0, 78), (0, 104), (0, 130)])), Some(130));
        assert_eq!(hangs(&lines(&[(0, 3600)])), None, "the host was suspended");
        assert_eq!(hangs(&lines(&[(0, 3600), (0, 22), (1, 130)])), None);
        assert_eq!(
            hangs(
                "BUG: soft lockup - CPU#0 stuck for \nBUG: soft lockup - CPU#0 stuck for 99999999999999999999s"
            ),
            None
        );
    }
}

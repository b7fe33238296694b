//! Waits for the network of the machine.

use std::fs;
use std::time::{Duration, Instant};

use crate::failure::Failure;

/// How long the network may take to come up.
const NETWORK: Duration = Duration::from_secs(60);

/// Waits for a default route. Without a network card, it returns at once: the package
/// manager may have local sources.
pub(super) fn wait() -> Result<(), Failure> {
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

//! The agent's program. As the first process of a machine, it mounts the root
//! filesystem, answers the accelerator probe, or serves the host as an appliance. In a
//! container it serves the host on a socket; in a machine, on its port. It also runs hooks
//! and operations.

use std::process::ExitCode;

use vimg_agent::hooks::Failed;
use vimg_agent::{early, hooks, opened, serve};

/// The commands for people. vimg, systemd and the kernel use the others.
const USAGE: &str = "usage: agent operation NAME [ARGUMENTS] | agent decommission";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let failed = |error: std::io::Error| Failed::from(error.to_string());
    let result = match (std::process::id(), words.as_slice()) {
        (1, _) => early::main().map_err(failed),
        (_, ["appliance"]) => serve::appliance().map_err(failed),
        (_, ["watch"]) => opened::keep_watch().map_err(failed),
        (_, ["container"]) => serve::container().map_err(failed),
        (_, ["boot"]) => hooks::boot(),
        (_, ["begin"]) => hooks::begin(),
        (_, ["live"]) => hooks::live(),
        (_, ["decommission"]) => hooks::decommission(),
        (_, ["operation", name, ..]) => hooks::operation(name, &args[2..]),
        (_, ["serve"]) => serve::outside().map_err(failed),
        (_, ["follow"]) => early::follow().map(|never| match never {}).map_err(failed),
        (_, []) => serve::machine().map_err(failed),
        _ => Err(Failed { message: USAGE.into(), code: 2 }),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failed { message, code }) => {
            // Standard error is the journal, or the terminal of a person.
            #[expect(clippy::print_stderr, reason = "a daemon's last words")]
            {
                eprintln!("vimg-agent: {message}");
            }
            ExitCode::from(code)
        }
    }
}

//! The agent's program. As the first process of a machine it brings up the
//! root filesystem, answers the accelerator probe, or serves the host as an
//! appliance; in a container it serves on a socket that it is given; under
//! systemd it serves on the machine's port.

use std::process::ExitCode;

fn main() -> ExitCode {
    let place = std::env::args().nth(1);
    let result = match (std::process::id(), place.as_deref()) {
        (1, _) => vimg_agent::early::main(),
        (_, Some("appliance")) => vimg_agent::serve::appliance(),
        (_, Some("container")) => vimg_agent::serve::container(),
        _ => vimg_agent::serve::machine(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Standard error is the journal here; there is nobody else to tell.
            #[expect(clippy::print_stderr, reason = "a daemon's last words")]
            {
                eprintln!("vimg-agent: {error}");
            }
            ExitCode::FAILURE
        }
    }
}

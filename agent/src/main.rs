//! The agent's program. As the first process of a machine it brings up the
//! root filesystem or answers the accelerator probe; under systemd it serves
//! the host.

use std::process::ExitCode;

fn main() -> ExitCode {
    let result = if std::process::id() == 1 { vimg_agent::early::main() } else { vimg_agent::serve::serve() };
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

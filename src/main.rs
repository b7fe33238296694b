//! The program's entry.

fn main() -> std::process::ExitCode {
    vimg::host::harden();
    vimg::cli::main()
}

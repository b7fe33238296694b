//! The program's entry.

fn main() -> std::process::ExitCode {
    vimg::cli::main()
}

//! Limits that whoever started vimg has set for it, such as `ulimit -f`. An error
//! of the system does not say that such a limit is the cause.

use std::io;

use rustix::process::{Resource, getrlimit};

/// A limit of a process: what it limits, the option of `ulimit` that sets it, and
/// the size of the unit that `ulimit` counts in, in bytes.
struct Limit {
    resource: Resource,
    what: &'static str,
    option: &'static str,
    unit: u64,
}

const FILES: Limit = Limit { resource: Resource::Nofile, what: "open files", option: "-n", unit: 1 };
const PROCESSES: Limit =
    Limit { resource: Resource::Nproc, what: "processes of this user", option: "-u", unit: 1 };
const FILE_SIZE: Limit =
    Limit { resource: Resource::Fsize, what: "KiB in a file", option: "-f", unit: 1 << 10 };
const MEMORY: Limit = Limit { resource: Resource::As, what: "KiB of memory", option: "-v", unit: 1 << 10 };

/// What the system says when a limit is reached, in the locale of programs that
/// vimg starts; the number of the error, and the limit.
const SAID: &[(&str, i32, Limit)] = &[
    ("Too many open files", libc::EMFILE, FILES),
    ("Resource temporarily unavailable", libc::EAGAIN, PROCESSES),
    ("File too large", libc::EFBIG, FILE_SIZE),
    ("Cannot allocate memory", libc::ENOMEM, MEMORY),
];

/// Says what to do about an error of the system, if a limit may have caused it.
pub fn advice(error: &io::Error) -> Option<String> {
    let number = error.raw_os_error()?;
    SAID.iter().find(|(_, caused, _)| *caused == number).and_then(|(_, _, limit)| set(limit))
}

/// The same for the output of a program of the host.
pub fn advice_for(output: &str) -> Option<String> {
    SAID.iter().find(|(text, _, _)| output.contains(text)).and_then(|(_, _, limit)| set(limit))
}

/// Describes a limit; `None` if this process has none.
fn set(limit: &Limit) -> Option<String> {
    let most = getrlimit(limit.resource).current?;
    Some(format!(
        "vimg was started with a limit of {} {}: raise it with `ulimit {}`",
        most / limit.unit,
        limit.what,
        limit.option
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_named_if_there_is_one() {
        let files = advice(&io::Error::from_raw_os_error(libc::EMFILE)).unwrap();
        assert!(files.contains("open files") && files.contains("`ulimit -n`"), "{files}");
        assert_eq!(advice_for("qemu: could not open x: Too many open files"), Some(files));
        assert_eq!(advice(&io::Error::from_raw_os_error(libc::ENOENT)), None);
        assert_eq!(advice(&io::Error::other("File too large")), None);
        assert_eq!(advice_for("all is well"), None);
        let free = getrlimit(Resource::Fsize).current.is_none();
        assert_eq!(advice(&io::Error::from_raw_os_error(libc::EFBIG)).is_none(), free);
    }
}

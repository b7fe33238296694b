//! Checks: asks a running machine whether it meets conditions, and reports what it found
//! instead.

use std::fs;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::command::{self, Output};
use crate::failure::Failure;
use crate::fetch::Sender;
use crate::http;
use crate::init;
use crate::packages;
use crate::protocol::{FromAgent, Probe};

/// The pause before a probe is repeated.
const PAUSE: Duration = Duration::from_millis(50);
/// The least time that each try has.
const ANSWER: Duration = Duration::from_secs(10);
/// How much of a file is searched for a text, in bytes.
const SEARCHED: u64 = 64 << 20;
/// How much of a response is shown, in characters.
const SHOWN: usize = 160;

/// Runs `probes` up to the first that fails, and reports each of them. Returns the last
/// message to the host.
pub(crate) fn check(
    sender: &Sender,
    probes: &[Probe],
    variables: &[(String, String)],
) -> io::Result<FromAgent> {
    for (step, probe) in probes.iter().enumerate() {
        sender.send(&FromAgent::Started { step })?;
        match ask(probe, variables, &Output { sender, step, hidden: &[] }) {
            Ok(()) => sender.send(&FromAgent::Finished { step, changed: false })?,
            Err(failure) => {
                return Ok(failure.of(step));
            }
        }
    }
    Ok(FromAgent::Passed)
}

fn ask(probe: &Probe, variables: &[(String, String)], output: &Output) -> Result<(), Failure> {
    match probe {
        Probe::Http { url, status, contains, header, within } => again(*within, |patience| {
            let answer = http::get(url, patience)?;
            judge(&answer, *status, contains.as_deref(), header.as_ref())
        }),
        Probe::Port { port, within } => again(*within, |patience| http::connect(*port, patience).map(|_| ())),
        Probe::Run { script, timeout, network: _ } => {
            let mut shell = command::command("/bin/sh");
            shell.args(["-euc", script, "check"]).envs(variables.iter().cloned());
            command::run(&mut shell, Duration::from_secs(*timeout), output)
        }
        Probe::File { path, contains } => file(path, contains.as_deref()).map_err(Failure::new),
        Probe::Service { unit, within } => again(*within, |_| service(unit)),
        Probe::Package { name } => package(name).map_err(Failure::new),
    }
}

/// Repeats a question until it succeeds or `within` seconds have passed. Waits for the
/// last answer.
fn again(within: u64, mut ask: impl FnMut(Duration) -> Result<(), String>) -> Result<(), Failure> {
    let (start, within) = (Instant::now(), Duration::from_secs(within));
    loop {
        let left = within.saturating_sub(start.elapsed()).max(ANSWER);
        match ask(left) {
            Ok(()) => return Ok(()),
            Err(why) if start.elapsed() >= within => {
                return Err(Failure::new(format!("{why} (tried for {} s)", within.as_secs())));
            }
            Err(_) => std::thread::sleep(PAUSE),
        }
    }
}

fn judge(
    answer: &http::Answer,
    status: Option<u16>,
    contains: Option<&str>,
    header: Option<&(String, String)>,
) -> Result<(), String> {
    let fits = status.map_or((200..300).contains(&answer.status), |status| answer.status == status);
    if !fits {
        let wanted = status.map_or_else(|| "a 2xx status".to_owned(), |s| format!("status {s}"));
        return Err(format!("status {}, expected {wanted}: {}", answer.status, brief(&answer.body)));
    }
    if let Some((name, text)) = header {
        let values: Vec<&str> = answer.header(name).collect();
        if !values.iter().any(|value| value.contains(text)) {
            let opened = if values.is_empty() { "missing".to_owned() } else { values.join(", ") };
            return Err(format!("`{text}` is not in the header {name}: {}", brief(&opened)));
        }
    }
    match contains {
        Some(text) if !answer.body.contains(text) => {
            Err(format!("`{text}` is not in the response: {}", brief(&answer.body)))
        }
        _ => Ok(()),
    }
}

fn file(path: &str, contains: Option<&str>) -> Result<(), String> {
    let meta = fs::metadata(path).map_err(|e| e.to_string())?;
    let Some(text) = contains else { return Ok(()) };
    if !meta.is_file() {
        return Err("it is not a regular file".into());
    }
    let mut bytes = Vec::new();
    let file = fs::File::open(Path::new(path)).map_err(|e| e.to_string())?;
    io::Read::read_to_end(&mut io::Read::take(file, SEARCHED), &mut bytes).map_err(|e| e.to_string())?;
    let content = String::from_utf8_lossy(&bytes);
    match content.contains(text) {
        true => Ok(()),
        false => Err(format!("`{text}` is not in the file: {}", brief(&content))),
    }
}

fn service(unit: &str) -> Result<(), String> {
    init::find().map_err(|failure| failure.message)?.ask(unit)
}

fn package(name: &str) -> Result<(), String> {
    packages::find().map_err(|failure| failure.message)?.ask(name)
}

/// Shortens a text to the beginning of it, on one line.
fn brief(text: &str) -> String {
    let words = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let mut out: String = words.chars().take(SHOWN).collect();
    if out.len() < words.len() {
        out.push_str("...");
    }
    if out.is_empty() { "nothing".into() } else { out }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_looked_for_and_into() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("motd");
        let name = path.to_str().unwrap();
        assert!(file(name, None).unwrap_err().contains("No such file"));
        fs::write(&path, "hello\n  world").unwrap();
        assert_eq!(file(name, None), Ok(()));
        assert_eq!(file(name, Some("hello")), Ok(()));
        assert_eq!(file(name, Some("bye")), Err("`bye` is not in the file: hello world".into()));
        assert!(file(dir.path().to_str().unwrap(), Some("x")).unwrap_err().contains("not a regular file"));
    }

    #[test]
    fn a_question_is_asked_until_its_time_is_over() {
        let mut left = 3;
        let answer = again(60, |_| {
            left -= 1;
            if left == 0 { Ok(()) } else { Err("not yet".into()) }
        });
        assert!(answer.is_ok() && left == 0);
        let never = again(0, |_| Err("never".into())).unwrap_err();
        assert_eq!(never.message, "never (tried for 0 s)");
    }
}

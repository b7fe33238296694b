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
use crate::init::{self, Init, Observed, State};
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
    // Services come last: they prove themselves while the other probes are asked.
    for (step, probe) in probes.iter().enumerate() {
        let Probe::Service { unit, within } = probe else { continue };
        if let Err(failure) = stays_up(unit, *within, &Output { sender, step, hidden: &[] }) {
            return Ok(failure.of(step));
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
        Probe::Service { unit, within } => comes_up(unit, *within, output),
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

/// Waits until a unit is up.
fn comes_up(unit: &str, within: u64, output: &Output) -> Result<(), Failure> {
    let init = init::find()?;
    // Asked again, a unit that does not exist gives the same answer.
    init.observe(unit).map_err(Failure::new)?;
    let up = again(within, |_| match init.observe(unit)? {
        Observed { state: State::Runs(_) | State::Stands, .. } => Ok(()),
        Observed { words, .. } => Err(words),
    });
    up.inspect_err(|_| explain(init, unit, output))
}

/// Waits until a unit that was up has run for a moment without a restart. A machine that is
/// asked just after its boot has services that will fail in their first seconds.
fn stays_up(unit: &str, within: u64, output: &Output) -> Result<(), Failure> {
    let init = init::find()?;
    let moment = init.moment();
    steady(moment, Duration::from_secs(within), || init.observe(unit)).map_err(|why| {
        explain(init, unit, output);
        Failure::new(why)
    })
}

/// Prints what a unit has logged, and what may be missing: vimg installs no packages that
/// others only recommend, and some services do not work without them.
fn explain(init: &dyn Init, unit: &str, output: &Output) {
    init.print_log(unit, output);
    let Ok(manager) = packages::find() else { return };
    for package in manager.with_file(&init.file_of(unit)) {
        let lacking: Vec<String> = manager.lacking(&package).iter().map(|group| group.join(" or ")).collect();
        if !lacking.is_empty() {
            // The host that asks may be gone.
            let _ = output.say(&format!(
                "{package} recommends packages that are not installed: {}; to install them: package \"{package}\" recommends=#true",
                lacking.join(", ")
            ));
        }
    }
}

/// Observes a unit that was up until it has run for a `moment`. After a restart it has
/// `patience` to do that.
fn steady(
    moment: Duration,
    patience: Duration,
    mut observe: impl FnMut() -> Result<Observed, String>,
) -> Result<(), String> {
    let start = Instant::now();
    loop {
        let now = observe()?;
        let left = match now.state {
            State::Stands => return Ok(()),
            State::Runs(time) if time >= moment => return Ok(()),
            State::Runs(time) => moment - time,
            State::Failed => return Err(format!("it was up and did not stay up: {}", now.words)),
            State::Down => PAUSE,
        };
        if start.elapsed() >= patience + moment {
            let restarts = match now.restarts {
                0 => String::new(),
                n => format!("; it was started again, {n} times so far"),
            };
            return Err(format!("it does not stay up for {} s: {}{restarts}", moment.as_secs(), now.words));
        }
        std::thread::sleep(left.min(moment));
    }
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
    fn a_service_must_run_for_a_moment() {
        let seen = |state, restarts| Ok(Observed { state, restarts, words: "it is there".into() });
        let (moment, never) = (Duration::from_millis(20), Duration::ZERO);
        let runs = |ms| State::Runs(Duration::from_millis(ms));
        // It has run for long, or has no process: there is no wait.
        assert_eq!(steady(moment, never, || seen(runs(21), 0)), Ok(()));
        assert_eq!(steady(moment, never, || seen(State::Stands, 0)), Ok(()));
        // It ends in its moment.
        let mut states = vec![State::Failed, runs(1)];
        let failure = steady(moment, never, || seen(states.pop().unwrap(), 0)).unwrap_err();
        assert!(failure.contains("did not stay up: it is there"), "{failure}");
        // It comes back, and stays.
        let mut states = vec![runs(30), runs(1), State::Down, runs(1)];
        let patience = Duration::from_secs(60);
        assert_eq!(steady(moment, patience, || seen(states.pop().unwrap(), 1)), Ok(()));
        // It is started again and again.
        let failure = steady(moment, never, || seen(runs(1), 7)).unwrap_err();
        assert!(failure.contains("started again, 7 times"), "{failure}");
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

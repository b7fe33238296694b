//! Runs programs of the machine: without input, and with limited time and output.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use crate::failure::Failure;
use crate::fetch::Sender;
use crate::offline;
use crate::priority;
use crate::protocol::{Around, FromAgent};
use crate::system::Account;

/// How much output of a step is sent at once, in bytes.
const FORWARDED: usize = 8 << 20;
/// How much of the end of longer output is sent, in bytes.
const TAIL: usize = 64 << 10;
/// How long background processes of an ended program may keep its output open.
const GRACE: Duration = Duration::from_secs(2);

/// The destination of a step's output.
pub(crate) struct Output<'a> {
    pub(crate) sender: &'a Sender,
    pub(crate) step: usize,
    /// Texts to replace with stars: secrets.
    pub(crate) hidden: &'a [Vec<u8>],
}

impl Output<'_> {
    /// Adds a line of the agent's own.
    pub(crate) fn say(&self, line: &str) -> io::Result<()> {
        self.sender.send(&FromAgent::Output { step: self.step, text: format!("{line}\n") })
    }
}

/// Prepares a program with the environment that all programs of a layer have.
pub(crate) fn command(program: &str) -> Command {
    let mut command = Command::new(program);
    command
        .env_clear()
        .env("PATH", offline::path())
        .env("HOME", "/root")
        .env("LANG", "C.UTF-8")
        .current_dir("/")
        .stdin(Stdio::null());
    offline::adapt(&mut command);
    command
}

/// Runs a script in bash, and prints the line and the command that fails. Functions have
/// the same trap (`-E`). A subshell has it, too, but may fail where its script goes on; and
/// the last command is vimg's own.
const WITH_PLACE: &str = r#"trap 'vimg_code=$?; [ "$BASH_SUBSHELL" != 0 ] || [ "$BASH_COMMAND" = ". \"\$0\"" ] || echo "line $LINENO: exit code $vimg_code: $BASH_COMMAND" >&2' ERR; . "$0""#;

/// Prepares a script with the environment of its step. A script without a `#!` line runs
/// in a shell, up to the first command that fails.
pub(crate) fn script(path: &Path, around: &Around, user: &Account) -> io::Result<Command> {
    let mut start = [0; 2];
    let has_own = match File::open(path)?.read_exact(&mut start) {
        Ok(()) => start == *b"#!",
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => false,
        Err(error) => return Err(error),
    };
    if !Path::new(&around.workdir).is_dir() {
        return Err(io::Error::other(format!("there is no directory {} in the machine", around.workdir)));
    }
    // With `pipefail`, a pipe fails if any of its commands fails; dash lacks it.
    let words: &[&str] = match has_own {
        true => &[],
        false if Path::new("/bin/bash").exists() => &["/bin/bash", "-Eeuo", "pipefail", "-c", WITH_PLACE],
        false => &["/bin/sh", "-eu"],
    };
    let script = path.to_string_lossy();
    let mut all = words.iter().copied().chain([&*script]);
    let mut command = if user.uid == 0 {
        let mut command = command(all.next().unwrap_or_default());
        command.args(all);
        command
    } else {
        let mut command = command("setpriv");
        command.arg(format!("--reuid={}", user.uid)).arg(format!("--regid={}", user.gid));
        command.args(["--init-groups", "--"]).args(all);
        command
    };
    if around.network {
        command.envs(offline::proxies());
    }
    command.env("HOME", &user.home).env("USER", &user.name).env("LOGNAME", &user.name);
    command.env("SHELL", &user.shell).envs(&around.env).current_dir(&around.workdir);
    Ok(command)
}

/// Runs a program and returns whether it succeeded, and its standard output. Kills it
/// after `timeout`; it has not succeeded then.
pub(crate) fn query(command: &mut Command, timeout: Duration) -> Result<(bool, String), Failure> {
    let program = command.get_program().to_string_lossy().into_owned();
    let fail = |e: io::Error| Failure::new(format!("`{program}` can't be run: {e}"));
    let mut child = priority::start(command.stdout(Stdio::piped()).stderr(Stdio::null())).map_err(fail)?;
    let mut out = child.stdout.take();
    let reader = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(out) = &mut out {
            // The output is a list of names: anything beyond 4 MiB is not needed.
            let _ = out.take(4 << 20).read_to_end(&mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    });
    let deadline = Instant::now() + timeout;
    let success = loop {
        if let Some(status) = child.try_wait().map_err(fail)? {
            break status.success();
        }
        if Instant::now() >= deadline {
            let _ = child.kill();
            let _ = child.wait();
            break false;
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    Ok((success, reader.join().unwrap_or_default()))
}

/// Time limit of programs that only query the machine.
pub(crate) const QUESTION: Duration = Duration::from_secs(120);

/// Runs a program to its end, and forwards its output. Kills its process group after
/// `timeout`.
///
/// # Errors
///
/// The program could not be started, failed, or reached the time limit.
pub(crate) fn run(command: &mut Command, timeout: Duration, output: &Output) -> Result<(), Failure> {
    use std::os::unix::process::CommandExt;
    let program = command.get_program().to_string_lossy().into_owned();
    let (reader, writer) = io::pipe().map_err(|e| Failure::new(format!("can't create a pipe: {e}")))?;
    let copy = writer.try_clone().map_err(|e| Failure::new(format!("can't create a pipe: {e}")))?;
    command.stdout(writer).stderr(copy).process_group(0);
    let mut child =
        priority::start(command).map_err(|e| Failure::new(format!("`{program}` can't be run: {e}")))?;
    // `command` also holds the write ends of the pipe: close them, so that the pipe
    // ends with the child.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let group = rustix::process::Pid::from_child(&child);
    // The OOM killer spares the agent, but must not spare its children.
    let _ = std::fs::write(format!("/proc/{}/oom_score_adj", child.id()), "0");
    let (chunks, incoming) = mpsc::sync_channel::<Vec<u8>>(4);
    std::thread::spawn(move || pump(reader, &chunks));

    let deadline = Instant::now() + timeout;
    let mut forward = Forward { output, sent: 0, left_out: 0, tail: VecDeque::new(), held: Vec::new() };
    let mut exited: Option<(ExitStatus, Instant)> = None;
    loop {
        match incoming.recv_timeout(Duration::from_millis(50)) {
            Ok(chunk) => {
                let shown = forward.hide(chunk, false);
                forward.chunk(&shown)?;
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => break,
            Err(mpsc::RecvTimeoutError::Timeout) => {}
        }
        if exited.is_none() {
            let status = child.try_wait().map_err(|e| Failure::new(format!("`{program}`: {e}")))?;
            exited = status.map(|s| (s, Instant::now()));
        }
        match exited {
            Some((_, at)) if at.elapsed() > GRACE => break,
            None if Instant::now() >= deadline => {
                let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
                let _ = child.wait();
                forward.finish()?;
                return Err(Failure::new(endless(timeout)));
            }
            _ => {}
        }
    }
    forward.finish()?;
    let status = match exited {
        Some((status, _)) => status,
        None => child.wait().map_err(|e| Failure::new(format!("`{program}`: {e}")))?,
    };
    outcome(status)
}

fn outcome(status: ExitStatus) -> Result<(), Failure> {
    match (status.code(), status.signal()) {
        (Some(0), _) => Ok(()),
        (Some(code), _) => Err(Failure { exit: Some(code), ..Failure::new(format!("exit code {code}")) }),
        (None, Some(signal)) => Err(Failure::new(format!("killed by signal {signal}"))),
        (None, None) => Err(Failure::new("it ended without an exit code or signal")),
    }
}

/// Runs a program to its end with the agent's own output. Kills it after `timeout`. It
/// stays in the agent's process group, so that it can use the terminal and gets the
/// terminal's signals.
pub(crate) fn pass(command: &mut Command, timeout: Duration) -> Result<(), Failure> {
    let program = command.get_program().to_string_lossy().into_owned();
    let fail = |e: io::Error| Failure::new(format!("`{program}` can't be run: {e}"));
    let mut child = priority::start(command).map_err(fail)?;
    let _ = std::fs::write(format!("/proc/{}/oom_score_adj", child.id()), "0");
    let deadline = Instant::now() + timeout;
    loop {
        if let Some(status) = child.try_wait().map_err(fail)? {
            return outcome(status);
        }
        if Instant::now() >= deadline {
            let _ = child.kill();
            let _ = child.wait();
            return Err(Failure::new(endless(timeout)));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn endless(timeout: Duration) -> String {
    format!("it did not end within {} s and was killed", timeout.as_secs())
}

fn pump(mut reader: impl Read, chunks: &mpsc::SyncSender<Vec<u8>>) {
    let mut buffer = vec![0; 32 << 10];
    while let Ok(n) = reader.read(&mut buffer) {
        // The receiver is gone after the time limit.
        if n == 0 || chunks.send(buffer[..n].to_vec()).is_err() {
            return;
        }
    }
}

struct Forward<'a> {
    output: &'a Output<'a>,
    sent: usize,
    left_out: usize,
    tail: VecDeque<u8>,
    /// Held back output: it may be the beginning of a secret.
    held: Vec<u8>,
}

impl Forward<'_> {
    fn chunk(&mut self, chunk: &[u8]) -> Result<(), Failure> {
        if self.sent < FORWARDED {
            self.sent += chunk.len();
            return self.send(chunk);
        }
        self.tail.extend(chunk);
        let surplus = self.tail.len().saturating_sub(TAIL);
        self.tail.drain(..surplus);
        self.left_out += surplus;
        Ok(())
    }

    /// Replaces secrets with stars. Holds the end back if it may be the beginning of a
    /// secret, until more output comes.
    fn hide(&mut self, chunk: Vec<u8>, last: bool) -> Vec<u8> {
        let hidden = self.output.hidden;
        if hidden.is_empty() {
            return chunk;
        }
        let mut bytes = std::mem::take(&mut self.held);
        bytes.extend(chunk);
        let mut out = Vec::with_capacity(bytes.len());
        let mut at = 0;
        while at < bytes.len() {
            let rest = &bytes[at..];
            if !last && hidden.iter().any(|secret| secret.len() > rest.len() && secret.starts_with(rest)) {
                self.held = rest.to_vec();
                break;
            }
            if let Some(found) = hidden.iter().find(|secret| rest.starts_with(secret)) {
                out.extend(b"***");
                at += found.len();
            } else {
                out.push(bytes[at]);
                at += 1;
            }
        }
        out
    }

    fn finish(&mut self) -> Result<(), Failure> {
        let rest = self.hide(Vec::new(), true);
        self.chunk(&rest)?;
        if self.left_out > 0 {
            self.send(format!("\n[{} bytes of output left out]\n", self.left_out).as_bytes())?;
        }
        let tail: Vec<u8> = self.tail.drain(..).collect();
        if tail.is_empty() { Ok(()) } else { self.send(&tail) }
    }

    fn send(&self, bytes: &[u8]) -> Result<(), Failure> {
        let message =
            FromAgent::Output { step: self.output.step, text: String::from_utf8_lossy(bytes).into_owned() };
        self.output.sender.send(&message).map_err(|e| Failure::new(format!("can't send to the host: {e}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_script_names_its_line() {
        let dir = tempfile::tempdir().unwrap();
        let script_file = dir.path().join("script");
        let text = "set -- \"$@\" more\necho \"$0 $*\"\nf() {\n    [ -e /nowhere ]\n}\nf || echo on\nx=$(false; echo on)\n(false; true) || :\nf\necho never\n";
        std::fs::write(&script_file, text).unwrap();
        let around = Around {
            env: std::collections::BTreeMap::new(),
            user: "root".into(),
            workdir: "/".into(),
            timeout: 1,
            network: false,
        };
        let (name, home, shell) = ("root".into(), "/root".into(), "/bin/sh".into());
        let user = Account { name, uid: 0, gid: 0, comment: String::new(), home, shell };
        let output = script(&script_file, &around, &user).unwrap().arg("word").output().unwrap();
        let printed = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert_eq!(printed(&output.stdout), format!("{} word more\non\n", script_file.display()));
        assert_eq!(printed(&output.stderr), "line 4: exit code 1: [ -e /nowhere ]\n");
        assert_eq!(output.status.code(), Some(1));
    }

    #[test]
    fn secrets_are_hidden_wherever_a_chunk_ends() {
        let sender = Sender::new(Box::new(io::sink()));
        let hidden = [b"hunter2".to_vec(), b"hunt".to_vec()];
        let text = b"a hunter2 hunthunter2 hunter hun";
        for size in 1..text.len() {
            let output = Output { sender: &sender, step: 0, hidden: &hidden };
            let mut forward =
                Forward { output: &output, sent: 0, left_out: 0, tail: VecDeque::new(), held: Vec::new() };
            let mut out: Vec<u8> =
                text.chunks(size).flat_map(|chunk| forward.hide(chunk.to_vec(), false)).collect();
            out.extend(forward.hide(Vec::new(), true));
            assert_eq!(String::from_utf8_lossy(&out), "a *** ****** ***er hun", "chunks of {size}");
        }
    }
}

//! Runs a program for the user, with or without a terminal.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::fs::OFlags;
use rustix::process::{Pid, Signal, kill_process_group};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use crate::command;
use crate::fetch::Sender;
use crate::priority;
use crate::protocol::{self, Exec, FromAgent, Size, Stream, Terminal};
use crate::system;

/// Size of a read, in bytes.
const PIECE: usize = 32 << 10;
/// How many reads of input may wait for the program.
const WAITING: usize = 16;
/// How long background processes of an ended program may be silent before the agent
/// stops waiting for their output.
const GRACE: Duration = Duration::from_millis(500);

/// A program that runs or has ended.
pub(crate) struct Running {
    input: Option<mpsc::SyncSender<Vec<u8>>>,
    terminal: Option<OwnedFd>,
    life: Life,
}

/// The state of a program, shared by the threads that serve it.
#[derive(Clone)]
struct Life {
    group: Pid,
    /// Whether it has ended.
    over: Arc<AtomicBool>,
    /// Whether its messages are discarded, because the host has gone.
    muted: Arc<AtomicBool>,
}

impl Life {
    fn of(child: &Child) -> Self {
        Self { group: Pid::from_child(child), over: Arc::default(), muted: Arc::default() }
    }

    fn is_heard(&self) -> bool {
        !self.muted.load(Ordering::SeqCst)
    }
}

impl Drop for Running {
    /// Kills the program if it still runs.
    fn drop(&mut self) {
        self.life.muted.store(true, Ordering::SeqCst);
        if !self.life.over.load(Ordering::SeqCst) {
            let _ = kill_process_group(self.life.group, Signal::KILL);
        }
    }
}

impl Running {
    /// Starts the program. Threads send its output and its exit status to the host.
    pub(crate) fn start(exec: &Exec, sender: &Sender) -> io::Result<Self> {
        let mut command = program(exec);
        match &exec.terminal {
            Some(terminal) => Self::on_terminal(&mut command, terminal, sender),
            None => Self::on_pipes(&mut command, sender),
        }
    }

    fn on_terminal(command: &mut Command, terminal: &Terminal, sender: &Sender) -> io::Result<Self> {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        grantpt(&master)?;
        unlockpt(&master)?;
        let name = ptsname(&master, Vec::new())?;
        let name = name.to_str().map_err(io::Error::other)?.to_owned();
        // The terminal must not become the agent's own: its end would kill the agent.
        let noctty = OFlags::NOCTTY.bits() as i32;
        let slave = File::options().read(true).write(true).custom_flags(noctty).open(name)?;
        resize(&master, terminal.size)?;
        command.env("TERM", &terminal.kind);
        command.stdin(slave.try_clone()?).stdout(slave.try_clone()?).stderr(slave);
        // SAFETY: the closure makes system calls only.
        unsafe {
            command.pre_exec(|| {
                rustix::process::setsid()?;
                rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
                Ok(())
            });
        }
        let child = priority::start(command)?;
        // Close the terminal in `command`: only the child should hold it open.
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let (reader, writer) = (File::from(master.try_clone()?), File::from(master.try_clone()?));
        let life = Life::of(&child);
        let readers = vec![forward(reader, Stream::Output, sender, &life)];
        wait(child, readers, sender.clone(), &life);
        Ok(Self { input: Some(feed(writer)), terminal: Some(master), life })
    }

    fn on_pipes(command: &mut Command, sender: &Sender) -> io::Result<Self> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
        let mut child = priority::start(command)?;
        let life = Life::of(&child);
        let input = child.stdin.take().map(feed);
        let mut readers = Vec::new();
        readers.extend(child.stdout.take().map(|out| forward(out, Stream::Output, sender, &life)));
        readers.extend(child.stderr.take().map(|out| forward(out, Stream::Error, sender, &life)));
        wait(child, readers, sender.clone(), &life);
        Ok(Self { input, terminal: None, life })
    }

    /// Passes input to the program, if it still reads.
    pub(crate) fn input(&mut self, bytes: Vec<u8>) {
        if let Some(input) = &self.input
            && input.send(bytes).is_err()
        {
            self.input = None;
        }
    }

    /// Ends the input.
    pub(crate) fn end_input(&mut self) {
        match self.terminal {
            // Ctrl-D ends the input without closing the terminal.
            Some(_) => self.input(vec![4]),
            None => self.input = None,
        }
    }

    /// Sets the size of the terminal.
    pub(crate) fn resize(&self, size: Size) {
        if let Some(terminal) = &self.terminal {
            // A terminal of the wrong size still works.
            let _ = resize(terminal, size);
        }
    }
}

fn program(exec: &Exec) -> Command {
    let root = system::user("root");
    let home = root.as_ref().map_or("/root", |r| r.home.as_str());
    let shell = root.as_ref().map(|r| r.shell.as_str()).filter(|s| !s.is_empty()).unwrap_or("/bin/sh");
    let mut command = match exec.command.as_slice() {
        [] => {
            let mut command = command::command(shell);
            let name = shell.rsplit('/').next().unwrap_or(shell);
            // The dash makes it a login shell.
            command.arg0(format!("-{name}"));
            command
        }
        [program, arguments @ ..] => {
            // Hooks and operations are those that this agent understands, also where the
            // image has an older one.
            let own = format!("/proc/{}/exe", std::process::id());
            let program = if program == protocol::AGENT { &own } else { program };
            let mut command = command::command(program);
            command.args(arguments);
            command
        }
    };
    command.env("HOME", home).env("USER", "root").env("LOGNAME", "root").env("SHELL", shell);
    command.current_dir(if std::path::Path::new(home).is_dir() { home } else { "/" });
    command
}

fn resize(terminal: impl AsFd, size: Size) -> io::Result<()> {
    let size = Winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 };
    Ok(tcsetwinsize(terminal, size)?)
}

/// Starts a thread that writes input to the program: a program that does not read blocks
/// only this thread.
fn feed(mut writer: impl Write + Send + 'static) -> mpsc::SyncSender<Vec<u8>> {
    let (sender, pieces) = mpsc::sync_channel::<Vec<u8>>(WAITING);
    std::thread::spawn(move || {
        for piece in pieces {
            if writer.write_all(&piece).and_then(|()| writer.flush()).is_err() {
                return;
            }
        }
    });
    sender
}

/// A thread that reads a program's output.
struct Reader {
    thread: JoinHandle<()>,
    /// Even while the thread waits for output, odd while it sends some.
    turn: Arc<AtomicUsize>,
}

fn forward(mut reader: impl Read + Send + 'static, stream: Stream, sender: &Sender, life: &Life) -> Reader {
    let life = life.clone();
    let (sender, turn) = (sender.clone(), Arc::new(AtomicUsize::new(0)));
    let turns = turn.clone();
    let thread = std::thread::spawn(move || {
        let mut buffer = vec![0; PIECE];
        // A terminal without programs reads as an error.
        while let Ok(n) = reader.read(&mut buffer) {
            turns.fetch_add(1, Ordering::SeqCst);
            if n == 0 || !life.is_heard() || wrote(&sender, stream, &buffer[..n]).is_err() {
                return;
            }
            turns.fetch_add(1, Ordering::SeqCst);
        }
    });
    Reader { thread, turn }
}

/// Sends output: both frames at once, because no other frame may come between them.
fn wrote(sender: &Sender, stream: Stream, bytes: &[u8]) -> io::Result<()> {
    let mut frames = protocol::encode_message(&FromAgent::Wrote(stream))?;
    frames.extend(protocol::encode_data(bytes)?);
    sender.raw(&frames)
}

/// Starts a thread that sends the exit status after all output. Background processes
/// may keep the output open; the thread stops waiting for them once they are silent.
fn wait(mut child: Child, readers: Vec<Reader>, sender: Sender, life: &Life) {
    let life = life.clone();
    std::thread::spawn(move || {
        let status = child.wait();
        life.over.store(true, Ordering::SeqCst);
        let turns = || readers.iter().map(|r| r.turn.load(Ordering::SeqCst)).collect::<Vec<_>>();
        let (mut opened, mut since) = (turns(), Instant::now());
        while readers.iter().any(|r| !r.thread.is_finished()) && since.elapsed() < GRACE {
            std::thread::sleep(Duration::from_millis(1));
            let now = turns();
            if now != opened || now.iter().any(|turn| turn % 2 == 1) {
                (opened, since) = (now, Instant::now());
            }
        }
        let (code, signal) = status.map_or((None, None), |s| (s.code(), s.signal()));
        if life.is_heard() {
            let _ = sender.send(&FromAgent::Exited { code, signal });
        }
    });
}

//! Programs of the host that must not outlive vimg, and what they say.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::path::Path;
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::process::{Signal, getpid, getppid, set_parent_process_death_signal};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::Command;

/// A program that runs for long, in `dir`, with what it says in the file
/// `log`. It dies with vimg, and when its child is dropped; Ctrl-C is for
/// vimg, which stops it itself.
pub(super) fn daemon(program: &Path, dir: &Path, log: &Path) -> io::Result<Command> {
    let log = File::create(log)?;
    let mut command = Command::new(program);
    command
        .current_dir(dir)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .process_group(0)
        .kill_on_drop(true);
    die_with_us(&mut command);
    Ok(command)
}

/// The end of what a log says, for people.
pub(super) fn last_words(log: &Path) -> String {
    let text = std::fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text[text.len().saturating_sub(2000)..]).trim().to_owned();
    if text.is_empty() { "it says nothing".into() } else { text }
}

/// The end of a stream that is read as it comes.
#[derive(Clone)]
pub(super) struct Tail {
    bytes: Arc<Mutex<VecDeque<u8>>>,
}

impl Tail {
    /// Keeps the last `most` bytes of `stream`.
    pub(super) fn of(mut stream: impl AsyncRead + Unpin + Send + 'static, most: usize) -> Self {
        let tail = Self { bytes: Arc::default() };
        let bytes = tail.bytes.clone();
        tokio::spawn(async move {
            let mut buffer = vec![0; 4096];
            while let Ok(n) = stream.read(&mut buffer).await {
                if n == 0 {
                    return;
                }
                let mut bytes = bytes.lock().unwrap_or_else(PoisonError::into_inner);
                bytes.extend(&buffer[..n]);
                let surplus = bytes.len().saturating_sub(most);
                bytes.drain(..surplus);
            }
        });
        tail
    }

    /// What there is so far.
    pub(super) fn text(&self) -> String {
        let bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes: Vec<u8> = bytes.iter().copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

/// Has the kernel kill the program when vimg dies, however it dies.
pub(super) fn die_with_us(command: &mut Command) {
    let parent = getpid();
    // SAFETY: the closure makes system calls and touches no memory that the
    // parent shares.
    unsafe {
        command.pre_exec(move || {
            set_parent_process_death_signal(Some(Signal::KILL))?;
            // vimg may have died before the line above.
            if getppid() == Some(parent) { Ok(()) } else { Err(io::Error::from(io::ErrorKind::Interrupted)) }
        });
    }
}

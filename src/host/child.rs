//! Programs of the host that must not outlive vimg, and their output.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::path::Path;
use std::process::Stdio;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use rustix::process::{Signal, getpid, getppid, set_parent_process_death_signal};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::Command;

/// Makes the command of a long-running program, with the directory `dir` and
/// its output in the file `log`. It is killed when its handle is dropped, and
/// when vimg dies unless it is `lasting`. Ctrl-C does not reach it: vimg stops
/// it.
pub(crate) fn daemon(program: &Path, dir: &Path, log: &Path, lasting: bool) -> io::Result<Command> {
    let log = File::create(log)?;
    let mut command = super::command(program);
    command.current_dir(dir).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).kill_on_drop(true);
    if lasting {
        // It must survive the end of the terminal.
        own_session(&mut command);
    } else {
        command.process_group(0);
        die_with_us(&mut command);
    }
    Ok(command)
}

/// Starts a program in a session of its own.
pub(crate) fn own_session(command: &mut Command) {
    // SAFETY: the closure makes a system call.
    unsafe {
        command.pre_exec(|| rustix::process::setsid().map(|_| ()).map_err(Into::into));
    }
}

/// Returns the end of a log, for messages.
pub(crate) fn last_words(log: &Path) -> String {
    let text = std::fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text[text.len().saturating_sub(2000)..]).trim().to_owned();
    if text.is_empty() { "no output".into() } else { text }
}

/// The end of a stream, read in the background.
#[derive(Clone)]
pub(crate) struct Tail {
    kept: Arc<Mutex<KeptBytes>>,
}

#[derive(Default)]
struct KeptBytes {
    bytes: VecDeque<u8>,
    /// Number of bytes in all.
    total: u64,
}

impl Tail {
    /// Keeps the last `most` bytes of `stream`.
    pub(crate) fn of(mut stream: impl AsyncRead + Unpin + Send + 'static, most: usize) -> Self {
        let tail = Self { kept: Arc::default() };
        let kept = tail.kept.clone();
        tokio::spawn(async move {
            let mut buffer = vec![0; 4096];
            while let Ok(n) = stream.read(&mut buffer).await {
                if n == 0 {
                    return;
                }
                let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
                kept.total += n as u64;
                kept.bytes.extend(&buffer[..n]);
                let surplus = kept.bytes.len().saturating_sub(most);
                kept.bytes.drain(..surplus);
            }
        });
        tail
    }

    /// Returns the end of the stream so far, as text.
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.since(0).1).into_owned()
    }

    /// Returns the number of bytes in all, and the bytes after the first
    /// `seen`, as far as they are kept.
    pub(crate) fn since(&self, seen: u64) -> (u64, Vec<u8>) {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let new = usize::try_from(kept.total.saturating_sub(seen)).unwrap_or(usize::MAX);
        let skipped = kept.bytes.len().saturating_sub(new);
        (kept.total, kept.bytes.iter().skip(skipped).copied().collect())
    }
}

/// Makes the kernel kill the program when vimg dies, however it dies.
pub(crate) fn die_with_us(command: &mut Command) {
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

/// Runs the program at idle priority, until it [`competes`]. Does nothing if
/// the priority could not be reset.
pub(crate) fn yields(command: &mut Command) {
    if may_compete() {
        // SAFETY: the closure makes one system call.
        unsafe {
            command.pre_exec(|| {
                scheduled(0, libc::SCHED_IDLE);
                Ok(())
            });
        }
    }
}

/// Gives all threads of a program normal priority again.
pub(crate) fn competes(program: u32) {
    let threads = std::fs::read_dir(format!("/proc/{program}/task")).into_iter().flatten().flatten();
    for thread in threads.filter_map(|entry| entry.file_name().to_str()?.parse().ok()) {
        scheduled(thread, libc::SCHED_OTHER);
    }
}

/// Tests whether SCHED_IDLE can be changed back to SCHED_OTHER, which can need
/// privileges (`RLIMIT_NICE`, sched(7)).
fn may_compete() -> bool {
    static MAY: OnceLock<bool> = OnceLock::new();
    // A new thread tries it on itself, and ends.
    let tried = || scheduled(0, libc::SCHED_IDLE) && scheduled(0, libc::SCHED_OTHER);
    *MAY.get_or_init(|| std::thread::spawn(tried).join().unwrap_or(false))
}

/// Sets the scheduling policy of a thread; 0 is the calling one. Returns
/// whether that worked.
fn scheduled(thread: libc::pid_t, policy: libc::c_int) -> bool {
    // `struct sched_param`: the priority, which is 0 for both.
    let parameters: libc::c_int = 0;
    // SAFETY: the call reads one number, which outlives it.
    unsafe { libc::syscall(libc::SYS_sched_setscheduler, thread, policy, &raw const parameters) == 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads a program's scheduling policy from `/proc`.
    fn policy(program: u32) -> i32 {
        let stat = std::fs::read_to_string(format!("/proc/{program}/stat")).unwrap();
        // The 41st field is the policy (proc(5)); the second may have spaces.
        stat.rsplit_once(')').unwrap().1.split_whitespace().nth(38).unwrap().parse().unwrap()
    }

    #[tokio::test]
    async fn what_yields_competes_when_it_is_told() {
        let mut command = crate::host::command(Path::new("/bin/sleep"));
        command.arg("60").kill_on_drop(true);
        yields(&mut command);
        let child = command.spawn().unwrap();
        let program = child.id().unwrap();
        assert_eq!(policy(program), if may_compete() { libc::SCHED_IDLE } else { libc::SCHED_OTHER });
        competes(program);
        assert_eq!(policy(program), libc::SCHED_OTHER);
    }

    #[tokio::test]
    async fn the_end_of_a_stream_is_kept_and_read_in_pieces() {
        let (mut writer, reader) = tokio::io::duplex(64);
        let tail = Tail::of(reader, 4);
        let write = async |bytes: &[u8]| {
            let before = tail.since(0).0;
            tokio::io::AsyncWriteExt::write_all(&mut writer, bytes).await.unwrap();
            while tail.since(0).0 < before + bytes.len() as u64 {
                tokio::task::yield_now().await;
            }
        };
        let mut write = write;
        write(b"abc").await;
        assert_eq!(tail.since(0), (3, b"abc".to_vec()));
        write(b"def").await;
        assert_eq!(tail.since(3), (6, b"def".to_vec()));
        assert_eq!((tail.since(0), tail.since(6)), ((6, b"cdef".to_vec()), (6, Vec::new())));
        assert_eq!(tail.text(), "cdef");
    }
}

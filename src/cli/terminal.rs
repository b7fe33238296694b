//! Connects the user's terminal to a program in a machine.

use std::io::{Read, Write};

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use tokio::sync::mpsc;
use vimg_agent::protocol::{Size, Stream, Terminal};

use super::output::{Error, Outcome};
use crate::execute::{Ended, Input};

/// Prints output of the program.
pub(super) fn write(stream: Stream, bytes: &[u8]) {
    // A closed pipe is no reason to stop the command.
    let _ = match stream {
        Stream::Output => std::io::stdout().write_all(bytes).and_then(|()| std::io::stdout().flush()),
        Stream::Error => std::io::stderr().write_all(bytes),
    };
}

/// Describes the user's terminal, if the command gets one.
pub(super) fn terminal(on_terminal: bool) -> Option<Terminal> {
    let kind = || std::env::var("TERM").unwrap_or_else(|_| "dumb".into());
    on_terminal.then(|| Terminal { kind: kind(), size: size() })
}

/// Returns the size of the terminal, in characters.
fn size() -> Size {
    match tcgetwinsize(std::io::stdout()) {
        Ok(size) if size.ws_row > 0 => Size { rows: size.ws_row, columns: size.ws_col },
        _ => Size { rows: 24, columns: 80 },
    }
}

/// Starts to read the user's input and, on a terminal, changes of its size.
pub(super) fn listen(on_terminal: bool) -> mpsc::Receiver<Input> {
    let (sender, receiver) = mpsc::channel(16);
    if on_terminal {
        let sender = sender.clone();
        tokio::spawn(async move {
            let kind = tokio::signal::unix::SignalKind::window_change();
            let Ok(mut changes) = tokio::signal::unix::signal(kind) else { return };
            while changes.recv().await.is_some() {
                if sender.send(Input::Resize(size())).await.is_err() {
                    return;
                }
            }
        });
    }
    // A blocking read can't be cancelled, so this thread ends with the program.
    std::thread::spawn(move || {
        let mut buffer = vec![0; 32 << 10];
        loop {
            let said = match std::io::stdin().read(&mut buffer) {
                Ok(0) | Err(_) => Input::End,
                Ok(n) => Input::Bytes(buffer[..n].to_vec()),
            };
            let end = matches!(said, Input::End);
            if sender.blocking_send(said).is_err() || end {
                return;
            }
        }
    });
    receiver
}

/// Raw mode of the terminal, in which it passes on every key. Dropping it restores
/// the previous mode.
pub(super) struct Raw(Option<Termios>);

impl Raw {
    pub(super) fn enter() -> Self {
        let was = tcgetattr(std::io::stdin()).ok();
        if let Some(was) = &was {
            let mut raw = was.clone();
            raw.make_raw();
            let _ = tcsetattr(std::io::stdin(), OptionalActions::Now, &raw);
        }
        Self(was)
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        if let Some(was) = &self.0 {
            let _ = tcsetattr(std::io::stdin(), OptionalActions::Now, was);
        }
    }
}

/// Converts the end of the program to an exit code of vimg.
pub(super) fn outcome(ended: Ended) -> Outcome {
    match ended {
        Ended::Code(0) => Ok(()),
        Ended::Code(code) => Err(Error::Code(u8::try_from(code).unwrap_or(1))),
        Ended::Signal(signal) => Err(Error::Code(u8::try_from(128 + signal).unwrap_or(255))),
    }
}

//! The agent's life: find the port, shake hands, answer.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::path::Path;
use std::time::{Duration, Instant};

use crate::apply;
use crate::command;
use crate::fetch::{Channel, Received, Sender};
use crate::protocol::{self, ALIVE_EVERY, FromAgent, PORT, ToAgent};
use crate::seal;
use crate::system;

/// How long a machine may take to show the port. An image that runs without
/// vimg has none, and its agent ends quietly.
const PORT_WAIT: Duration = Duration::from_secs(120);

/// How long systemd may take to start everything; what is not up by then is
/// left to come.
const BOOT_WAIT: Duration = Duration::from_secs(600);

/// Serves the host until the machine goes away.
pub fn serve() -> io::Result<()> {
    let start = Instant::now();
    let path = loop {
        if let Some(path) = system::port(PORT) {
            break path;
        }
        if start.elapsed() > PORT_WAIT {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    let port = open(&path)?;
    let sender = Sender::new(Box::new(port.try_clone()?));
    let alive = sender.clone();
    std::thread::spawn(move || {
        loop {
            std::thread::sleep(Duration::from_secs(ALIVE_EVERY));
            if alive.send(&FromAgent::Alive).is_err() {
                return;
            }
        }
    });
    Agent { channel: Channel::new(Box::new(Port(port)), sender), boot_stamp: system::boot_stamp() }.run()
}

fn open(path: &Path) -> io::Result<File> {
    let start = Instant::now();
    loop {
        match OpenOptions::new().read(true).write(true).open(path) {
            // The node may be there a moment before the device answers.
            Err(_) if start.elapsed() < Duration::from_secs(10) => {
                std::thread::sleep(Duration::from_millis(20))
            }
            result => return result,
        }
    }
}

/// A virtio port reads as ended while no host is connected; one may come.
struct Port(File);

impl Read for Port {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.0.read(buffer) {
                Ok(0) => std::thread::sleep(Duration::from_millis(50)),
                result => return result,
            }
        }
    }
}

struct Agent {
    channel: Channel,
    boot_stamp: String,
}

impl Agent {
    fn run(&mut self) -> io::Result<()> {
        loop {
            let answer = match self.channel.receive()? {
                Received::End => return Ok(()),
                Received::Sync(nonce) => {
                    self.greet(nonce)?;
                    continue;
                }
                Received::Message(message) => self.answer(message)?,
            };
            if let Some(answer) = answer {
                self.channel.sender.send(&answer)?;
            }
        }
    }

    /// Repeats the host's nonce, so that it can tell this conversation from
    /// what an earlier one left in the channel.
    fn greet(&mut self, nonce: [u8; 8]) -> io::Result<()> {
        let sender = self.channel.sender.clone();
        sender.raw(&[protocol::SYNC.as_slice(), &nonce].concat())?;
        let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        sender.send(&FromAgent::Hello {
            protocol: protocol::PROTOCOL,
            behaviour: protocol::BEHAVIOUR,
            boot_id: boot_id.trim().to_owned(),
        })?;
        sender.send(&FromAgent::Ready { failed_units: wait_until_up() })
    }

    fn answer(&mut self, message: ToAgent) -> io::Result<Option<FromAgent>> {
        let refused =
            |what: &str, error: io::Error| FromAgent::Refused { message: format!("{what}: {error}") };
        Ok(Some(match message {
            ToAgent::Apply { layer, steps } => {
                apply::apply(&mut self.channel, &layer, &steps, &mut self.boot_stamp)?
            }
            ToAgent::Freeze => {
                rustix::fs::sync();
                match system::freeze(Path::new("/"), true) {
                    Ok(()) => FromAgent::Frozen,
                    Err(error) => refused("freeze", error),
                }
            }
            ToAgent::Thaw => match system::freeze(Path::new("/"), false) {
                Ok(()) => FromAgent::Thawed,
                Err(error) => refused("thaw", error),
            },
            ToAgent::Seal => match seal::seal() {
                Ok(()) => FromAgent::Sealed,
                Err(error) => refused("seal", error),
            },
            ToAgent::SendBootFiles => {
                if let Some(path) = system::BOOT_FILES.iter().find(|p| !Path::new(p).is_file()) {
                    return Ok(Some(refused("send", io::Error::other(format!("{path} is not there")))));
                }
                for path in system::BOOT_FILES {
                    self.channel.send_file(path)?;
                }
                return Ok(None);
            }
        }))
    }
}

/// Waits until systemd has started everything; names what failed to start.
fn wait_until_up() -> Vec<String> {
    let mut wait = command::command("systemctl");
    wait.args(["is-system-running", "--wait", "--quiet"]);
    let _ = command::query(&mut wait, BOOT_WAIT);
    let mut failed = command::command("systemctl");
    failed.args(["list-units", "--state=failed", "--plain", "--no-legend", "--full"]);
    let Ok((_, text)) = command::query(&mut failed, command::QUESTION) else { return Vec::new() };
    text.lines().filter_map(|l| l.split_whitespace().next()).take(20).map(str::to_owned).collect()
}

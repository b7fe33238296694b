//! The agent's main loop: finds the port, does the handshake, and answers requests.
//!
//! The agent runs in one of three places: in the machine itself; in an appliance, a small
//! machine with the disk of another machine; or in a container on the host, with the
//! filesystem of that disk as its root.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::Mode;

use crate::appliance::{self, Attached};
use crate::apply;
use crate::check;
use crate::exec::Running;
use crate::fetch::{Channel, Received, Sender};
use crate::heartbeat;
use crate::init;
use crate::list;
use crate::offline;
use crate::priority;
use crate::protocol::{self, Change, Exec, FromAgent, PORT, Prepare, Resume, ToAgent};
use crate::resolver;
use crate::resume;
use crate::retarget;
use crate::seal;
use crate::system;

/// How long to wait for the port. A machine that runs without vimg has none: its agent
/// ends without an error.
const PORT_WAIT: Duration = Duration::from_secs(120);

/// How long to wait in seconds until the init system has started everything. After that,
/// the agent serves the host anyway.
const BOOT_WAIT: u64 = 600;

/// How long a machine may take to switch itself off. After that, the agent answers anyway.
const OFF_WAIT: Duration = Duration::from_secs(300);

/// Serves the host from within the machine, until the channel ends: the agent that is
/// installed in an image.
pub fn machine() -> io::Result<()> {
    match wait_for_port(Duration::from_millis(20), PORT_WAIT)? {
        Some(path) => on_port(&path, Place::Machine),
        None => Ok(()),
    }
}

/// Serves the host from within the machine: the agent that vimg's initramfs started, before
/// the init of the machine.
pub fn outside() -> io::Result<()> {
    // As the unit of the installed agent does. Programs that it starts get 0.
    let _ = fs::write("/proc/self/oom_score_adj", "-900");
    let path = wait_for_port(Duration::from_millis(20), Duration::from_secs(BOOT_WAIT))?
        .ok_or_else(|| io::Error::other("there is no virtio-serial port"))?;
    on_port(&path, Place::Machine)
}

/// Serves the host as an appliance.
pub fn appliance() -> io::Result<()> {
    let path = wait_for_port(Duration::from_millis(1), PORT_WAIT)?
        .ok_or_else(|| io::Error::other("there is no virtio-serial port"))?;
    on_port(&path, Place::Appliance(None))
}

/// Serves the host in a container, on the socket that is standard input.
pub fn container() -> io::Result<()> {
    // Close-on-exec: programs of layers must not inherit the socket.
    let socket = File::from(rustix::io::fcntl_dupfd_cloexec(io::stdin(), 3)?);
    rustix::stdio::dup2_stdin(File::open("/dev/null")?)?;
    let output = socket.try_clone()?;
    Agent::start(Box::new(socket), Box::new(output), Place::Container)
}

fn wait_for_port(pause: Duration, most: Duration) -> io::Result<Option<PathBuf>> {
    let start = Instant::now();
    loop {
        if let Some(path) = system::port(PORT) {
            return Ok(Some(path));
        }
        if start.elapsed() > most {
            return Ok(None);
        }
        std::thread::sleep(pause);
    }
}

fn on_port(path: &Path, place: Place) -> io::Result<()> {
    let port = open(path)?;
    let output = port.try_clone()?;
    Agent::start(Box::new(Port(port)), Box::new(output), place)
}

fn open(path: &Path) -> io::Result<File> {
    let start = Instant::now();
    loop {
        match OpenOptions::new().read(true).write(true).open(path) {
            // The node may exist shortly before the device works.
            Err(_) if start.elapsed() < Duration::from_secs(10) => {
                std::thread::sleep(Duration::from_millis(20))
            }
            result => return result,
        }
    }
}

/// A virtio port. It reads as ended while no host is connected, so this waits for a host.
struct Port(File);

impl Read for Port {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        // Poll less often after a few seconds without a host.
        let (mut pause, mut alone) = (Duration::from_millis(5), 0);
        loop {
            match self.0.read(buffer) {
                Ok(0) => std::thread::sleep(pause),
                result => return result,
            }
            alone += 1;
            if alone > 1000 {
                pause = Duration::from_millis(50);
            }
        }
    }
}

/// Where the agent runs.
enum Place {
    Machine,
    /// With the mounted disk, if there is one.
    Appliance(Option<Attached>),
    Container,
}

struct Agent {
    channel: Channel,
    /// The kernel's boot id. Read once: it is the same in all forks.
    boot_id: String,
    boot_stamp: String,
    place: Place,
    /// Units that failed at boot, once they are known. A fork knows them from its snapshot.
    failed_units: Option<Vec<String>>,
    /// The program that runs for the user.
    running: Option<Running>,
    /// Whether writes are blocked.
    held: bool,
    /// What the boot has read, if it was recorded.
    boot: Option<retarget::Boot>,
}

impl Agent {
    fn start(input: Box<dyn Read + Send>, output: Box<dyn Write + Send>, place: Place) -> io::Result<()> {
        // Modes of new files must not depend on the umask of the caller.
        rustix::process::umask(Mode::from_raw_mode(0o022));
        let sender = Sender::new(output);
        heartbeat::start(sender.clone());
        let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        Self {
            channel: Channel::new(input, sender),
            boot_id: boot_id.trim().to_owned(),
            boot_stamp: system::boot_stamp(),
            place,
            failed_units: None,
            running: None,
            held: false,
            boot: None,
        }
        .run()
    }

    fn run(&mut self) -> io::Result<()> {
        loop {
            let answer = match self.channel.receive()? {
                Received::End => return Ok(()),
                Received::Sync(nonce) => {
                    self.greet(nonce)?;
                    continue;
                }
                Received::Data(bytes) => {
                    if let Some(running) = &mut self.running {
                        running.input(bytes);
                    }
                    continue;
                }
                Received::Message(message) => self.answer(message)?,
            };
            if let Some(answer) = answer {
                self.channel.sender.send(&answer)?;
            }
        }
    }

    /// Answers a handshake: repeats the host's nonce, so that the host can skip messages of
    /// an earlier session.
    fn greet(&mut self, nonce: [u8; 8]) -> io::Result<()> {
        // The session that started the program has ended: kill it.
        self.running = None;
        let sender = self.channel.sender.clone();
        sender.raw(&[protocol::SYNC.as_slice(), &nonce].concat())?;
        sender.send(&FromAgent::Hello {
            protocol: protocol::PROTOCOL,
            behaviour: protocol::BEHAVIOUR,
            boot_id: self.boot_id.clone(),
        })?;
        let place = &self.place;
        let failed_units = self.failed_units.get_or_insert_with(|| match place {
            Place::Machine => wait_until_up(),
            Place::Appliance(_) | Place::Container => Vec::new(),
        });
        sender.send(&FromAgent::Ready { failed_units: failed_units.clone() })
    }

    /// Acts on a message. Returns the answer, unless it was sent already or there is none.
    fn answer(&mut self, message: ToAgent) -> io::Result<Option<FromAgent>> {
        Ok(Some(match message {
            ToAgent::Apply(what) => {
                let applied = apply::apply(&mut self.channel, &what, &mut self.boot_stamp)?;
                let applied = self.unless_off(applied);
                priority::end();
                if !matches!(self.place, Place::Machine) {
                    offline::clear_away();
                }
                applied
            }
            ToAgent::Check { probes, variables } => {
                self.unless_off(check::check(&self.channel.sender, &probes, &variables)?)
            }
            ToAgent::Retarget { resume, changes } => {
                let contents = retarget::receive(&mut self.channel, &changes)?;
                match self.retarget(&resume, &changes, &contents) {
                    Ok(()) => FromAgent::Retargeted,
                    Err(why) => FromAgent::Refused { message: why },
                }
            }
            ToAgent::Rehearse { changes } => {
                retarget::rehearse(&changes, self.boot.as_ref());
                FromAgent::Rehearsed
            }
            ToAgent::Resume(what) => done("resume", self.resume(&what), FromAgent::Resumed),
            ToAgent::Exec(exec) => return Ok(self.exec(&exec)),
            ToAgent::Resize(size) => {
                if let Some(running) = &self.running {
                    running.resize(size);
                }
                return Ok(None);
            }
            ToAgent::EndInput => {
                if let Some(running) = &mut self.running {
                    running.end_input();
                }
                return Ok(None);
            }
            ToAgent::Network { .. } => FromAgent::Refused { message: "unexpected network message".into() },
            ToAgent::Prepare(what) => {
                let prepared = self.prepare(&what);
                if prepared.is_ok() {
                    self.boot_stamp = system::boot_stamp();
                }
                done("prepare the disk", prepared, FromAgent::Prepared)
            }
            ToAgent::PrepareSnapshot => {
                self.boot = retarget::Boot::look();
                rustix::fs::sync();
                FromAgent::SnapshotReady
            }
            ToAgent::Freeze => {
                rustix::fs::sync();
                let held = if self.held { Ok(()) } else { self.hold() };
                self.held |= held.is_ok();
                done("freeze the disk", held, FromAgent::Frozen)
            }
            ToAgent::Thaw => done("thaw the disk", self.let_go(), FromAgent::Thawed),
            ToAgent::Seal { agent } => match seal::seal(agent) {
                Ok(sealed) => FromAgent::Sealed(sealed),
                Err(error) => done("seal the machine", Err(error), FromAgent::Prepared),
            },
            ToAgent::List => {
                list::list(&self.channel.sender)?;
                return Ok(None);
            }
            ToAgent::Digests { paths } => FromAgent::Digests { digests: list::digests(&paths) },
            ToAgent::SwitchOff => done("switch the machine off", switch_off(), FromAgent::GoingOff),
            ToAgent::SendBootFiles => return self.send_boot_files(),
        }))
    }

    /// Starts a program. Answers only if it can't be started.
    fn exec(&mut self, exec: &Exec) -> Option<FromAgent> {
        match Running::start(exec, &self.channel.sender) {
            Ok(running) => {
                self.running = Some(running);
                None
            }
            Err(error) => {
                let name = exec.command.first().map_or("the login shell", String::as_str);
                Some(FromAgent::Refused { message: format!("{name}: {error}") })
            }
        }
    }

    /// Sends the boot files. Answers only if one is missing.
    fn send_boot_files(&mut self) -> io::Result<Option<FromAgent>> {
        if let Some(path) = system::BOOT_FILES.iter().find(|p| !Path::new(p).is_file()) {
            let error = io::Error::other(format!("{path} does not exist"));
            return Ok(Some(refused("send the boot files", &error)));
        }
        for path in system::BOOT_FILES {
            self.channel.send_file(path)?;
        }
        Ok(None)
    }
}

/// The answer about an attempt to do `what`: `good`, or the failure.
fn done(what: &str, result: io::Result<()>, good: FromAgent) -> FromAgent {
    match result {
        Ok(()) => good,
        Err(error) => refused(what, &error),
    }
}

fn refused(what: &str, error: &io::Error) -> FromAgent {
    FromAgent::Refused { message: format!("{what}: {error}") }
}

impl Agent {
    fn prepare(&mut self, what: &Prepare) -> io::Result<()> {
        match &mut self.place {
            Place::Machine => Err(io::Error::other("the agent runs in the machine itself")),
            Place::Appliance(Some(_)) => Err(io::Error::other("a disk is already mounted")),
            Place::Appliance(attached) => {
                *attached = Some(appliance::prepare(what)?);
                Ok(())
            }
            Place::Container => {
                if let Some(network) = &what.network {
                    resolver::set(&network.resolv_conf);
                }
                Ok(())
            }
        }
    }

    /// Passes an answer on. If the machine is being switched off, a failure is a result of
    /// that: the agent waits for the end, of which the host hears elsewhere.
    fn unless_off(&self, answer: FromAgent) -> FromAgent {
        let failed = matches!((&answer, &self.place), (FromAgent::Failed { .. }, Place::Machine));
        if failed && init::find().is_ok_and(|init| init.is_going_off()) {
            std::thread::sleep(OFF_WAIT);
        }
        answer
    }

    fn hold(&mut self) -> io::Result<()> {
        match &mut self.place {
            Place::Machine => system::freeze(true),
            Place::Appliance(Some(attached)) => attached.hold(),
            Place::Appliance(None) => Ok(()),
            // In a container, only the host can freeze the filesystem.
            Place::Container => Ok(()),
        }
    }

    /// Allows writes again if they are blocked: an earlier session may have ended while
    /// they were.
    fn let_go(&mut self) -> io::Result<()> {
        if self.held {
            self.thaw()?;
            self.held = false;
        }
        Ok(())
    }

    /// Retargets a fork; the error says why that is not possible. Sets the clock last:
    /// timers may start programs that read the changed files.
    fn retarget(&mut self, resume: &Resume, changes: &[Change], contents: &[u8]) -> Result<(), String> {
        priority::begin();
        resume::reseed(resume).map_err(retarget::unable)?;
        retarget::make(changes, contents, self.boot.as_mut())?;
        self.step(resume).map_err(retarget::unable)
    }

    fn resume(&mut self, resume: &Resume) -> io::Result<()> {
        priority::begin();
        resume::reseed(resume)?;
        self.step(resume)
    }

    /// Sets the clock, and ends the recording of opened files: the fork is complete.
    fn step(&mut self, resume: &Resume) -> io::Result<()> {
        if let Some(boot) = &mut self.boot {
            boot.over();
        }
        resume::step(resume)
    }

    fn thaw(&mut self) -> io::Result<()> {
        match &mut self.place {
            Place::Machine => system::freeze(false),
            Place::Appliance(Some(attached)) => attached.thaw(),
            Place::Appliance(None) | Place::Container => Ok(()),
        }
    }
}

/// Begins to stop all services and to switch the machine off. Does not wait for it.
fn switch_off() -> io::Result<()> {
    init::find().and_then(|init| init.power_off()).map_err(|failure| io::Error::other(failure.message))
}

/// Waits until the machine has started everything; returns units that failed to start.
fn wait_until_up() -> Vec<String> {
    init::find().map(|init| init.wait_until_up(BOOT_WAIT)).unwrap_or_default()
}

//! The companion process of a server: it manages the server's network, its
//! forwarded ports and its console log after `vimg up` has ended.
//!
//! It runs this program again, as `vimg keep`. Its standard input is a pipe; the
//! write end belongs to QEMU and to `vimg up`. When both have ended, the
//! companion reads end-of-file and ends as well, and `pasta` with it.

use std::fs::File;
use std::io::{self, Write};
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::pipe::{PipeFlags, pipe_with};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::pipe;

use super::namespaces::{Ids, Namespaces};
use super::network::{Access, Gateway, Inward, Unreachable};
use super::{child, sockets};

/// The FIFO that QEMU writes the console to.
pub const CONSOLE: &str = "console.pipe";
/// Console logs: the current one and the previous one.
const LOGS: [&str; 2] = ["console.log", "console.log.1"];
/// Size limit of each log, in bytes.
const LOG: u64 = 4 << 20;
/// The companion's socket, in the server's directory.
const SOCKET: &str = "keeper";
/// Time for the companion of a server that has just ended to release its ports.
const LEAVING: Duration = Duration::from_secs(2);
/// Timeout of a request.
const PATIENCE: Duration = Duration::from_secs(30);
/// Size limit of a message, in bytes.
const MOST_TOLD: u64 = 64 << 10;

/// The first message.
#[derive(Debug, Serialize, Deserialize)]
struct Orders {
    access: Access,
    ways: Vec<Inward>,
}

/// The response to a message.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Answer {
    /// A process in the network namespace, if the server has one of its own.
    holder: Option<u32>,
    /// An error message and its help text.
    trouble: Option<(String, String)>,
}

impl From<Result<Option<u32>, Unreachable>> for Answer {
    fn from(result: Result<Option<u32>, Unreachable>) -> Self {
        match result {
            Ok(holder) => Self { holder, trouble: None },
            Err(Unreachable { message, help }) => Self { holder: None, trouble: Some((message, help)) },
        }
    }
}

impl Answer {
    fn read(text: &str) -> Result<Option<u32>, Unreachable> {
        match serde_json::from_str(text) {
            Ok(Self { trouble: Some((message, help)), .. }) => Err(Unreachable { message, help }),
            Ok(Self { holder, trouble: None }) => Ok(holder),
            Err(_) => Err(lost("it has ended")),
        }
    }
}

/// The error for a companion that does not answer.
pub fn lost(why: impl std::fmt::Display) -> Unreachable {
    Unreachable {
        message: format!("the network process of the server does not answer: {why}"),
        help: "restart the server: `vimg down --force`, then `vimg up`".into(),
    }
}

/// The error for a host port that is in use.
pub fn taken(address: &str, port: u16) -> Unreachable {
    Unreachable {
        message: format!("can't listen on port {port} of {address}"),
        help: "another program or server may use it; give `forward` another `host=`".into(),
    }
}

/// A handle to a server's companion process.
#[derive(Debug)]
pub struct Keeper {
    dir: PathBuf,
    namespaces: Option<Namespaces>,
    /// The write end of its standard input.
    life: Option<OwnedFd>,
}

impl Keeper {
    /// Starts a companion for the server in `dir`.
    ///
    /// # Errors
    ///
    /// The network can't be set up, or a host port is in use.
    pub async fn start(dir: &Path, access: &Access, ways: &[Inward]) -> Result<Self, Unreachable> {
        let start = async {
            let (input, life) = pipe_with(PipeFlags::CLOEXEC)?;
            let mut command = super::command(Path::new("/proc/self/exe"));
            command.as_std_mut().arg0("vimg");
            command.arg("keep").current_dir(dir).stdin(input).stdout(Stdio::piped());
            command.stderr(File::create(dir.join("keeper.log"))?);
            // It must survive the end of the terminal.
            child::own_session(&mut command);
            let mut process = command.spawn()?;
            let orders = Orders { access: access.clone(), ways: ways.to_vec() };
            let mut life = File::from(life);
            life.write_all(format!("{}\n", serde_json::to_string(&orders)?).as_bytes())?;
            let mut said = String::new();
            if let Some(output) = process.stdout.take() {
                let mut output = BufReader::new(output.take(MOST_TOLD));
                tokio::time::timeout(PATIENCE, output.read_line(&mut said)).await??;
            }
            Ok::<_, io::Error>((OwnedFd::from(life), said))
        };
        let (life, said) = start.await.map_err(lost)?;
        let namespaces = Self::namespaces_of(Answer::read(&said)?)?;
        Ok(Self { dir: dir.to_owned(), namespaces, life: Some(life) })
    }

    /// Connects to the companion of a running server.
    ///
    /// # Errors
    ///
    /// The companion has ended, although the server runs.
    pub async fn find(dir: &Path) -> Result<Self, Unreachable> {
        let found = Self { dir: dir.to_owned(), namespaces: None, life: None };
        let namespaces = Self::namespaces_of(found.ask(None).await?)?;
        Ok(Self { namespaces, ..found })
    }

    fn namespaces_of(holder: Option<u32>) -> Result<Option<Namespaces>, Unreachable> {
        holder.map(|holder| Namespaces::of(holder, ids())).transpose().map_err(lost)
    }

    /// The server's namespaces; `None` if it uses the host's network.
    pub fn namespaces(&self) -> Option<&Namespaces> {
        self.namespaces.as_ref()
    }

    /// Ties the companion's life to `command`: it inherits the pipe's write end.
    pub fn ends_with(&self, command: &mut Command) {
        let Some(life) = self.life.as_ref().map(AsRawFd::as_raw_fd) else { return };
        // SAFETY: the closure makes a system call; the descriptor stays open
        // in the parent until the child has been spawned.
        unsafe {
            command.pre_exec(move || match libc::fcntl(life, libc::F_SETFD, 0) {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            });
        }
    }

    /// Replaces the forwarded ports. Open connections may break.
    ///
    /// # Errors
    ///
    /// A host port is in use. Then the previous ports stay forwarded.
    pub async fn lead(&self, ways: &[Inward]) -> Result<(), Unreachable> {
        self.ask(Some(ways.to_vec())).await.map(|_| ())
    }

    async fn ask(&self, ways: Option<Vec<Inward>>) -> Result<Option<u32>, Unreachable> {
        let ask = async {
            let mut stream = sockets::connect(&self.dir, SOCKET).await?;
            stream.write_all(format!("{}\n", serde_json::to_string(&ways)?).as_bytes()).await?;
            let mut said = String::new();
            stream.take(MOST_TOLD).read_to_string(&mut said).await?;
            Ok::<_, io::Error>(said)
        };
        let asked = tokio::time::timeout(PATIENCE, ask).await.map_err(lost)?;
        Answer::read(&asked.map_err(lost)?)
    }
}

/// Reads a server's console logs, the oldest first.
///
/// # Errors
///
/// A log can't be read.
pub fn console(dir: &Path) -> io::Result<Vec<u8>> {
    let mut all = Vec::new();
    for name in LOGS.iter().rev() {
        match std::fs::read(dir.join(name)) {
            Ok(bytes) => all.extend(bytes),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(e),
        }
    }
    Ok(all)
}

/// The id mapping of the server's user namespace.
fn ids() -> Ids {
    if rustix::process::geteuid().is_root() { Ids::System } else { Ids::Same }
}

/// Runs the companion process in the current directory, until end-of-file on
/// the standard input.
///
/// # Errors
///
/// I/O errors at startup. `vimg up` then reports that the companion does not
/// answer.
pub async fn keep() -> io::Result<()> {
    let input = pipe::Receiver::from_owned_fd(rustix::io::dup(rustix::stdio::stdin())?)?;
    let mut input = BufReader::new(input.take(MOST_TOLD)).lines();
    let orders: Orders = serde_json::from_str(&input.next_line().await?.unwrap_or_default())?;
    let _ = std::fs::remove_file(CONSOLE);
    mknodat(CWD, CONSOLE, FileType::Fifo, Mode::from_raw_mode(0o600), 0)?;
    // Opened for writing as well, so that it never reads end-of-file.
    let mut console = pipe::OpenOptions::new().read_write(true).open_receiver(CONSOLE)?;
    let mut log = Log::open()?;
    let _ = std::fs::remove_file(SOCKET);
    let listener = sockets::listen(Path::new("."), SOCKET)?;
    let made = Network::new(orders).await;
    let (network, answer) = match made {
        Ok(network) => {
            let holder = network.holder();
            (Some(network), Ok(holder))
        }
        Err(trouble) => (None, Err(trouble)),
    };
    let answer = serde_json::to_string(&Answer::from(answer))?;
    File::from(rustix::io::dup(rustix::stdio::stdout())?).write_all(format!("{answer}\n").as_bytes())?;
    rustix::stdio::dup2_stdout(File::open("/dev/null")?.as_fd())?;
    let Some(mut network) = network else { return Ok(()) };
    // A console that is not read stops QEMU, so that no request delays it.
    let drained = tokio::spawn(async move {
        let mut buffer = vec![0; 16 << 10];
        loop {
            match console.read(&mut buffer).await {
                Ok(length) => log.write(&buffer[..length]),
                Err(error) => return error,
            }
        }
    });
    tokio::pin!(drained);
    loop {
        tokio::select! {
            // The only further event is end-of-file.
            _ = input.next_line() => return Ok(()),
            ended = &mut drained => return Err(ended.unwrap_or_else(io::Error::other)),
            accepted = listener.accept() => match accepted {
                // A broken client must not end the server.
                Ok((stream, _)) => {
                    let _ = tokio::time::timeout(PATIENCE, serve(stream, &mut network)).await;
                }
                // No descriptor is free just now, for instance.
                Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        }
    }
}

async fn serve(mut stream: UnixStream, network: &mut Network) -> io::Result<()> {
    let (read, mut write) = stream.split();
    let mut said = String::new();
    BufReader::new(read.take(MOST_TOLD)).read_line(&mut said).await?;
    let result = match serde_json::from_str::<Option<Vec<Inward>>>(&said)? {
        Some(ways) => network.lead(ways).await,
        None => Ok(()),
    };
    let answer = Answer::from(result.map(|()| network.holder()));
    write.write_all(serde_json::to_string(&answer)?.as_bytes()).await
}

/// A server's network.
struct Network {
    access: Access,
    users: Option<Arc<Namespaces>>,
    gateway: Option<Gateway>,
    ways: Vec<Inward>,
}

impl Network {
    async fn new(orders: Orders) -> Result<Self, Unreachable> {
        let Orders { access, ways } = orders;
        let users = match access.reach.all {
            true => None,
            false => Some(Arc::new(Namespaces::new(ids()).map_err(lost)?)),
        };
        let mut made = Self { access, users, gateway: None, ways: Vec::new() };
        made.lead(ways).await?;
        Ok(made)
    }

    fn holder(&self) -> Option<u32> {
        self.users.as_ref().map(|users| users.holder())
    }

    /// Replaces the forwarded ports. On an error it restores the previous ones.
    async fn lead(&mut self, ways: Vec<Inward>) -> Result<(), Unreachable> {
        let Some(users) = self.users.clone() else { return Ok(()) };
        if self.gateway.as_ref().is_some_and(Gateway::is_alive) && ways == self.ways {
            return Ok(());
        }
        for way in ways.iter().filter(|way| !self.ways.iter().any(|own| own.is_at(way))) {
            let start = Instant::now();
            while let Err(error) = listen(way) {
                if error.kind() == io::ErrorKind::PermissionDenied {
                    return Err(forbidden(way));
                }
                if start.elapsed() > LEAVING {
                    return Err(taken(&way.address, way.host));
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
        if let Some(gateway) = self.gateway.take() {
            gateway.end().await;
        }
        match open(&self.access, &users, &ways).await {
            Ok(gateway) => {
                (self.gateway, self.ways) = (Some(gateway), ways);
                Ok(())
            }
            Err(trouble) => {
                self.gateway = open(&self.access, &users, &self.ways).await.ok();
                Err(trouble)
            }
        }
    }
}

/// Tests whether this user may listen on a host port, and it is free.
fn listen(way: &Inward) -> io::Result<()> {
    let address = way.address.parse().unwrap_or(IpAddr::from([127, 0, 0, 1]));
    std::net::TcpListener::bind((address, way.host)).map(drop)
}

/// The error for a host port that needs rights.
fn forbidden(way: &Inward) -> Unreachable {
    Unreachable {
        message: format!("this user may not listen on port {} of {}", way.host, way.address),
        help: "give `forward` a `host=` of 1024 or more, or as root: \
               sysctl net.ipv4.ip_unprivileged_port_start=0"
            .into(),
    }
}

async fn open(access: &Access, users: &Arc<Namespaces>, ways: &[Inward]) -> Result<Gateway, Unreachable> {
    let gateway = access.gateway_in(users.clone(), ways).await?;
    gateway.set(true).await.map_err(lost)?;
    Ok(gateway)
}

/// The console log, with rotation.
struct Log {
    file: File,
    length: u64,
}

impl Log {
    fn open() -> io::Result<Self> {
        let file = File::options().create(true).append(true).open(LOGS[0])?;
        let length = file.metadata()?.len();
        Ok(Self { file, length })
    }

    /// Appends to the log. A full disk must not end the server.
    fn write(&mut self, bytes: &[u8]) {
        if self.length + bytes.len() as u64 > LOG {
            // After an error the next write tries again.
            let _ = std::fs::rename(LOGS[0], LOGS[1]);
            if let Ok(new) = Self::open() {
                *self = new;
            }
        }
        if self.length < LOG && self.file.write_all(bytes).is_ok() {
            self.length += bytes.len() as u64;
        }
    }
}

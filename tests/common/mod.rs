//! A provider whose machines are maps in memory. It takes the place of QEMU:
//! all of vimg above it is real, also the protocol of the agent.
//!
//! The state of a machine is a pure function of the requests to its agent and
//! of the blobs that it reads.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use futures_util::future::BoxFuture;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use vimg::base::{Base, Distribution, Wanted};
use vimg::disk::{DiskTool, Exported, Made};
use vimg::host::HostError;
use vimg::provider::{Ended, Instance, Launch, Place, Provider};
use vimg_agent::protocol::{
    self, Apply, Blob, Digest, Frame, FromAgent, Manifest, Node, Order, Primitive, Sealed, ToAgent,
};
use vimg_lang::model::DiskFormat;

pub(crate) type State = BTreeMap<String, String>;

#[derive(Default)]
pub(crate) struct Fake {
    pub(crate) launches: AtomicUsize,
    pub(crate) steps: Arc<AtomicUsize>,
    /// How many exports were made from earlier ones.
    pub(crate) revised: AtomicUsize,
    /// How many of the next machines hang while they boot.
    pub(crate) hanging: AtomicUsize,
    /// A file that each `run` reads although no recipe declares it.
    pub(crate) leak: Option<PathBuf>,
    /// Whether its bases have a kernel and an initrd.
    pub(crate) kernels: bool,
    /// Whether the disk of the host is full now.
    pub(crate) full: Option<Full>,
}

pub(crate) type Full = Arc<dyn Fn() -> bool + Send + Sync>;

impl Fake {
    /// The distributions that its recipes can name.
    pub(crate) fn distributions(&self) -> &'static [&'static dyn Distribution] {
        match self.kernels {
            true => &[&FakeDebian { kernels: true }],
            false => &[&FakeDebian { kernels: false }],
        }
    }

    fn is_full(&self) -> bool {
        self.full.as_ref().is_some_and(|full| full())
    }

    /// Writes a disk, unless the host's disk is full.
    fn write(&self, path: &Path, state: &State) -> Result<(), HostError> {
        let full = std::io::Error::from(std::io::ErrorKind::StorageFull);
        let written = if self.is_full() { Err(full) } else { write_state(path, state) };
        written.map_err(|e| HostError::io(path.display(), &e))
    }
}

pub(crate) struct FakeInstance {
    channel: Option<DuplexStream>,
    state: Arc<Mutex<State>>,
    overlay: PathBuf,
    place: Place,
    /// How it ended when it started, and the port of its agent, which says
    /// nothing then.
    stopped: Option<(Ended, DuplexStream)>,
}

/// Returns what precedes a state in its file: the header and the empty tables
/// of a small disk, for code that reads headers.
fn header() -> Vec<u8> {
    let mut bytes = vec![0; 2048];
    for (at, field) in [
        (0, &b"QFI\xfb"[..]),
        (4, &3_u32.to_be_bytes()),
        // Clusters of 512 bytes, one table for a disk of 32 KiB.
        (20, &9_u32.to_be_bytes()),
        (24, &32768_u64.to_be_bytes()),
        (36, &1_u32.to_be_bytes()),
        (40, &512_u64.to_be_bytes()),
        (48, &1024_u64.to_be_bytes()),
        (56, &1_u32.to_be_bytes()),
        (96, &4_u32.to_be_bytes()),
        (100, &112_u32.to_be_bytes()),
    ] {
        bytes[at..at + field.len()].copy_from_slice(field);
    }
    bytes
}

pub(crate) fn read_state(path: &Path) -> State {
    serde_json::from_slice(&std::fs::read(path).unwrap()[2048..]).unwrap()
}

fn write_state(path: &Path, state: &State) -> std::io::Result<()> {
    let mut bytes = header();
    bytes.extend(serde_json::to_vec(state).unwrap());
    std::fs::write(path, bytes)
}

impl Provider for Fake {
    type Instance = FakeInstance;

    async fn launch(&self, launch: &Launch) -> Result<FakeInstance, HostError> {
        self.launches.fetch_add(1, Ordering::Relaxed);
        let disk = if launch.again { &launch.overlay } else { launch.chain.last().unwrap() };
        let state = Arc::new(Mutex::new(read_state(disk)));
        // All its files must be there.
        let boot = launch.boot.iter().flat_map(|(kernel, initrd)| [kernel, initrd]);
        for file in launch.chain.iter().chain(boot) {
            std::fs::metadata(file).map_err(|e| HostError::io(file.display(), &e))?;
        }
        if launch.lasting.is_some() && !launch.again {
            self.write(&launch.overlay, &state.lock().unwrap())?;
        }
        let (host, guest) = tokio::io::duplex(1 << 20);
        let place = if launch.offline.is_some() { Place::Outside(None) } else { Place::Machine };
        let (channel, overlay) = (Some(host), launch.overlay.clone());
        let one_less = |n: usize| n.checked_sub(1);
        let hangs = || self.hanging.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_less).is_ok();
        let ended = match place {
            _ if self.is_full() => Some(Ended::HostDiskFull),
            Place::Machine if hangs() => Some(Ended::Hangs(150)),
            _ => None,
        };
        if let Some(ended) = ended {
            return Ok(FakeInstance { channel, state, overlay, place, stopped: Some((ended, guest)) });
        }
        let agent = Agent {
            channel: guest,
            state: state.clone(),
            leak: self.leak.clone(),
            steps: self.steps.clone(),
            memory: Vec::new(),
            // An appliance or container does not see the machine's hardware.
            machine: match launch.offline {
                Some(_) => "off".into(),
                None => format!("{} {}", launch.machine.cpus, launch.machine.memory),
            },
        };
        tokio::spawn(agent.serve());
        Ok(FakeInstance { channel, state, overlay, place, stopped: None })
    }
}

impl DiskTool for Fake {
    fn name(&self) -> String {
        "fake".into()
    }

    fn import<'a>(&'a self, disk: &'a Path, to: &'a Path) -> BoxFuture<'a, Result<(), HostError>> {
        let base = String::from_utf8_lossy(&std::fs::read(disk).unwrap()).into_owned();
        let written = self.write(to, &State::from([("base".to_owned(), base)]));
        Box::pin(std::future::ready(written))
    }

    fn flatten<'a>(&'a self, chain: &'a [PathBuf], to: &'a Path) -> BoxFuture<'a, Result<(), HostError>> {
        let copied = std::fs::copy(chain.last().unwrap(), to).map(|_| ());
        Box::pin(std::future::ready(copied.map_err(|e| HostError::io(to.display(), &e))))
    }

    fn export<'a>(
        &'a self,
        chain: &'a [PathBuf],
        format: DiskFormat,
        _size: Option<u64>,
        to: &'a Path,
    ) -> BoxFuture<'a, Result<(), HostError>> {
        Box::pin(std::future::ready(self.write(to, &exported(chain, format))))
    }

    fn alike<'a>(&'a self, _: &'a [PathBuf], a: &'a Made, b: &'a Made) -> BoxFuture<'a, bool> {
        Box::pin(std::future::ready(read_state(&a.disk) == read_state(&b.disk)))
    }

    fn revise<'a>(
        &'a self,
        chain: &'a [PathBuf],
        earlier: &'a Exported,
        copies: Vec<File>,
    ) -> BoxFuture<'a, Option<Vec<File>>> {
        let [now, before] = [chain, &earlier.chain].map(|chain| exported(chain, DiskFormat::Qcow2));
        for copy in &copies {
            let path = format!("/proc/self/fd/{}", copy.as_raw_fd());
            assert_eq!(read_state(Path::new(&path)), before);
            if write_state(Path::new(&path), &now).is_err() {
                return Box::pin(std::future::ready(None));
            }
        }
        self.revised.fetch_add(1, Ordering::SeqCst);
        Box::pin(std::future::ready(Some(copies)))
    }
}

/// A distribution whose disks say what was asked for.
pub(crate) struct FakeDebian {
    /// Whether its bases have a kernel and an initrd.
    kernels: bool,
}

impl Distribution for FakeDebian {
    fn name(&self) -> &'static str {
        "debian"
    }

    fn suites(&self) -> &'static [&'static str] {
        &["bookworm", "trixie"]
    }

    fn behaviour(&self) -> u32 {
        1
    }

    fn missing(&self) -> Option<HostError> {
        None
    }

    fn make<'a>(&'a self, wanted: Wanted<'a>) -> BoxFuture<'a, Result<Base, HostError>> {
        let disk = wanted.dir.join("base");
        let written = std::fs::write(&disk, format!("{:?} {}", wanted.bootstrap, wanted.size));
        let made = written.map_err(|e| HostError::io(disk.display(), &e));
        let boot = self.kernels.then(|| {
            let files = ["vmlinuz", "initrd"].map(|name| wanted.dir.join(name));
            files
                .iter()
                .for_each(|file| std::fs::write(file, file.file_name().unwrap().as_encoded_bytes()).unwrap());
            let [kernel, initrd] = files;
            (kernel, initrd)
        });
        Box::pin(std::future::ready(made.map(|()| Base { disk, boot, modules: None })))
    }
}

fn exported(chain: &[PathBuf], format: DiskFormat) -> State {
    let mut state = read_state(chain.last().unwrap());
    state.insert("format".into(), format.name().into());
    state
}

impl Instance for FakeInstance {
    type Channel = DuplexStream;

    fn runner(&self) -> String {
        "fake".into()
    }

    fn place(&self) -> Place {
        self.place.clone()
    }

    fn channel(&mut self) -> Option<DuplexStream> {
        self.channel.take()
    }

    async fn snapshot(&mut self, next: &Path) -> Result<(), HostError> {
        let written = write_state(&self.overlay, &self.state.lock().unwrap());
        written.map_err(|e| HostError::io(self.overlay.display(), &e))?;
        self.overlay = next.to_owned();
        Ok(())
    }

    async fn ended(&mut self) -> Ended {
        match &self.stopped {
            Some((ended, _)) => ended.clone(),
            None => std::future::pending().await,
        }
    }

    fn console_since(&self, _: u64) -> (u64, Vec<u8>) {
        (0, Vec::new())
    }

    async fn stop(self) {}
}

/// Records what a step has changed, as the agent's ledger does.
fn note(state: &mut State, page: &str, before: &State) {
    let changed: Vec<String> =
        state.keys().filter(|k| !k.starts_with("was ") && before.get(*k) != state.get(*k)).cloned().collect();
    for key in changed {
        let was = serde_json::to_string(&before.get(&key)).unwrap();
        state.entry(format!("was {page} {key}")).or_insert(was);
    }
}

/// Reverts the recorded changes of a layer.
fn revert(state: &mut State, layer: &str) {
    let prefix = format!("was {layer} ");
    let noted: Vec<(String, String)> =
        state.iter().filter(|(k, _)| k.starts_with(&prefix)).map(|(k, v)| (k.clone(), v.clone())).collect();
    for (note, was) in noted {
        let key = note[prefix.len()..].to_owned();
        match serde_json::from_str::<Option<String>>(&was).unwrap() {
            Some(was) => state.insert(key, was),
            None => state.remove(&key),
        };
        state.remove(&note);
    }
}

struct Agent {
    channel: DuplexStream,
    state: Arc<Mutex<State>>,
    leak: Option<PathBuf>,
    steps: Arc<AtomicUsize>,
    /// What scripts have left running, until the machine ends.
    memory: Vec<String>,
    machine: String,
}

impl Agent {
    async fn serve(mut self) -> Option<()> {
        let mut call = [0; 24];
        self.channel.read_exact(&mut call).await.ok()?;
        self.channel.write_all(&call).await.ok()?;
        let hello = FromAgent::Hello {
            protocol: protocol::PROTOCOL,
            behaviour: protocol::BEHAVIOUR,
            boot_id: "b".into(),
        };
        self.say(&hello).await?;
        self.say(&FromAgent::Ready { failed_units: vec![] }).await?;
        loop {
            match self.frame().await?.message::<ToAgent>().ok()? {
                ToAgent::Prepare(_) => self.say(&FromAgent::Prepared).await?,
                ToAgent::Apply(Apply { layer, steps, from: 0, offline, .. }) => {
                    let mut page = layer.unwrap_or_default();
                    for (step, order) in steps.iter().enumerate() {
                        self.say(&FromAgent::Started { step }).await?;
                        let before = self.state.lock().unwrap().clone();
                        match order {
                            Order::Layer { name } => page = name.clone(),
                            Order::Revert { layer } => self.change(|s| revert(s, layer)),
                            // Only servers switch layers over.
                            Order::Preinstall { .. } | Order::Leave { .. } => return None,
                            Order::Make(primitive) => {
                                if let Err(message) = self.apply(step, primitive).await? {
                                    self.say(&FromAgent::Failed {
                                        step,
                                        message,
                                        exit: Some(1),
                                        layer: None,
                                    })
                                    .await?;
                                    continue;
                                }
                                self.change(|s| note(s, &page, &before));
                            }
                        }
                        self.steps.fetch_add(1, Ordering::Relaxed);
                        self.say(&FromAgent::Finished { step, changed: true }).await?;
                    }
                    let machine = format!("{} {offline}", self.machine);
                    self.change(|s| s.insert("machine".into(), machine));
                    if self.machine == "off" {
                        self.memory.clear();
                    }
                    self.say(&FromAgent::Done { boot_changed: false }).await?;
                }
                ToAgent::Check { probes, .. } => {
                    for step in 0..probes.len() {
                        self.say(&FromAgent::Started { step }).await?;
                        self.say(&FromAgent::Finished { step, changed: false }).await?;
                    }
                    self.say(&FromAgent::Passed).await?;
                }
                ToAgent::Retarget { .. } => self.say(&FromAgent::Retargeted).await?,
                ToAgent::Rehearse { .. } => self.say(&FromAgent::Rehearsed).await?,
                ToAgent::Resume(_) => self.say(&FromAgent::Resumed).await?,
                ToAgent::PrepareSnapshot => self.say(&FromAgent::SnapshotReady).await?,
                ToAgent::Freeze => self.say(&FromAgent::Frozen).await?,
                ToAgent::Thaw => self.say(&FromAgent::Thawed).await?,
                ToAgent::Seal { .. } => {
                    self.change(|s| s.insert("sealed".into(), "yes".into()));
                    self.say(&FromAgent::Sealed(Sealed::default())).await?;
                }
                ToAgent::Exec(_) => self.say(&FromAgent::Exited { code: Some(0), signal: None }).await?,
                // The tests send none of these.
                ToAgent::Apply(_)
                | ToAgent::SwitchOff
                | ToAgent::List
                | ToAgent::Digests { .. }
                | ToAgent::SendBootFiles
                | ToAgent::Resize(_)
                | ToAgent::Network { .. }
                | ToAgent::EndInput => {
                    return None;
                }
            }
        }
    }

    fn change<T>(&self, f: impl FnOnce(&mut State) -> T) {
        f(&mut self.state.lock().unwrap());
    }

    async fn apply(&mut self, step: usize, primitive: &Primitive) -> Option<Result<(), String>> {
        match primitive {
            Primitive::File { path, content, mode, owner } => {
                let bytes = self.fetch(*content).await?;
                let text = format!("{mode:?} {owner:?} {}", Digest::of(&bytes));
                self.change(|s| s.insert(path.clone(), text));
            }
            Primitive::Directory { path, mode, owner, tree } => {
                self.change(|s| s.insert(path.clone(), format!("dir {mode:?} {owner:?}")));
                if let Some(tree) = tree {
                    let manifest: Manifest = serde_json::from_slice(&self.fetch(*tree).await?).unwrap();
                    for entry in manifest.entries {
                        let text = match entry.node {
                            Node::Dir(mode) => format!("dir {mode:o}"),
                            Node::Link(target) => format!("link {target}"),
                            Node::File(mode, blob, _) => {
                                format!("{mode:o} {}", Digest::of(&self.fetch(blob).await?))
                            }
                        };
                        self.change(|s| s.insert(format!("{path}/{}", entry.path), text));
                    }
                }
            }
            Primitive::Run(run) => {
                let script = self.fetch(run.script.content).await?;
                // A comment does nothing.
                let script = String::from_utf8_lossy(&script).into_owned();
                let script = script.split(" #").next().unwrap_or_default();
                if script.starts_with("fail") {
                    self.say(&FromAgent::Output { step, text: format!("tune: {script}\n") }).await?;
                    return Some(Err("exit code 1".into()));
                }
                let leaked = self.leak.as_ref().map(|path| std::fs::read(path).unwrap_or_default());
                // A script may read the whole machine, and what other scripts
                // left in memory.
                let before = serde_json::to_string(&*self.state.lock().unwrap()).unwrap();
                let text = format!(
                    "{:?}{script:?}{leaked:?}{:?}{:?}",
                    Digest::of(before.as_bytes()),
                    run.script.around.env,
                    self.memory,
                );
                self.memory.push(script.to_owned());
                self.change(|s| {
                    let n = s.keys().filter(|k| k.starts_with("run ")).count();
                    s.insert(format!("run {n:03}"), Digest::of(text.as_bytes()).to_string())
                });
            }
            other => self.change(|s| s.insert(format!("{other:?}"), String::new())),
        }
        Some(Ok(()))
    }

    async fn fetch(&mut self, blob: Blob) -> Option<Vec<u8>> {
        self.say(&FromAgent::Fetch { digests: vec![blob.digest] }).await?;
        let mut bytes = Vec::new();
        loop {
            let Frame::Data(data) = self.frame().await? else { return None };
            bytes.extend(data);
            if bytes.len() as u64 >= blob.size {
                assert_eq!(Digest::of(&bytes), blob.digest, "the host sent something else");
                return Some(bytes);
            }
        }
    }

    async fn say(&mut self, message: &FromAgent) -> Option<()> {
        self.channel.write_all(&protocol::encode_message(message).unwrap()).await.ok()
    }

    async fn frame(&mut self) -> Option<Frame> {
        let mut header = [0; 4];
        self.channel.read_exact(&mut header).await.ok()?;
        let mut body = vec![0; Frame::length(header).unwrap()];
        self.channel.read_exact(&mut body).await.ok()?;
        Some(Frame::from_body(body).unwrap())
    }
}

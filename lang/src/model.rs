//! What a recipe means: every image with its layers, every value rendered.
//! The model holds no template and no name that is still to be looked up.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::source::{FileRef, Span};
use crate::value::Value;

/// All images of a recipe, parents before children.
#[derive(Debug, Default)]
pub struct Model {
    /// The images.
    pub images: Vec<Image>,
    /// Machines that go on running.
    pub servers: Vec<Server>,
    /// What scripts are handed and nothing keeps.
    pub secrets: Vec<Secret>,
}

/// A value that only a script sees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Secret {
    /// Its name.
    pub name: String,
    /// Where it comes from.
    pub source: SecretSource,
    /// Enters keys in its place.
    pub version: String,
    /// Whether layers whose scripts are handed it may be sent to caches.
    pub cache: bool,
}

/// Where a secret comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SecretSource {
    /// A variable of vimg's environment.
    Env(String),
    /// A file of the host, relative to the project's root.
    File(String),
}

/// A machine that goes on running.
#[derive(Debug)]
pub struct Server {
    /// Its name, unique in the recipe, and no image's.
    pub name: String,
    /// Where it is declared.
    pub span: Span,
    /// The image that it starts from, by its index in [`Model::images`].
    pub image: usize,
    /// The machine.
    pub machine: Machine,
    /// What leads into it.
    pub forwards: Vec<Forward>,
    /// What the image has in effect.
    pub base: Vec<InEffect>,
    /// What is to be in effect.
    pub parts: Vec<InEffect>,
}

/// A TCP port of the host that leads to one of a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Forward {
    /// An address of the host.
    pub address: String,
    /// The host's port.
    pub host: u16,
    /// The machine's port.
    pub guest: u16,
}

/// A part that is in effect in a machine.
#[derive(Debug, Clone)]
pub struct InEffect {
    /// What is applied.
    pub part: Arc<Part>,
    /// Capabilities that it requires.
    pub requires: Vec<String>,
    /// Capabilities that it provides.
    pub provides: Vec<String>,
}

/// A named machine state and the way to it.
#[derive(Debug)]
pub struct Image {
    /// Its name, unique in the recipe.
    pub name: String,
    /// Where it is declared.
    pub span: Span,
    /// What it starts from.
    pub origin: Origin,
    /// Where that is said.
    pub origin_span: Span,
    /// The machine, complete.
    pub machine: Machine,
    /// The layers on top of the origin, lowest first.
    pub layers: Vec<Layer>,
    /// The disks to write.
    pub outputs: Vec<Output>,
    /// The image's own checks.
    pub checks: Vec<Check>,
}

/// What an image starts from.
#[derive(Debug, PartialEq, Eq)]
pub enum Origin {
    /// Another image, by its index in [`Model::images`], up to so many of its
    /// layers.
    Image(usize, usize),
    /// A new disk with a distribution.
    Bootstrap(Bootstrap),
    /// A disk that is there already.
    Disk {
        /// The file.
        file: FileRef,
        /// Its SHA-256 in lower-case hexadecimal.
        sha256: String,
    },
}

/// A new disk with a distribution.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bootstrap {
    /// `debian`.
    pub distribution: String,
    /// For instance `bookworm`.
    pub suite: String,
    /// A mirror other than the host's default.
    pub mirror: Option<String>,
    /// Packages beyond those that every base has, sorted.
    pub packages: Vec<String>,
}

/// The virtual machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Machine {
    /// Processors.
    pub cpus: u32,
    /// Main memory in bytes.
    pub memory: u64,
    /// Size of the disk in bytes.
    pub disk: u64,
}

impl Default for Machine {
    fn default() -> Self {
        Self { cpus: 2, memory: 1 << 30, disk: 8 << 30 }
    }
}

/// A step from one state of a machine to the next: a configuration is
/// applied, or some are taken back and others applied, as one.
#[derive(Debug)]
pub struct Layer {
    /// Unique in its image: the configuration's name, with `#2`, `#3` added
    /// where it is applied again.
    pub name: String,
    /// Where the layer is declared.
    pub span: Span,
    /// Parts of layers below that are taken back first, in this order, by
    /// their names in the machine.
    pub reverts: Vec<String>,
    /// What is applied, in order.
    pub parts: Vec<Arc<Part>>,
    /// Whether the machine must run meanwhile.
    pub booted: bool,
}

/// One application of a configuration.
#[derive(Debug, Clone)]
pub struct Part {
    /// Its name in the machine, unique there.
    pub id: String,
    /// The configuration's name.
    pub configuration: String,
    /// Where it is asked for.
    pub span: Span,
    /// What it does, in order.
    pub steps: Vec<Step>,
    /// The values that its templates read, by name. They are what explains a
    /// change; the steps hold what came of them.
    pub reads: BTreeMap<String, Value>,
    /// Whether the machine must run while it is applied.
    pub booted: bool,
    /// Checks of the configuration and of the capabilities it provides.
    pub checks: Vec<Check>,
}

/// One primitive and where it is declared.
#[derive(Debug, Clone)]
pub struct Step {
    /// What is to be.
    pub primitive: Primitive,
    /// Where that is said.
    pub span: Span,
}

/// Who owns a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owner {
    /// A user of the machine.
    pub user: String,
    /// A group of the machine.
    pub group: String,
}

/// What is in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// Text of the recipe.
    Text(String),
    /// What a template file of the project yields.
    Rendered(String, FileRef),
    /// A file of the project.
    File(FileRef),
}

/// A declared resource of a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields are those of the schema")]
pub enum Primitive {
    /// All packages of a configuration, sorted.
    Package { names: Vec<String> },
    /// A file. Without a mode it is 0644, or as the project's file is.
    File { path: String, content: Content, mode: Option<u32>, owner: Owner },
    /// A directory, 0755 unless a mode is given, with a tree in it or not.
    Directory { path: String, from: Option<FileRef>, mode: Option<u32>, owner: Owner },
    /// A symbolic link.
    Symlink { path: String, target: String },
    /// An unpacked archive.
    Archive { path: String, from: FileRef, strip: u32, owner: Owner },
    /// A group.
    Group { name: String, gid: Option<u32>, system: bool },
    /// A user.
    User {
        name: String,
        uid: Option<u32>,
        group: Option<String>,
        groups: Vec<String>,
        home: Option<String>,
        shell: Option<String>,
        comment: Option<String>,
        system: bool,
    },
    /// A service; the unit has its suffix.
    Service { unit: String, enabled: Option<bool>, state: Option<ServiceState> },
    /// A kernel setting.
    Sysctl { key: String, value: String },
    /// A module of the kernel.
    KernelModule { name: String },
    /// The machine is switched off in order and boots again.
    Reboot,
    /// A script that is run once.
    Run {
        script: Script,
        undo: Option<String>,
        /// Names and versions of secrets that it is handed.
        secrets: BTreeMap<String, String>,
    },
    /// A script that the machine keeps.
    Hook { when: When, script: Script },
}

/// A script and what it finds around it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Script {
    /// The script itself.
    pub content: Content,
    /// Variables of its environment.
    pub env: BTreeMap<String, String>,
    /// Who runs it.
    pub user: String,
    /// Where it runs.
    pub workdir: String,
    /// How long it may take, in seconds.
    pub timeout: u64,
    /// Whether it may use the network.
    pub network: bool,
}

/// When a kept script runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum When {
    /// Once the machine first lives on its own.
    FirstBoot,
    /// Each time that it boots.
    EachBoot,
    /// When it is given up.
    Decommission,
    /// When somebody asks for it by name.
    Operation(String),
}

/// What a service is to be now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ServiceState {
    /// Started if it is not.
    Running,
    /// Stopped if it is not.
    Stopped,
    /// Restarted in any case.
    Restarted,
}

/// A disk to write.
#[derive(Debug, Clone)]
pub struct Output {
    /// Its format.
    pub format: DiskFormat,
    /// Where, below the output directory; normalised.
    pub path: String,
    /// Where it is declared.
    pub span: Span,
}

/// A format of disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskFormat {
    /// qcow2, compressed with zstd.
    Qcow2,
    /// Raw and sparse.
    Raw,
}

impl DiskFormat {
    /// Its name in recipes.
    pub fn name(self) -> &'static str {
        match self {
            Self::Qcow2 => "qcow2",
            Self::Raw => "raw",
        }
    }
}

/// What must be true of the booted machine.
#[derive(Debug, Clone)]
pub struct Check {
    /// Its name.
    pub name: String,
    /// Where it is declared.
    pub span: Span,
    /// All of these must hold, in this order.
    pub probes: Vec<(Probe, Span)>,
}

/// One question to a machine. `within` says for how many seconds it is asked
/// again before no is taken for an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields are those of the schema")]
pub enum Probe {
    /// An HTTP request.
    Http {
        url: String,
        status: Option<u16>,
        contains: Option<String>,
        /// A header's name, and what its value must hold.
        header: Option<(String, String)>,
        within: u64,
    },
    /// A TCP port.
    Port { port: u16, within: u64 },
    /// A script, and how many seconds it may take.
    Run { script: String, timeout: u64, network: bool },
    /// A file.
    File { path: String, contains: Option<String> },
    /// A service.
    Service { unit: String, within: u64 },
    /// A package.
    Package(String),
}

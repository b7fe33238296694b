//! The model: a compiled recipe with all images and their layers. All templates are
//! rendered and all names resolved.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
pub use vimg_model::{Around, Owner, Probe, Run, ServiceState, User, When};

use crate::diagnostic::Diagnostic;
pub use crate::disk_format::DiskFormat;
use crate::source::{FileRef, Span};
use crate::value::Value;

/// All images of a recipe, parents before children.
#[derive(Debug, Default)]
pub struct Model {
    /// The images.
    pub images: Vec<Image>,
    /// The servers.
    pub servers: Vec<Server>,
    /// The secrets.
    pub secrets: Vec<Secret>,
    /// The parameters without a value; see [`Partial`](crate::Partial).
    pub open: Vec<String>,
    /// Warnings: probable mistakes that a build would not notice.
    pub warnings: Vec<Diagnostic>,
}

/// A value for scripts that vimg keeps out of keys, logs, disks and snapshots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Secret {
    /// Its name.
    pub name: String,
    /// The source of the value.
    pub source: SecretSource,
    /// Enters keys in place of the value.
    pub version: String,
    /// Whether vimg may send layers that use the secret to caches.
    pub cache: bool,
}

/// The source of a secret's value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SecretSource {
    /// A variable of vimg's environment.
    Env(String),
    /// A file of the host, relative to the project's root.
    File(String),
}

/// A machine that keeps running after vimg has ended.
#[derive(Debug)]
pub struct Server {
    /// Its name, unique among the servers and images of the recipe.
    pub name: String,
    /// The place of the declaration.
    pub span: Span,
    /// The index in [`Model::images`] of the image that it starts from.
    pub image: usize,
    /// The virtual machine.
    pub machine: Machine,
    /// Forwarded ports.
    pub forwards: Vec<Forward>,
    /// The place of each forwarded port in the recipe.
    pub places: Vec<Span>,
    /// The parts that are in effect in the image.
    pub base: Vec<InEffect>,
    /// The parts that are in effect in the server after `vimg apply`.
    pub parts: Vec<InEffect>,
}

/// A TCP port of the host that is forwarded to a port of a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Forward {
    /// IPv4 address on the host.
    pub address: String,
    /// Port on the host.
    pub host: u16,
    /// Port in the machine.
    pub guest: u16,
}

/// A part that is in effect in a machine.
#[derive(Debug, Clone)]
pub struct InEffect {
    /// The part.
    pub part: Arc<Part>,
    /// Capabilities that it requires.
    pub requires: Vec<String>,
    /// Capabilities that it provides.
    pub provides: Vec<String>,
}

/// An image: an origin, layers, checks and outputs.
#[derive(Debug)]
pub struct Image {
    /// Its name, unique in the recipe.
    pub name: String,
    /// The place of the declaration.
    pub span: Span,
    /// The origin.
    pub origin: Origin,
    /// The place of the origin in the recipe.
    pub origin_span: Span,
    /// The virtual machine, with all defaults and inherited values.
    pub machine: Machine,
    /// The layers on top of the origin, lowest first.
    pub layers: Vec<Layer>,
    /// The outputs.
    pub outputs: Vec<Output>,
    /// The image's own checks.
    pub checks: Vec<Check>,
    /// Whether it must have all its files, because it was asked for, or an image that
    /// starts from it; see [`Partial`](crate::Partial).
    pub needed: bool,
    /// Whether it has all its files, and the images below as well. If it does not,
    /// steps are missing from its layers.
    pub complete: bool,
}

/// The origin of an image: what it starts from.
#[derive(Debug, PartialEq, Eq)]
pub enum Origin {
    /// Another image: its index in [`Model::images`], and how many of its layers to
    /// take.
    Image(usize, usize),
    /// A new disk with a distribution.
    Bootstrap(Bootstrap),
    /// An existing disk.
    Disk {
        /// The file.
        file: FileRef,
        /// Its SHA-256 digest in lower-case hexadecimal.
        sha256: String,
    },
}

/// A new disk with a distribution.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bootstrap {
    /// The distribution: `debian`.
    pub distribution: String,
    /// The suite, for instance `bookworm`.
    pub suite: String,
    /// The URL of a mirror that replaces the host's default.
    pub mirror: Option<String>,
    /// The kernel.
    pub kernel: Kernel,
    /// Packages in addition to those of every base, sorted.
    pub packages: Vec<String>,
}

/// A kernel of a distribution.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kernel {
    /// The small one, with drivers for the hardware of clouds.
    #[default]
    Cloud,
    /// The one with all drivers.
    Generic,
}

impl Kernel {
    /// The words of recipes for [`Self::Cloud`] and [`Self::Generic`].
    pub const WORDS: &[&str] = &["cloud", "generic"];

    /// Returns the word of recipes.
    pub fn word(self) -> &'static str {
        match self {
            Self::Cloud => Self::WORDS[0],
            Self::Generic => Self::WORDS[1],
        }
    }

    /// Finds a kernel by its word.
    pub fn parse(word: &str) -> Option<Self> {
        [Self::Cloud, Self::Generic].into_iter().find(|kernel| kernel.word() == word)
    }
}

/// The virtual machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// Number of CPUs.
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

/// A layer: reverts parts of the layers below, if any, and then applies parts.
#[derive(Debug)]
pub struct Layer {
    /// Its name, unique in the image: the name of the configuration or
    /// `remove-CAPABILITY`, followed by `#2`, `#3` and so on for repeated names.
    pub name: String,
    /// The place of the declaration.
    pub span: Span,
    /// Ids of the parts to revert first, in this order.
    pub reverts: Vec<String>,
    /// The parts to apply, in order.
    pub parts: Vec<Arc<Part>>,
    /// Whether vimg must apply the layer in the booted machine.
    pub booted: bool,
}

/// A part: one application of a configuration.
#[derive(Debug, Clone)]
pub struct Part {
    /// Its name in the ledger, unique in the machine.
    pub id: String,
    /// The name of the configuration.
    pub configuration: String,
    /// The place of the `layer` or `replace` that applies it.
    pub span: Span,
    /// Its steps, in order.
    pub steps: Vec<Step>,
    /// The values that its templates read, by name. vimg explains changes with them;
    /// the steps contain the rendered results.
    pub reads: BTreeMap<String, Value>,
    /// Whether vimg must apply the part in the booted machine.
    pub booted: bool,
    /// Checks of the configuration and of the capabilities that it provides.
    pub checks: Vec<Check>,
}

/// A step: a primitive and the place of its declaration.
#[derive(Debug, Clone)]
pub struct Step {
    /// The primitive.
    pub primitive: Primitive,
    /// The place of the declaration.
    pub span: Span,
}

/// The content of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// Text from the recipe.
    Text(String),
    /// The rendered text of a template file, and that file.
    Rendered(String, FileRef),
    /// A file of the project.
    File(FileRef),
}

/// A secret that a script receives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SecretUse {
    /// Its name.
    pub name: String,
    /// The version of its value, which enters keys.
    pub version: String,
}

/// A primitive as a recipe says it: contents are texts and files of the project.
pub type Primitive = vimg_model::Primitive<Content, FileRef, SecretUse>;

/// A script as a recipe says it.
pub type Script = vimg_model::Script<Content>;

/// An output: a disk file to write.
#[derive(Debug, Clone)]
pub struct Output {
    /// The disk format.
    pub format: DiskFormat,
    /// Normalised path below the output directory.
    pub path: String,
    /// Size of the disk in bytes, if it is larger than that of the image.
    pub size: Option<u64>,
    /// Whether the agent stays on the disk.
    pub agent: bool,
    /// The place of the declaration.
    pub span: Span,
}

/// A check: conditions that the booted machine must meet.
#[derive(Debug, Clone)]
pub struct Check {
    /// Its name.
    pub name: String,
    /// The place of the declaration.
    pub span: Span,
    /// The probes, in order. All must succeed.
    pub probes: Vec<(Probe, Span)>,
}

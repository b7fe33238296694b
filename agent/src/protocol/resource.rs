//! The steps of layers and the probes of checks.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::blob::Blob;

/// The owner of a file, by names in the machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// A user.
    pub user: String,
    /// A group.
    pub group: String,
}

/// A tree of files, sorted by path: a directory comes before its entries.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Its entries. The first one has an empty path and is the top directory.
    pub entries: Vec<Entry>,
}

/// One file of a tree.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Relative to the top, without `..`.
    pub path: String,
    /// Its kind and content.
    pub node: Node,
}

/// The kind and content of an entry of a tree.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Node {
    /// A directory with its permission bits.
    Dir(u32),
    /// A file with its permission bits, content and extended attributes, whose values are
    /// in hexadecimal.
    File(u32, Blob, BTreeMap<String, String>),
    /// A symbolic link with its target.
    Link(String),
}

/// A primitive: a step that the agent applies. The fields are those of the recipe
/// language; contents are blobs that the agent requests.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[expect(missing_docs, reason = "the fields are those of the recipe language")]
pub enum Primitive {
    Package {
        names: Vec<String>,
    },
    File {
        path: String,
        content: Blob,
        mode: u32,
        owner: Owner,
    },
    Directory {
        path: String,
        mode: Option<u32>,
        owner: Owner,
        tree: Option<Blob>,
    },
    Symlink {
        path: String,
        target: String,
    },
    Archive {
        path: String,
        content: Blob,
        strip: u32,
        owner: Owner,
    },
    Group {
        name: String,
        gid: Option<u32>,
        system: bool,
    },
    User(User),
    Service {
        unit: String,
        enabled: Option<bool>,
        state: Option<ServiceState>,
    },
    Sysctl {
        key: String,
        value: String,
    },
    KernelModule {
        name: String,
    },
    Reboot,
    Run(Run),
    /// A hook or operation: a script that stays in the machine and runs later.
    Hook {
        /// `first-boot`, `each-boot`, `decommission` or `operation/NAME`.
        when: String,
        script: Script,
    },
    /// No resource: installs packages of the current layer, a new one, while the leaving
    /// layers still work. Their services start with the layer's own `Package`. Does
    /// nothing if the installation would remove other packages.
    Preinstall {
        names: Vec<String>,
        leaving: Vec<String>,
    },
    /// No resource: reverts layers, in this order, except for their packages, and stops
    /// the services of these packages; `Revert` does the rest. If packages could not be
    /// preinstalled, it reverts the layers completely.
    Leave {
        layers: Vec<String>,
        /// The paths of the new layers.
        paths: Vec<String>,
    },
    /// No resource: reverts a layer with its page of the ledger.
    Revert {
        layer: String,
    },
    /// No resource: names the layer of the steps that follow.
    Layer {
        name: String,
    },
}

/// A user. See the recipe language.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the fields are those of the recipe language")]
pub struct User {
    pub name: String,
    pub uid: Option<u32>,
    pub group: Option<String>,
    pub groups: Vec<String>,
    pub home: Option<String>,
    pub shell: Option<String>,
    pub comment: Option<String>,
    pub system: bool,
}

/// A script and its environment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Script {
    /// The script itself.
    pub content: Blob,
    /// Its environment.
    #[serde(flatten)]
    pub around: Around,
}

/// The environment of a script. See the recipe language.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Around {
    /// Environment variables.
    pub env: BTreeMap<String, String>,
    /// Name of the user that runs it.
    pub user: String,
    /// Working directory.
    pub workdir: String,
    /// Time limit in seconds.
    pub timeout: u64,
    /// Whether it may use the network.
    #[serde(default)]
    pub network: bool,
}

/// A script that runs once, when its layer is applied. See the recipe language.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the fields are those of the recipe language")]
pub struct Run {
    pub script: Script,
    pub undo: Option<String>,
    pub secrets: Vec<String>,
}

/// A probe of a check. See the recipe language; times are in seconds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[expect(missing_docs, reason = "the fields are those of the recipe language")]
pub enum Probe {
    Http {
        url: String,
        status: Option<u16>,
        contains: Option<String>,
        header: Option<(String, String)>,
        within: u64,
    },
    Port {
        port: u16,
        within: u64,
    },
    Run {
        script: String,
        timeout: u64,
    },
    File {
        path: String,
        contains: Option<String>,
    },
    Service {
        unit: String,
        within: u64,
    },
    Package {
        name: String,
    },
}

/// The state of a service after the step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ServiceState {
    /// Start the service if it does not run.
    Running,
    /// Stop the service if it runs.
    Stopped,
    /// Restart the service in any case.
    Restarted,
}

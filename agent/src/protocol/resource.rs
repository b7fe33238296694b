//! What a machine is to have, and what it is asked: the steps of a layer.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::blob::Blob;

/// Who owns a file, by names of the machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// A user.
    pub user: String,
    /// A group.
    pub group: String,
}

/// A tree of files, sorted by path; parents come before what is in them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Its entries. The first has an empty path and is the top itself.
    pub entries: Vec<Entry>,
}

/// One file of a tree.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Relative to the top, without `..`.
    pub path: String,
    /// What it is.
    pub node: Node,
}

/// What stands at a path of a tree.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Node {
    /// A directory with its permission bits.
    Dir(u32),
    /// A file with its permission bits, its content and its extended
    /// attributes, in hexadecimal.
    File(u32, Blob, BTreeMap<String, String>),
    /// A symbolic link and what it points to.
    Link(String),
}

/// A resource, as the agent makes it true. The fields are those of the
/// recipe language; contents are blobs that the agent asks for.
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
    /// A script that the machine keeps, for a time of its life or for whoever
    /// asks.
    Hook {
        /// `first-boot`, `each-boot`, `decommission` or `operation/NAME`.
        when: String,
        script: Script,
    },
    /// No resource: installs packages of the layer that was named, which is to
    /// come, while those that are to go still work. What they bring starts
    /// with the layer's own `Package`. Where anything would have to go for
    /// them, nothing is done.
    Preinstall {
        names: Vec<String>,
        leaving: Vec<String>,
    },
    /// No resource: takes layers back, in this order, up to their packages,
    /// whose services are stopped; `Revert` does the rest. If packages could
    /// not be installed ahead it takes all of them back.
    Leave {
        layers: Vec<String>,
        /// Where what comes will stand.
        paths: Vec<String>,
    },
    /// No resource: takes a layer back, by what the machine has noted of it.
    Revert {
        layer: String,
    },
    /// No resource: what follows is another layer's.
    Layer {
        name: String,
    },
}

/// See the recipe language.
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

/// A script, who runs it and where.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Script {
    /// The script itself.
    pub content: Blob,
    /// What it finds around it.
    #[serde(flatten)]
    pub around: Around,
}

/// What a script finds around it. See the recipe language.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Around {
    /// Variables of its environment.
    pub env: BTreeMap<String, String>,
    /// Who runs it.
    pub user: String,
    /// Where it runs.
    pub workdir: String,
    /// How long it may take, in seconds.
    pub timeout: u64,
    /// Whether it may use the network.
    #[serde(default)]
    pub network: bool,
}

/// A script that is run once. See the recipe language.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the fields are those of the recipe language")]
pub struct Run {
    pub script: Script,
    pub undo: Option<String>,
    pub secrets: Vec<String>,
}

/// A question to a machine that runs. See the recipe language; times are in
/// seconds.
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

/// What a service is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ServiceState {
    /// Started if it is not.
    Running,
    /// Stopped if it is not.
    Stopped,
    /// Restarted in any case.
    Restarted,
}

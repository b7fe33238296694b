//! Which nodes there are, where they may stand and what they take.
//!
//! This table drives the checks of [`crate::shape`] and the reference in
//! `docs/reference/language.md`; a node that is not in it does not exist.

use vimg_model::{ServiceState, When};

/// The type of an argument or property.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ty {
    /// A name: letters, digits, `-`, `_` and `.`; never a template.
    Name,
    /// Text; a template.
    Str,
    /// A whole number, or a template that yields one.
    Int,
    /// `#true` or `#false`.
    Bool,
    /// Bytes: `512MiB`, `8GiB`, or a number.
    Size,
    /// A time: `90s`, `10m`, `1h`.
    Duration,
    /// File permission bits in octal, as text: `"0644"`.
    Mode,
    /// An absolute path in the machine.
    GuestPath,
    /// A file or directory of the project.
    HostPath,
    /// One of a few words.
    Word(&'static [&'static str]),
    /// The name of a distribution that vimg knows.
    Distribution,
    /// The name of a suite of such a distribution.
    Suite,
    /// A string, number or boolean.
    Scalar,
}

/// A distribution that recipes can name.
#[derive(Debug, Clone, Copy)]
pub struct KnownDistribution {
    /// Its name.
    pub name: &'static str,
    /// The names of its suites.
    pub suites: &'static [&'static str],
}

impl Ty {
    /// Returns the words that a value can be, if it is one of a few.
    pub(crate) fn words(self, known: &[KnownDistribution]) -> Option<Vec<&'static str>> {
        match self {
            Ty::Word(words) => Some(words.to_vec()),
            Ty::Distribution => Some(known.iter().map(|one| one.name).collect()),
            Ty::Suite => Some(known.iter().flat_map(|one| one.suites).copied().collect()),
            _ => None,
        }
    }

    /// Names the type for people.
    pub fn describe(self) -> String {
        match self {
            Ty::Name => "a name".into(),
            Ty::Str => "a string".into(),
            Ty::Int => "an integer".into(),
            Ty::Bool => "`#true` or `#false`".into(),
            Ty::Size => "a size such as \"512MiB\"".into(),
            Ty::Duration => "a duration such as \"90s\"".into(),
            Ty::Mode => "a mode such as \"0644\"".into(),
            Ty::GuestPath => "an absolute path in the machine".into(),
            Ty::HostPath => "a path in the project".into(),
            Ty::Scalar => "a string, number or boolean".into(),
            Ty::Distribution => "the name of a distribution".into(),
            Ty::Suite => "the name of a suite".into(),
            Ty::Word(words) => alternatives(words),
        }
    }
}

/// Joins words that a value can be.
pub(crate) fn alternatives(words: &[&str]) -> String {
    let words: Vec<String> = words.iter().map(|word| format!("\"{word}\"")).collect();
    words.join(" or ")
}

/// An argument or property.
#[derive(Debug, Clone, Copy)]
pub struct Field {
    /// Its name; for arguments only shown.
    pub name: &'static str,
    /// Its type.
    pub ty: Ty,
    /// Whether it must be there.
    pub required: bool,
    /// One line for the reference.
    pub doc: &'static str,
}

/// The arguments a node takes.
#[derive(Debug, Clone, Copy)]
pub enum Args {
    /// None.
    None,
    /// At most one; exactly one if the field is required.
    One(Field),
    /// One or more.
    Many(Field),
}

/// The children a node takes.
#[derive(Debug, Clone, Copy)]
pub enum Children {
    /// None.
    None,
    /// Nodes of these kinds.
    Of(&'static [Kind]),
    /// Nodes whose names are inputs, and whose arguments are values.
    Inputs,
}

/// A kind of node in one place.
#[derive(Debug, Clone, Copy)]
pub struct Kind {
    /// The node's name.
    pub name: &'static str,
    /// What it is for, in a sentence or two for the reference.
    pub doc: &'static str,
    /// Its arguments.
    pub args: Args,
    /// Its properties.
    pub props: &'static [Field],
    /// Whether properties beyond `props` are taken, as inputs or variables.
    pub open_props: bool,
    /// Its children.
    pub children: Children,
    /// Whether it may stand more than once beside itself.
    pub many: bool,
}

const fn req(name: &'static str, ty: Ty, doc: &'static str) -> Field {
    Field { name, ty, required: true, doc }
}

const fn opt(name: &'static str, ty: Ty, doc: &'static str) -> Field {
    Field { name, ty, required: false, doc }
}

const fn kind(name: &'static str, doc: &'static str, args: Args) -> Kind {
    Kind { name, doc, args, props: &[], open_props: false, children: Children::None, many: true }
}

impl Kind {
    const fn props(self, props: &'static [Field]) -> Self {
        Self { props, ..self }
    }

    const fn open(self) -> Self {
        Self { open_props: true, ..self }
    }

    const fn of(self, kinds: &'static [Kind]) -> Self {
        Self { children: Children::Of(kinds), ..self }
    }

    const fn inputs(self) -> Self {
        Self { children: Children::Inputs, ..self }
    }

    const fn once(self) -> Self {
        Self { many: false, ..self }
    }
}

/// The words for an input's or parameter's type.
pub const INPUT_TYPES: &[&str] = &["string", "int", "bool", "size", "duration", "path", "list"];

const MODE: Field = opt("mode", Ty::Mode, "permission bits in octal");
const OWNER: Field = opt("owner", Ty::Str, "owning user [default: `root`]");
const GROUP: Field = opt("group", Ty::Str, "owning group [default: `root`]");

const INPUT: Kind = kind(
    "input",
    "A value that a layer passes to the configuration. An input without a default is required.",
    Args::One(req("name", Ty::Name, "the name that templates use")),
)
.props(&[
    opt("type", Ty::Word(INPUT_TYPES), "type of the value [default: `string`]"),
    opt("default", Ty::Scalar, "value if the layer passes none"),
])
.of(&[kind(
    "default",
    "The default of a `list`, one argument for each item.",
    Args::Many(req("item", Ty::Str, "an item")),
)
.once()]);

const WITHIN: Field = opt("within", Ty::Duration, "keep trying for this long [default: `30s`]");

const CHECK: Kind = kind(
    "check",
    "Conditions that the booted machine must meet. vimg runs checks in forks of the machine and throws the forks away. A check never changes the key of a state. vimg writes an output only after all checks of its image have passed.",
    Args::One(req("name", Ty::Name, "the name shown in reports")),
)
.of(&[
    kind("http", "An HTTP request from inside the machine. vimg does not follow redirects. For HTTPS, use `run`.", Args::One(req("url", Ty::Str, "the URL, for instance `http://localhost/`")))
        .props(&[
            opt("status", Ty::Int, "expected status code [default: any 2xx]"),
            opt("contains", Ty::Str, "text that the body must contain"),
            opt("header", Ty::Str, "`Name: text`: a response header and text that it must contain"),
            WITHIN,
        ]),
    kind("port", "A TCP port of the machine that must accept connections.", Args::One(req("port", Ty::Int, "the port number")))
        .props(&[WITHIN]),
    kind("run", "A script that must exit with 0. It runs under `/bin/sh -eu`.", Args::One(req("script", Ty::Str, "the script")))
        .props(&[opt("timeout", Ty::Duration, "time limit [default: `5m`]"), NETWORK]),
    kind("file", "A file that must exist.", Args::One(req("path", Ty::GuestPath, "the path of the file")))
        .props(&[opt("contains", Ty::Str, "text that the file must contain")]),
    kind("service", "A systemd unit that must be active.", Args::One(req("unit", Ty::Str, "the unit name")))
        .props(&[WITHIN]),
    kind("package", "A package that must be installed.", Args::One(req("name", Ty::Str, "the package name"))),
]);

const PACKAGE: Kind = kind(
    "package",
    "Packages of the distribution. vimg installs all packages of a configuration in one transaction, at the place of the first `package`. Packages that follow a script, or a step that changes the package manager's sources, get a transaction of their own.",
    Args::Many(req("name", Ty::Str, "a package name, as `apt-get install` takes it")),
);

const NEEDS: Kind = kind(
    "needs",
    "The state of the machine in which vimg applies the configuration. By default, vimg applies it offline, to the disk of a machine that is switched off: it enables services without starting them, and writes kernel settings for the next boot. `booted` applies the whole configuration in the booted machine, for steps that need running services or the machine's own kernel.",
    Args::One(req("what", Ty::Word(&["booted"]), "`booted`")),
)
.once();

const SCRIPT_FILE: Args = Args::One(opt("file", Ty::HostPath, "a script file of the project"));
const TEMPLATE: Field =
    opt("template", Ty::HostPath, "a template file of the project; the rendered text is the script");
const USER: Field = opt("user", Ty::Str, "user that runs the script [default: `root`]");
const WORKDIR: Field = opt("workdir", Ty::GuestPath, "working directory [default: `/`]");
const TIMEOUT: Field = opt("timeout", Ty::Duration, "time limit [default: `30m`]");
const NETWORK: Field = opt(
    "network",
    Ty::Bool,
    "allow network access [default: `#false`]; private networks also need the user's permission",
);
const INLINE: Kind =
    kind("script", "The text of the script.", Args::One(req("text", Ty::Str, "shell commands"))).once();
const ENV: Kind = kind("env", "Environment variables of the script, as properties.", Args::None).open();

const LATER: Kind = kind(
    "run",
    "A script, with the same environment as any other `run`. Several scripts run in order, up to the first that fails.",
    SCRIPT_FILE,
)
.props(&[TEMPLATE, USER, WORKDIR, TIMEOUT])
.of(&[INLINE, ENV]);

/// The nodes of a `configuration`.
pub const CONFIGURATION: &[Kind] = &[
    INPUT,
    kind("provides", "A capability that this configuration provides.", Args::One(req("capability", Ty::Name, "the name of the capability"))),
    kind(
        "requires",
        "A capability that a layer below must provide. Templates can read the inputs of the capability, with the values that the provider has.",
        Args::One(req("capability", Ty::Name, "the name of the capability")),
    ),
    NEEDS,
    PACKAGE,
    kind("file", "A file in the machine. Give exactly one of `content`, `template` and `from`. The default mode is 0755 for a project file or template that its owner may execute, and 0644 for everything else.", Args::One(req("path", Ty::GuestPath, "the path in the machine")))
        .props(&[
            opt("content", Ty::Str, "the text of the file"),
            opt("template", Ty::HostPath, "a template file of the project, rendered on the host"),
            opt("from", Ty::HostPath, "a file of the project, copied unchanged"),
            MODE,
            OWNER,
            GROUP,
        ]),
    kind(
        "directory",
        "A directory in the machine. The default mode is 0755. With `from`, vimg copies a tree of the project into it: files with mode 0755 if their owner may execute them and 0644 otherwise, set-id bits, capabilities, `user` attributes and symbolic links. Other files in the directory stay, and existing subdirectories keep their mode and owner. vimg leaves out sockets, FIFOs, the outputs of the recipe, and files that match a `.vimgignore` file (gitignore syntax).",
        Args::One(req("path", Ty::GuestPath, "the path in the machine")),
    )
    .props(&[opt("from", Ty::HostPath, "a directory of the project to copy"), MODE, OWNER, GROUP]),
    kind("symlink", "A symbolic link.", Args::One(req("path", Ty::GuestPath, "the path of the link")))
        .props(&[req("target", Ty::Str, "target of the link")]),
    kind("archive", "A tar archive of the project (plain, gz, xz or zst), unpacked into a directory.", Args::One(req("path", Ty::GuestPath, "the directory")))
        .props(&[
            req("from", Ty::HostPath, "the archive"),
            opt("strip", Ty::Int, "number of leading path components to drop [default: 0]"),
            OWNER,
            GROUP,
        ]),
    kind("group", "A group.", Args::One(req("name", Ty::Str, "the name of the group"))).props(&[
        opt("gid", Ty::Int, "numeric group id"),
        opt("system", Ty::Bool, "create a system group [default: `#false`]"),
    ]),
    kind("user", "A user. The groups that it names must exist.", Args::One(req("name", Ty::Str, "the name of the user"))).props(&[
        opt("uid", Ty::Int, "numeric user id"),
        opt("group", Ty::Str, "primary group [default: a group with the name of the user]"),
        opt("groups", Ty::Str, "supplementary groups, separated by commas"),
        opt("home", Ty::GuestPath, "home directory"),
        opt("shell", Ty::GuestPath, "login shell"),
        opt("comment", Ty::Str, "full name"),
        opt("system", Ty::Bool, "create a system user, which has a home directory only if `home=` names one [default: `#false`]"),
    ]),
    kind("service", "A systemd unit.", Args::One(req("unit", Ty::Str, "the unit name; `.service` may be left out"))).props(&[
        opt("enabled", Ty::Bool, "start the unit at boot"),
        opt("state", Ty::Word(ServiceState::WORDS), "state of the unit after this step; no effect offline, where `enabled` decides what the next boot starts"),
    ]),
    kind("sysctl", "A kernel setting. vimg sets it for each boot, and at once if the machine is running.", Args::One(req("key", Ty::Str, "the key, for instance `vm.swappiness`")))
        .props(&[req("value", Ty::Scalar, "value of the setting")]),
    kind("kernel-module", "A kernel module. It is loaded at each boot, and at once if the machine is running.", Args::One(req("name", Ty::Str, "the module name, for instance `br_netfilter`"))),
    kind("reboot", "Shuts the machine down cleanly and boots it again before the next step, with a new kernel if one was installed. A configuration with this step is applied in the booted machine, also without `needs`.", Args::None),
    kind(
        "run",
        "A script that runs once, when vimg builds the layer. Give exactly one of: a script file, `template`, a `script` child. A script without a `#!` line runs under `/bin/bash -euo pipefail`, or `/bin/sh -eu` if the machine has no bash, and stops at the first command that fails. A script with its own `#!` line goes on after errors unless it calls `set -e`. The environment is PATH, HOME, USER, LOGNAME, SHELL, LANG=C.UTF-8 and the variables in `env`; with `network=#true` also the user's proxy variables.",
        SCRIPT_FILE,
    )
    .props(&[TEMPLATE, USER, WORKDIR, TIMEOUT, NETWORK])
    .of(&[
        INLINE,
        ENV,
        kind("secret", "A secret. While the script runs, it can read the value from the file `/run/secrets/NAME`, which is in memory.", Args::One(req("name", Ty::Name, "the name of a declared `secret`"))),
        kind("undo", "A script that undoes what the script did. The agent runs it when it reverts the layer.", Args::One(req("text", Ty::Str, "shell commands"))).once(),
        NEEDS,
    ]),
    kind(
        "on",
        "Scripts that run in the finished machine, once its services are up. `first-boot` scripts run on the first start of a server, or on the boots of a written disk until they have succeeded once. `each-boot` scripts run on each boot. `decommission` scripts run when a server is removed. None of them runs while vimg builds or checks an image.",
        Args::One(req("when", Ty::Word(When::WORDS), "the event")),
    )
    .of(&[LATER]),
    kind(
        "operation",
        "Scripts that run on request: `vimg exec SERVER --operation NAME`. If several configurations have an operation with the same name, the scripts of all of them run, in the order of the layers.",
        Args::One(req("name", Ty::Name, "the name of the operation")),
    )
    .of(&[LATER]),
    CHECK,
];

const BY: Field = opt(
    "by",
    Ty::Word(&["revert", "rebuild"]),
    "`revert`: undo the recorded changes in the machine; `rebuild`: go back to the state below, and build the layers above again [default: `revert`]",
);

const LAYER: Kind = kind(
    "layer",
    "Applies a configuration. Properties and children are the inputs of the configuration.",
    Args::One(req("configuration", Ty::Name, "the name of the configuration")),
)
.open()
.inputs();

const REPLACE: Kind = kind(
    "replace",
    "Replaces the provider of a capability. vimg removes the old provider and all layers that require the capability, applies the new provider, and applies those layers again. Inputs of the capability keep their values unless you set them. Properties and children are inputs of the new provider.",
    Args::One(req("capability", Ty::Name, "the name of the capability")),
)
.open()
.inputs();

const REMOVE: Kind = kind(
    "remove",
    "Removes the provider of a capability. No other layer may require the capability.",
    Args::One(req("capability", Ty::Name, "the name of the capability")),
);

const WITH: Field = req("with", Ty::Name, "the configuration that becomes the new provider");

/// The nodes of a `server`.
pub const SERVER: &[Kind] = &[
    kind(
        "image",
        "The image that the server starts from.",
        Args::One(req("image", Ty::Name, "the name of the image")),
    )
    .once(),
    kind("forward", "Forwards a TCP port of the host to a port of the machine.", Args::None).props(&[
        req("host", Ty::Int, "port on the host"),
        req("guest", Ty::Int, "port in the machine"),
        opt("address", Ty::Str, "IPv4 address on the host [default: `127.0.0.1`]"),
    ]),
    LAYER,
    REPLACE.props(&[WITH]),
    REMOVE,
];

/// The nodes of an `image`.
pub const IMAGE: &[Kind] = &[
    kind("from", "The image to start from.", Args::One(req("image", Ty::Name, "the name of the image")))
        .once(),
    kind(
        "bootstrap",
        "Builds a base disk from the packages of a distribution.",
        Args::One(req("distribution", Ty::Distribution, "the distribution: `debian`")),
    )
    .props(&[
        req("suite", Ty::Suite, "release of the distribution, such as `bookworm` or `trixie`"),
        opt("mirror", Ty::Str, "`http://` or `https://` URL of a mirror that replaces the main archive; security updates still come from the security archive [default: the mirror that mmdebstrap uses on the host]"),
    ])
    .of(&[PACKAGE])
    .once(),
    kind(
        "disk",
        "Imports a disk that already contains the agent.",
        Args::One(req("file", Ty::HostPath, "a qcow2 or raw disk of the project")),
    )
    .props(&[req("sha256", Ty::Str, "SHA-256 digest of the file, in hexadecimal")])
    .once(),
    kind("machine", "The virtual machine. Properties that you leave out have the values of the image below.", Args::None)
        .props(&[
            opt("cpus", Ty::Int, "number of CPUs [default: 2]"),
            opt("memory", Ty::Size, "main memory [default: `1GiB`]"),
            opt("disk", Ty::Size, "size of the disk, set only in the image with `bootstrap` [default: `8GiB`]"),
        ])
        .once(),
    LAYER,
    REPLACE.props(&[WITH, BY]),
    REMOVE.props(&[BY]),
    kind(
        "output",
        "A disk file to write. It is sealed and boots on its own.",
        Args::One(req("format", Ty::Word(&["qcow2", "raw"]), "the disk format")),
    )
    .props(&[req("path", Ty::Str, "path below the output directory")]),
    CHECK,
];

/// The nodes of a recipe.
pub const RECIPE: &[Kind] = &[
    kind(
        "use",
        "Makes the declarations of another file available. A path is relative to this file, to the project root (`//...`) or to the standard library (`std/...`).",
        Args::One(req("file", Ty::HostPath, "the file")),
    ),
    kind(
        "param",
        "A value that the command line (`--set name=value`) or a values file can set.",
        Args::One(req("name", Ty::Name, "the name that templates use")),
    )
    .props(&[
        opt("type", Ty::Word(INPUT_TYPES), "type of the value [default: `string`]"),
        opt("default", Ty::Scalar, "value if nothing sets it"),
    ])
    .of(&[kind(
        "default",
        "The default of a `list`, one argument for each item.",
        Args::Many(req("item", Ty::Str, "an item")),
    )
    .once()]),
    kind(
        "capability",
        "A contract: inputs that each provider has, and checks that each provider must pass. Configurations provide and require capabilities.",
        Args::One(req("name", Ty::Name, "the name of the capability")),
    )
    .of(&[INPUT, CHECK]),
    kind(
        "configuration",
        "A named list of steps, with inputs. A layer applies it to a machine.",
        Args::One(req("name", Ty::Name, "the name of the configuration")),
    )
    .props(&[opt("provides", Ty::Name, "a capability that the configuration provides")])
    .of(CONFIGURATION),
    kind("image", "A machine image: what it starts from, and the layers on top.", Args::One(req("name", Ty::Name, "the name of the image")))
        .of(IMAGE),
    kind(
        "secret",
        "A value for scripts, which vimg keeps out of keys, logs, disks and memory snapshots. Give exactly one of `env` and `file`.",
        Args::One(req("name", Ty::Name, "the name of the secret")),
    )
    .props(&[
        opt("env", Ty::Str, "a variable in the environment of vimg"),
        opt("file", Ty::Str, "a file on the host; a relative path starts at the project root"),
        opt("version", Ty::Scalar, "enters the keys of layers in place of the value; change both together"),
        opt("cache", Ty::Bool, "allow vimg to send layers that use the secret to caches [default: `#false`]"),
    ]),
    kind(
        "server",
        "A machine that keeps running: an image, and layers that vimg applies to the running machine. `vimg up` starts it, and `vimg apply` updates it to the current recipe.",
        Args::One(req("name", Ty::Name, "the name of the server")),
    )
    .of(SERVER),
];

/// The whole table as a Markdown reference.
pub fn reference() -> String {
    let mut out = String::new();
    for kind in RECIPE {
        section(&mut out, kind, "###", "");
    }
    out
}

fn section(out: &mut String, kind: &Kind, heading: &str, within: &str) {
    let path = if within.is_empty() { kind.name.to_owned() } else { format!("{within} / {}", kind.name) };
    out.push_str(&format!(
        "{heading} `{path}`\n\n{}{}\n\n",
        kind.doc,
        if kind.many { "" } else { " At most once." }
    ));
    let mut rows = Vec::new();
    match kind.args {
        Args::None => {}
        Args::One(f) => rows.push((format!("argument *{}*", f.name), f)),
        Args::Many(f) => rows.push((format!("arguments *{}* ...", f.name), f)),
    }
    rows.extend(kind.props.iter().map(|f| (format!("`{}=`", f.name), *f)));
    if !rows.is_empty() {
        out.push_str("| | type | |\n| --- | --- | --- |\n");
        for (what, f) in rows {
            let need = if f.required { "required; " } else { "" };
            out.push_str(&format!("| {what} | {} | {need}{} |\n", f.ty.describe(), f.doc));
        }
        out.push('\n');
    }
    if let Children::Of(kinds) = kind.children {
        for child in kinds {
            section(out, child, if heading.len() < 5 { "####" } else { heading }, &path);
        }
    }
}

//! Which nodes there are, where they may stand and what they take.
//!
//! This table drives the checks of [`crate::shape`] and the reference in
//! `docs/language.md`; a node that is not in it does not exist.

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
    /// A string, number or boolean.
    Scalar,
}

impl Ty {
    /// Names the type for people.
    pub fn describe(self) -> String {
        match self {
            Ty::Name => "a name".into(),
            Ty::Str => "text".into(),
            Ty::Int => "a whole number".into(),
            Ty::Bool => "`#true` or `#false`".into(),
            Ty::Size => "a size such as \"512MiB\"".into(),
            Ty::Duration => "a duration such as \"90s\"".into(),
            Ty::Mode => "a mode such as \"0644\"".into(),
            Ty::GuestPath => "an absolute path in the machine".into(),
            Ty::HostPath => "a path in the project".into(),
            Ty::Scalar => "a string, number or boolean".into(),
            Ty::Word(words) => {
                let words: Vec<String> = words.iter().map(|w| format!("\"{w}\"")).collect();
                words.join(" or ")
            }
        }
    }
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
const OWNER: Field = opt("owner", Ty::Str, "user that owns it; `root` unless given");
const GROUP: Field = opt("group", Ty::Str, "group that owns it; `root` unless given");

const INPUT: Kind = kind(
    "input",
    "A value that each layer gives when it applies the configuration. Without a default it must be given.",
    Args::One(req("name", Ty::Name, "how templates call it")),
)
.props(&[
    opt("type", Ty::Word(INPUT_TYPES), "`string` unless given"),
    opt("default", Ty::Scalar, "the value when a layer gives none"),
])
.of(&[kind(
    "default",
    "The default of a `list`, as arguments.",
    Args::Many(req("item", Ty::Str, "an item")),
)
.once()]);

const WITHIN: Field = opt("within", Ty::Duration, "how long to go on asking; `30s` unless given");

const CHECK: Kind = kind(
    "check",
    "What must be true of the booted machine. Checks are made in forks of it that are thrown away. A check changes no key of a state. An output is written once the checks of its image have passed.",
    Args::One(req("name", Ty::Name, "shown in reports")),
)
.of(&[
    kind("http", "An HTTP request from inside the machine. Redirections are not followed.", Args::One(req("url", Ty::Str, "where to, for instance `http://localhost/`")))
        .props(&[
            opt("status", Ty::Int, "the status to expect; any 2xx unless given"),
            opt("contains", Ty::Str, "text that the body must hold"),
            opt("header", Ty::Str, "`Name: text`: a header of the answer, and text that it must hold"),
            WITHIN,
        ]),
    kind("port", "A TCP port of the machine that must accept connections.", Args::One(req("port", Ty::Int, "the port")))
        .props(&[WITHIN]),
    kind("run", "A shell script that must exit with 0.", Args::One(req("script", Ty::Str, "the script")))
        .props(&[opt("timeout", Ty::Duration, "time limit [default: `5m`]"), NETWORK]),
    kind("file", "A file that must exist.", Args::One(req("path", Ty::GuestPath, "the file")))
        .props(&[opt("contains", Ty::Str, "text that it must hold")]),
    kind("service", "A service that must be active.", Args::One(req("unit", Ty::Str, "the unit")))
        .props(&[WITHIN]),
    kind("package", "A package that must be installed.", Args::One(req("name", Ty::Str, "the package"))),
]);

const PACKAGE: Kind = kind(
    "package",
    "Packages of the distribution. All packages of a configuration are installed in one transaction, where the first of them stands; those after a script, or after a file that changes the package manager's sources, in one of their own.",
    Args::Many(req("name", Ty::Str, "a package, as `apt-get install` takes it")),
);

const NEEDS: Kind = kind(
    "needs",
    "What it takes to apply this. Without it everything is done offline, on the disk of a machine that is switched off: services are enabled and not started, kernel settings are written for the next boot. `booted` is for what needs running services or the machine's own kernel.",
    Args::One(req("what", Ty::Word(&["booted"]), "`booted`")),
)
.once();

const SCRIPT_FILE: Args = Args::One(opt("file", Ty::HostPath, "a script of the project"));
const TEMPLATE: Field =
    opt("template", Ty::HostPath, "a template file of the project that yields the script");
const USER: Field = opt("user", Ty::Str, "who runs it; `root` unless given");
const WORKDIR: Field = opt("workdir", Ty::GuestPath, "where it runs; `/` unless given");
const TIMEOUT: Field = opt("timeout", Ty::Duration, "how long it may take; `30m` unless given");
const NETWORK: Field = opt(
    "network",
    Ty::Bool,
    "allow network access [default: `#false`]; private networks also need the user's permission",
);
const INLINE: Kind =
    kind("script", "The script itself.", Args::One(req("text", Ty::Str, "shell commands"))).once();
const ENV: Kind = kind("env", "Variables of its environment, as properties.", Args::None).open();

const LATER: Kind = kind(
    "run",
    "A script of it, with the environment of any `run`. Where there are several, they run in their order, up to the first that fails.",
    SCRIPT_FILE,
)
.props(&[TEMPLATE, USER, WORKDIR, TIMEOUT])
.of(&[INLINE, ENV]);

/// The nodes of a `configuration`.
pub const CONFIGURATION: &[Kind] = &[
    INPUT,
    kind("provides", "A capability that this configuration provides.", Args::One(req("capability", Ty::Name, "its name"))),
    kind(
        "requires",
        "A capability that a layer below must provide. Its inputs can be read here, with the values that its provider was given.",
        Args::One(req("capability", Ty::Name, "its name")),
    ),
    NEEDS,
    PACKAGE,
    kind("file", "A file in the machine. Exactly one of `content`, `template` and `from` says what is in it.", Args::One(req("path", Ty::GuestPath, "where")))
        .props(&[
            opt("content", Ty::Str, "the text itself"),
            opt("template", Ty::HostPath, "a template file of the project, rendered on the host"),
            opt("from", Ty::HostPath, "a file of the project; its mode is 0755 if its owner may execute it, otherwise 0644"),
            MODE,
            OWNER,
            GROUP,
        ]),
    kind(
        "directory",
        "A directory in the machine. With `from` it holds a tree of the project: its files, with 0755 where their owner may execute them and 0644 elsewhere, set-id bits, capabilities and `user` attributes, and its links. What else is in it stays, and so do directories that are there already. What a `.vimgignore` file names (in gitignore's syntax), sockets, FIFOs, and the outputs of the recipe are left out.",
        Args::One(req("path", Ty::GuestPath, "where")),
    )
    .props(&[opt("from", Ty::HostPath, "a directory of the project"), MODE, OWNER, GROUP]),
    kind("symlink", "A symbolic link.", Args::One(req("path", Ty::GuestPath, "where")))
        .props(&[req("target", Ty::Str, "what it points to")]),
    kind("archive", "A tar archive of the project (plain, gz, xz or zst), unpacked into a directory.", Args::One(req("path", Ty::GuestPath, "the directory")))
        .props(&[
            req("from", Ty::HostPath, "the archive"),
            opt("strip", Ty::Int, "leading path components to drop; 0 unless given"),
            OWNER,
            GROUP,
        ]),
    kind("group", "A group.", Args::One(req("name", Ty::Str, "its name"))).props(&[
        opt("gid", Ty::Int, "its number"),
        opt("system", Ty::Bool, "a system group"),
    ]),
    kind("user", "A user. Groups that it names must exist.", Args::One(req("name", Ty::Str, "its name"))).props(&[
        opt("uid", Ty::Int, "its number"),
        opt("group", Ty::Str, "its primary group; one of its own name unless given"),
        opt("groups", Ty::Str, "further groups, separated by commas"),
        opt("home", Ty::GuestPath, "its home directory"),
        opt("shell", Ty::GuestPath, "its login shell"),
        opt("comment", Ty::Str, "its full name"),
        opt("system", Ty::Bool, "a system user, without a home unless given"),
    ]),
    kind("service", "A systemd service.", Args::One(req("unit", Ty::Str, "its name; `.service` may be left out"))).props(&[
        opt("enabled", Ty::Bool, "whether it starts at boot"),
        opt("state", Ty::Word(&["running", "stopped", "restarted"]), "what it is to be now; offline, at the next boot it is as `enabled` says"),
    ]),
    kind("sysctl", "A kernel setting at each boot, and now if the machine runs.", Args::One(req("key", Ty::Str, "for instance `vm.swappiness`")))
        .props(&[req("value", Ty::Scalar, "what to set it to")]),
    kind("kernel-module", "A module of the kernel, loaded at each boot, and now if the machine runs.", Args::One(req("name", Ty::Str, "for instance `br_netfilter`"))),
    kind("reboot", "Switches the machine off in order and boots it again, on a new kernel if there is one, before what follows. Such a configuration is applied to a booted machine; `needs` need not say so.", Args::None),
    kind(
        "run",
        "A script, run once when the layer is made: a file of the project, or text in a `script` child. Without a `#!` line it is run by `/bin/bash -euo pipefail`, or by `/bin/sh -eu` where there is no bash, and stops at the first command that fails; one with its own `#!` line says `set -e` itself. Its environment is PATH, HOME, LANG=C.UTF-8 and what `env` declares.",
        SCRIPT_FILE,
    )
    .props(&[TEMPLATE, USER, WORKDIR, TIMEOUT, NETWORK])
    .of(&[
        INLINE,
        ENV,
        kind("secret", "A secret that the script finds in the file `/run/secrets/NAME`, in memory, while it runs.", Args::One(req("name", Ty::Name, "as declared by `secret`"))),
        kind("undo", "A script that takes back what the script did.", Args::One(req("text", Ty::Str, "shell commands"))).once(),
        NEEDS,
    ]),
    kind(
        "on",
        "Scripts that the machine keeps and runs itself, once its services are up: `first-boot` in a disk that was written or a server, until they have passed once; `each-boot`; `decommission` when a server is removed. They do not run while an image is made or checked.",
        Args::One(req("when", Ty::Word(&["first-boot", "each-boot", "decommission"]), "when")),
    )
    .of(&[LATER]),
    kind(
        "operation",
        "Scripts that the machine keeps for whoever asks: `vimg exec SERVER --operation NAME`. Configurations may share a name; all run then, in the order of their layers.",
        Args::One(req("name", Ty::Name, "its name")),
    )
    .of(&[LATER]),
    CHECK,
];

const BY: Field = opt(
    "by",
    Ty::Word(&["revert", "rebuild"]),
    "`revert` (unless given): the machine takes the changes back, by what it has noted of them; `rebuild`: what stands on it is made again without it",
);

const LAYER: Kind = kind(
    "layer",
    "Applies a configuration. Properties and children are its inputs.",
    Args::One(req("configuration", Ty::Name, "its name")),
)
.open()
.inputs();

const REPLACE: Kind = kind(
    "replace",
    "Takes the configuration away that provides a capability, and all that require it; applies another one that provides it, and those again. Inputs of the capability that are not given stay as they are. Further properties and children are inputs of the new configuration.",
    Args::One(req("capability", Ty::Name, "its name")),
)
.open()
.inputs();

const REMOVE: Kind = kind(
    "remove",
    "Takes the configuration away that provides a capability. Nothing may require it.",
    Args::One(req("capability", Ty::Name, "its name")),
);

const WITH: Field = req("with", Ty::Name, "the configuration that takes its place");

/// The nodes of a `server`.
pub const SERVER: &[Kind] = &[
    kind("image", "The image that it starts from.", Args::One(req("image", Ty::Name, "its name"))).once(),
    kind("forward", "A TCP port of the host that leads to one of the machine.", Args::None).props(&[
        req("host", Ty::Int, "the host's port"),
        req("guest", Ty::Int, "the machine's port"),
        opt("address", Ty::Str, "the host's address; `127.0.0.1` unless given"),
    ]),
    LAYER,
    REPLACE.props(&[WITH]),
    REMOVE,
];

/// The nodes of an `image`.
pub const IMAGE: &[Kind] = &[
    kind("from", "The image that this one is made from.", Args::One(req("image", Ty::Name, "its name")))
        .once(),
    kind(
        "bootstrap",
        "Makes a base disk from a distribution's packages.",
        Args::One(req("distribution", Ty::Word(&["debian"]), "which")),
    )
    .props(&[
        req("suite", Ty::Word(&["bookworm", "trixie"]), "its release"),
        opt("mirror", Ty::Str, "the `http://` or `https://` address of a mirror, in the place of the archive's own service; security updates keep coming from theirs [default: what the host's mmdebstrap uses]"),
    ])
    .of(&[PACKAGE])
    .once(),
    kind(
        "disk",
        "Imports a disk that already holds the agent.",
        Args::One(req("file", Ty::HostPath, "a qcow2 or raw disk of the project")),
    )
    .props(&[req("sha256", Ty::Str, "the file's digest in hexadecimal")])
    .once(),
    kind("machine", "The virtual machine. What is left out is as in the image below.", Args::None)
        .props(&[
            opt("cpus", Ty::Int, "processors; 2 unless given"),
            opt("memory", Ty::Size, "main memory; `1GiB` unless given"),
            opt("disk", Ty::Size, "size of the disk; `8GiB` unless given; only where the disk is made"),
        ])
        .once(),
    LAYER,
    REPLACE.props(&[WITH, BY]),
    REMOVE.props(&[BY]),
    kind(
        "output",
        "A sealed disk that boots by itself.",
        Args::One(req("format", Ty::Word(&["qcow2", "raw"]), "its format")),
    )
    .props(&[req("path", Ty::Str, "where to write it, below the output directory")]),
    CHECK,
];

/// The nodes of a recipe.
pub const RECIPE: &[Kind] = &[
    kind(
        "use",
        "Makes the declarations of another file known here: relative to this file, from the project root (`//...`), or of the standard library (`std/...`).",
        Args::One(req("file", Ty::HostPath, "the file")),
    ),
    kind(
        "param",
        "A value that the command line (`--set name=value`) or a values file may give.",
        Args::One(req("name", Ty::Name, "how templates call it")),
    )
    .props(&[
        opt("type", Ty::Word(INPUT_TYPES), "`string` unless given"),
        opt("default", Ty::Scalar, "the value when none is given"),
    ])
    .of(&[kind(
        "default",
        "The default of a `list`, as arguments.",
        Args::Many(req("item", Ty::Str, "an item")),
    )
    .once()]),
    kind(
        "capability",
        "A contract that configurations can provide and require.",
        Args::One(req("name", Ty::Name, "its name")),
    )
    .of(&[INPUT, CHECK]),
    kind(
        "configuration",
        "A named bundle of what a machine is to have.",
        Args::One(req("name", Ty::Name, "its name")),
    )
    .props(&[opt("provides", Ty::Name, "a capability that it provides")])
    .of(CONFIGURATION),
    kind("image", "A machine state and the way to it.", Args::One(req("name", Ty::Name, "its name")))
        .of(IMAGE),
    kind(
        "secret",
        "A value that scripts are handed and that nothing keeps: no key, log, disk or memory. Exactly one of `env` and `file` says where it comes from.",
        Args::One(req("name", Ty::Name, "its name")),
    )
    .props(&[
        opt("env", Ty::Str, "a variable of vimg's environment"),
        opt("file", Ty::Str, "a file of the host; a relative path starts at the project's root"),
        opt("version", Ty::Scalar, "enters the keys of layers that use it, in its place: change it with the value"),
        opt("cache", Ty::Bool, "whether layers whose scripts are handed it may be sent to caches; they stay on this machine unless `#true`"),
    ]),
    kind(
        "server",
        "A machine that goes on running: an image's, and what is applied to it while it runs. `vimg up` starts it, `vimg apply` brings it to what the recipe says by then.",
        Args::One(req("name", Ty::Name, "its name")),
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

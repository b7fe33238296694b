//! Which nodes there are, where they may stand and what they take.
//!
//! This table drives the checks of `shape` and the reference in
//! `docs/reference/language.md`; a node that is not in it does not exist.

use crate::disk_format::DiskFormat;
use crate::elaborate::{self, NEEDS, NETWORK, PACKAGE};
use crate::kind::{kind, opt, req};
use crate::model::Kernel;

pub use crate::kind::{Args, Children, Field, INPUT_TYPES, Kind, KnownDistribution, Ty};

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
    kind("service", "A systemd unit that must be up. A service must also stay up, without a restart, until it has run for some seconds: half of the boot, 5 to 30 s. A `oneshot` service must have succeeded.", Args::One(req("unit", Ty::Str, "the unit name")))
        .props(&[WITHIN]),
    kind("package", "A package that must be installed.", Args::One(req("name", Ty::Str, "the package name"))),
]);

/// The nodes of a `configuration` before its steps.
const BEFORE: &[Kind] = &[
    INPUT,
    kind(
        "provides",
        "A capability that this configuration provides.",
        Args::One(req("capability", Ty::Name, "the name of the capability")),
    ),
    kind(
        "requires",
        "A capability that a layer below must provide. Templates can read the inputs of the capability, with the values that the provider has.",
        Args::One(req("capability", Ty::Name, "the name of the capability")),
    ),
    NEEDS,
];

/// The nodes of a `configuration`: the primitives stand where they are elaborated.
pub const CONFIGURATION: &[Kind] = &join::<{ BEFORE.len() + elaborate::PRIMITIVES.len() + 3 }>(&[
    BEFORE,
    &elaborate::PRIMITIVES,
    &[elaborate::ON, elaborate::OPERATION, CHECK],
]);

/// Joins lists of `N` kinds in all.
const fn join<const N: usize>(lists: &[&[Kind]]) -> [Kind; N] {
    let mut all = [CHECK; N];
    let (mut to, mut list) = (0, 0);
    while list < lists.len() {
        let mut from = 0;
        while from < lists[list].len() {
            all[to] = lists[list][from];
            to += 1;
            from += 1;
        }
        list += 1;
    }
    all
}

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
        opt("kernel", Ty::Word(Kernel::WORDS), "`cloud` is small, and has drivers for virtual hardware of clouds; `generic` has all drivers of the distribution [default: `cloud`]"),
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
            opt("disk", Ty::Size, "size of the disk. In an image on top of another one, it may be larger: its outputs have this size, and the root filesystem grows to it on the first boot [default: `8GiB`]"),
        ])
        .once(),
    LAYER,
    REPLACE.props(&[WITH, BY]),
    REMOVE.props(&[BY]),
    kind(
        "output",
        "A disk file to write. It is sealed and boots on its own.",
        Args::One(req("format", Ty::Word(DiskFormat::WORDS), "the disk format")),
    )
    .props(&[
        req("path", Ty::Str, "path below the output directory"),
        opt("size", Ty::Size, "size of the disk; the root filesystem grows to it on the first boot [default: that of the image]"),
        opt("agent", Ty::Bool, "whether the agent and its ledger stay on the disk. Hooks and operations need them [default: `#true`]"),
    ]),
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

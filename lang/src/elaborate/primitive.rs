//! The primitives of a configuration: what each takes in the language, and what it means.
//! A new one is a kind, a function and a line in the table.

use super::authorized_key::{is_complete, public_key};
use super::context::Elaborator;
use super::form;
use super::kernel_parameter;
use super::script::{ENV, INLINE, NEEDS, NETWORK, RUN_AS, SCRIPT_FILE, TEMPLATE, TIMEOUT, WORKDIR};
use crate::diagnostic::{Code, Diagnostic};
use crate::kind::{Args, Field, Kind, Ty, kind, opt, req};
use crate::model::{Content, Owner, Primitive, Run, ServiceState, User};
use crate::prescan::MAX_RECIPE;
use crate::resolve::At;
use crate::source::FileKind;
use crate::syntax::Scalar;
use crate::template::Scope;
use crate::value;

/// Reads a node of one kind.
pub(super) type Read = fn(&mut Elaborator<'_>, At, &Scope) -> Option<Primitive>;

/// The primitives: their nodes, and how each is read.
pub(super) const TABLE: &[(Kind, Read)] = &[
    (PACKAGE, |e, at, scope| e.package(at, scope)),
    (FILE, |e, at, scope| e.file(at, scope)),
    (DIRECTORY, |e, at, scope| e.directory(at, scope)),
    (SYMLINK, |e, at, scope| e.symlink(at, scope)),
    (ARCHIVE, |e, at, scope| e.archive(at, scope)),
    (GROUP, |e, at, scope| e.group(at, scope)),
    (USER, |e, at, scope| e.user(at, scope)),
    (AUTHORIZED_KEY, |e, at, scope| e.authorized_key(at, scope)),
    (SERVICE, |e, at, scope| e.service(at, scope)),
    (SYSCTL, |e, at, scope| e.sysctl(at, scope)),
    (KERNEL_MODULE, |e, at, scope| e.kernel_module(at, scope)),
    (KERNEL_PARAMETER, |e, at, scope| e.kernel_parameter(at, scope)),
    (REBOOT, |_, _, _| Some(Primitive::Reboot)),
    (RUN, |e, at, scope| e.run(at, scope)),
];

/// The nodes of [`TABLE`].
pub(crate) const PRIMITIVES: [Kind; TABLE.len()] = {
    let mut kinds = [PACKAGE; TABLE.len()];
    let mut n = 0;
    while n < kinds.len() {
        kinds[n] = TABLE[n].0;
        n += 1;
    }
    kinds
};

const MODE: Field = opt("mode", Ty::Mode, "permission bits in octal");
const OWNER: Field = opt("owner", Ty::Str, "owning user [default: `root`]");
const OWNER_GROUP: Field = opt("group", Ty::Str, "owning group [default: `root`]");

pub(crate) const PACKAGE: Kind = kind(
    "package",
    "Packages of the distribution. vimg installs all packages of a configuration in one transaction, at the place of the first `package`. Packages that follow a script, or a step that changes the package manager's sources, get a transaction of their own.",
    Args::Many(req("name", Ty::Str, "a package name, as `apt-get install` takes it")),
)
.props(&[opt("recommends", Ty::Bool, "also install the packages that these recommend [default: `#false`]")]);

impl Elaborator<'_> {
    fn package(&mut self, at: At, scope: &Scope) -> Option<Primitive> {
        let mut names = Vec::new();
        for arg in &at.node.args {
            names.push(self.parsed(arg, at, scope, package_name)?);
        }
        names.sort();
        names.dedup();
        let recommends = match self.prop_bool(at, "recommends", scope) {
            Some(true) => names.clone(),
            Some(false) | None => Vec::new(),
        };
        Some(Primitive::Package { names, recommends })
    }
}

const FILE: Kind = kind("file", "A file in the machine. Give exactly one of `content`, `template` and `from`. The default mode is 0755 for a project file or template that its owner may execute, and 0644 for everything else.", Args::One(req("path", Ty::GuestPath, "the path in the machine")))
    .props(&[
        opt("content", Ty::Str, "the text of the file"),
        opt("template", Ty::HostPath, "a template file of the project, rendered on the host"),
        opt("from", Ty::HostPath, "a file of the project, copied unchanged"),
        MODE,
        OWNER,
        OWNER_GROUP,
    ]);

impl Elaborator<'_> {
    fn file(&mut self, at: At, scope: &Scope) -> Option<Primitive> {
        let path = self.guest_path(at.node.args.first()?, at, scope);
        let sources: Vec<&str> =
            ["content", "template", "from"].into_iter().filter(|p| at.node.prop(p).is_some()).collect();
        let content = match sources.as_slice() {
            ["content"] => self.prop_text(at, "content", scope).map(Content::Text),
            ["template"] => self.rendered(at.node.prop("template")?, at, scope),
            [_] => self.host_path(at.node.prop("from")?, at, scope, FileKind::File).map(Content::File),
            [] => {
                self.out.push(
                    Diagnostic::error(Code::Missing, at.head(), "this file has no content")
                        .help("add one of `content=`, `template=` and `from=`"),
                );
                None
            }
            [first, second, ..] => {
                let message = format!("`{first}` and `{second}` can't be combined");
                self.out.push(Diagnostic::error(Code::Conflict, at.head(), message).help("keep one of them"));
                None
            }
        };
        let mode = self.mode(at, scope);
        let owner = self.owner(at, scope);
        let (path, content) = (path?, content?);
        self.form(at, &path, &content, (mode, &owner));
        Some(Primitive::File { path, content, mode, owner })
    }

    /// Warns of a file that a program of the machine would ignore.
    fn form(&mut self, at: At, path: &str, content: &Content, (mode, owner): (Option<u32>, &Owner)) {
        let read;
        // A file of the project has a mode of its own.
        let (text, default) = match content {
            Content::Text(text) => (Some(text.as_bytes()), Some(0o644)),
            Content::Rendered(text, _) => (Some(text.as_bytes()), None),
            Content::File(file) if form::needs_newline(path) => {
                read = self.files.read(file, MAX_RECIPE).ok();
                (read.as_deref(), None)
            }
            Content::File(_) => (None, None),
        };
        for ignored in form::ignored(path, text, mode.or(default), owner) {
            let warning = Diagnostic::warning(Code::IgnoredFile, at.head(), ignored.message);
            self.warnings.push(warning.help(ignored.help));
        }
    }
}

const DIRECTORY: Kind = kind(
    "directory",
    "A directory in the machine. The default mode is 0755. With `from`, vimg copies a tree of the project into it: files with mode 0755 if their owner may execute them and 0644 otherwise, set-id bits, capabilities, `user` attributes and symbolic links. Other files in the directory stay, and existing subdirectories keep their mode and owner. vimg leaves out sockets, FIFOs, the outputs of the recipe, and files that match a `.vimgignore` file (gitignore syntax).",
    Args::One(req("path", Ty::GuestPath, "the path in the machine")),
)
.props(&[opt("from", Ty::HostPath, "a directory of the project to copy"), MODE, OWNER, OWNER_GROUP]);

impl Elaborator<'_> {
    fn directory(&mut self, at: At, scope: &Scope) -> Option<Primitive> {
        let path = self.guest_path(at.node.args.first()?, at, scope)?;
        let tree = match at.node.prop("from") {
            Some(arg) => Some(self.host_path(arg, at, scope, FileKind::Directory)?),
            None => None,
        };
        Some(Primitive::Directory { path, tree, mode: self.mode(at, scope), owner: self.owner(at, scope) })
    }
}

const SYMLINK: Kind =
    kind("symlink", "A symbolic link.", Args::One(req("path", Ty::GuestPath, "the path of the link")))
        .props(&[req("target", Ty::Str, "target of the link")]);

impl Elaborator<'_> {
    fn symlink(&mut self, at: At, scope: &Scope) -> Option<Primitive> {
        Some(Primitive::Symlink {
            path: self.guest_path(at.node.args.first()?, at, scope)?,
            target: self.prop_text(at, "target", scope)?,
        })
    }
}

const ARCHIVE: Kind = kind(
    "archive",
    "A tar archive of the project (plain, gz, xz or zst), unpacked into a directory.",
    Args::One(req("path", Ty::GuestPath, "the directory")),
)
.props(&[
    req("from", Ty::HostPath, "the archive"),
    opt("strip", Ty::Int, "number of leading path components to drop [default: 0]"),
    OWNER,
    OWNER_GROUP,
]);

impl Elaborator<'_> {
    fn archive(&mut self, at: At, scope: &Scope) -> Option<Primitive> {
        let path = self.guest_path(at.node.args.first()?, at, scope)?;
        let content = Content::File(self.host_path(at.node.prop("from")?, at, scope, FileKind::File)?);
        let strip = match at.node.prop("strip") {
            Some(arg) => self.ranged(arg, at, scope, 0, 64)? as u32,
            None => 0,
        };
        Some(Primitive::Archive { path, content, strip, owner: self.owner(at, scope) })
    }
}

const GROUP: Kind = kind("group", "A group.", Args::One(req("name", Ty::Str, "the name of the group")))
    .props(&[
        opt("gid", Ty::Int, "numeric group id"),
        opt("system", Ty::Bool, "create a system group [default: `#false`]"),
    ]);

impl Elaborator<'_> {
    fn group(&mut self, at: At, scope: &Scope) -> Option<Primitive> {
        Some(Primitive::Group {
            name: self.account(at, scope)?,
            gid: self.prop_id(at, "gid", scope),
            system: self.prop_bool(at, "system", scope).unwrap_or(false),
        })
    }
}

const USER: Kind = kind(
    "user",
    "A user. The groups that it names must exist.",
    Args::One(req("name", Ty::Str, "the name of the user")),
)
.props(&[
    opt("uid", Ty::Int, "numeric user id"),
    opt("group", Ty::Str, "primary group [default: a group with the name of the user]"),
    opt("groups", Ty::Str, "supplementary groups, separated by commas"),
    opt("home", Ty::GuestPath, "home directory"),
    opt("shell", Ty::GuestPath, "login shell"),
    opt("comment", Ty::Str, "full name"),
    opt(
        "system",
        Ty::Bool,
        "create a system user, which has a home directory only if `home=` names one [default: `#false`]",
    ),
]);

impl Elaborator<'_> {
    fn user(&mut self, at: At, scope: &Scope) -> Option<Primitive> {
        let name = self.account(at, scope)?;
        let groups = self.prop_text(at, "groups", scope).unwrap_or_default();
        let mut path = |name: &str| at.node.prop(name).and_then(|arg| self.guest_path(arg, at, scope));
        let (home, shell) = (path("home"), path("shell"));
        Some(Primitive::User(User {
            name,
            uid: self.prop_id(at, "uid", scope),
            group: self.prop_text(at, "group", scope),
            groups: groups.split(',').map(str::trim).filter(|g| !g.is_empty()).map(str::to_owned).collect(),
            home,
            shell,
            comment: self.prop_text(at, "comment", scope),
            system: self.prop_bool(at, "system", scope).unwrap_or(false),
        }))
    }
}

const AUTHORIZED_KEY: Kind = kind(
    "authorized-key",
    "A public key with which a user can log in by SSH: a line of `.ssh/authorized_keys` in the user's home. Other keys of the user stay. A revert removes only this line.",
    Args::One(req("user", Ty::Str, "the name of the user")),
)
.props(&[req("key", Ty::Str, "the line of the key, as in the `.pub` file; options may come first")]);

impl Elaborator<'_> {
    fn authorized_key(&mut self, at: At, scope: &Scope) -> Option<Primitive> {
        let user = self.account(at, scope)?;
        let arg = at.node.prop("key")?;
        let key = self.parsed(arg, at, scope, public_key)?;
        if !is_complete(&key) {
            let message = "sshd ignores this key: a part of it is missing or was changed";
            let warning = Diagnostic::warning(Code::IgnoredKey, at.span(&arg.range), message);
            self.warnings.push(warning.help("copy it again from the `.pub` file"));
        }
        Some(Primitive::AuthorizedKey { user, key })
    }
}

const SERVICE: Kind = kind("service", "A systemd unit of any type.", Args::One(req("unit", Ty::Str, "the unit name, such as `nginx`, `openvpn@office` or `fstrim.timer`; a name without a type is that of a `.service`"))).props(&[
    opt("enabled", Ty::Bool, "start the unit at boot; `#true` also unmasks it. A unit that is disabled can still be started by another unit, a socket or D-Bus"),
    opt("masked", Ty::Bool, "mask the unit, so that nothing can start it, or unmask it. The unit need not exist yet"),
    opt("state", Ty::Word(ServiceState::WORDS), "state of the unit after this step; no effect offline, where `enabled` decides what the next boot starts"),
]);

impl Elaborator<'_> {
    fn service(&mut self, at: At, scope: &Scope) -> Option<Primitive> {
        let unit = self.parsed(at.node.args.first()?, at, scope, unit_name)?;
        let state = match self.prop_text(at, "state", scope) {
            Some(word) => {
                let state = ServiceState::parse(&word);
                if state.is_none() {
                    let span = at.node.prop("state").map_or_else(|| at.head(), |a| at.span(&a.range));
                    self.out.push(
                        Diagnostic::error(Code::InvalidValue, span, format!("invalid state `{word}`"))
                            .suggest(&word, ServiceState::WORDS.iter().copied()),
                    );
                }
                Some(state?)
            }
            None => None,
        };
        let [enabled, masked] = ["enabled", "masked"].map(|name| self.prop_bool(at, name, scope));
        if masked == Some(true)
            && (enabled == Some(true) || state.is_some_and(|s| s != ServiceState::Stopped))
        {
            let span = at.node.prop("masked").map_or_else(|| at.head(), |a| at.span(&a.range));
            let help = "nothing can start a masked unit: leave out `masked`, or the other property";
            self.out.push(
                Diagnostic::error(Code::Conflict, span, "this unit is masked and started at the same time")
                    .help(help),
            );
        }
        Some(Primitive::Service { unit, enabled, masked, state })
    }
}

const SYSCTL: Kind = kind(
    "sysctl",
    "A kernel setting. vimg sets it for each boot, and at once if the machine is running.",
    Args::One(req("key", Ty::Str, "the key, for instance `vm.swappiness`")),
)
.props(&[req("value", Ty::Scalar, "value of the setting")]);

impl Elaborator<'_> {
    fn sysctl(&mut self, at: At, scope: &Scope) -> Option<Primitive> {
        let key = self.parsed(at.node.args.first()?, at, scope, |t| {
            let good = !t.is_empty() && t.chars().all(|c| c.is_ascii_alphanumeric() || "._-/".contains(c));
            let help = "expected words with dots between them, such as `vm.swappiness`";
            if good { Ok(t.to_owned()) } else { Err(help.into()) }
        })?;
        let arg = at.node.prop("value")?;
        let value = match &arg.value {
            Scalar::Int(n) => n.to_string(),
            Scalar::Bool(b) => u8::from(*b).to_string(),
            _ => self.parsed(arg, at, scope, |t| {
                if t.contains('\n') { Err("expected a single line".into()) } else { Ok(t.to_owned()) }
            })?,
        };
        Some(Primitive::Sysctl { key, value })
    }
}

const KERNEL_MODULE: Kind = kind(
    "kernel-module",
    "A kernel module. It is loaded at each boot, and at once if the machine is running.",
    Args::One(req("name", Ty::Str, "the module name, for instance `br_netfilter`")),
);

impl Elaborator<'_> {
    fn kernel_module(&mut self, at: At, scope: &Scope) -> Option<Primitive> {
        let name = self.parsed(at.node.args.first()?, at, scope, |t| {
            let good = !t.is_empty() && t.chars().all(|c| c.is_ascii_alphanumeric() || "_-".contains(c));
            if good { Ok(t.to_owned()) } else { Err("expected letters, digits, `-` and `_`".into()) }
        })?;
        Some(Primitive::KernelModule { name })
    }
}

const KERNEL_PARAMETER: Kind = kind(
    "kernel-parameter",
    "Words of the kernel's command line. They are in effect from the next boot on: in layers above that need the booted machine, in checks, shells and servers, and on the disks that vimg writes. In the layer itself, they are in effect after a `reboot`. Words of later layers come after those of earlier ones. Appliances and containers have a kernel of their own, without these words.",
    Args::Many(req(
        "parameter",
        Ty::Str,
        "a parameter, for instance `mitigations=off`; the kernel's documentation lists them",
    )),
);

impl Elaborator<'_> {
    fn kernel_parameter(&mut self, at: At, scope: &Scope) -> Option<Primitive> {
        let mut words = Vec::new();
        for arg in &at.node.args {
            words.push(self.parsed(arg, at, scope, kernel_parameter::word)?);
        }
        Some(Primitive::KernelParameter { words })
    }
}

const REBOOT: Kind = kind(
    "reboot",
    "Shuts the machine down cleanly and boots it again before the next step, with a new kernel if one was installed. A configuration with this step is applied in the booted machine, also without `needs`.",
    Args::None,
);

const RUN: Kind = kind(
    "run",
    "A script that runs once, when vimg builds the layer. Give exactly one of: a script file, `template`, a `script` child. A script without a `#!` line runs under `/bin/bash -euo pipefail`, or `/bin/sh -eu` if the machine has no bash, stops at the first command that fails, and prints its line. A script with its own `#!` line goes on after errors unless it calls `set -e`. The environment is PATH, HOME, USER, LOGNAME, SHELL, LANG=C.UTF-8 and the variables in `env`; with `network=#true` also the user's proxy variables.",
    SCRIPT_FILE,
)
.props(&[TEMPLATE, RUN_AS, WORKDIR, TIMEOUT, NETWORK])
.of(&[
    INLINE,
    ENV,
    kind("secret", "A secret. While the script runs, it can read the value from the file `/run/secrets/NAME`, which is in memory.", Args::One(req("name", Ty::Name, "the name of a declared `secret`"))),
    kind("undo", "A script that undoes what the script did. The agent runs it when it reverts the layer.", Args::One(req("text", Ty::Str, "shell commands"))).once(),
    NEEDS,
]);

impl Elaborator<'_> {
    fn run(&mut self, at: At, scope: &Scope) -> Option<Primitive> {
        let script = self.script(at, scope)?;
        let undo = match at.child("undo") {
            Some(node) => Some(self.text(node.node.args.first()?, node, scope)?),
            None => None,
        };
        Some(Primitive::Run(Run { script, undo, secrets: self.handed(at) }))
    }
}

impl Elaborator<'_> {
    fn account(&mut self, at: At, scope: &Scope) -> Option<String> {
        self.parsed(at.node.args.first()?, at, scope, |t| {
            let good = !t.is_empty()
                && t.len() <= 32
                && t.starts_with(|c: char| c.is_ascii_lowercase() || c == '_')
                && t.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || "_-".contains(c));
            let help = "expected 1 to 32 lower-case letters, digits, `-` and `_`, with no digit first";
            if good { Ok(t.to_owned()) } else { Err(help.into()) }
        })
    }

    fn owner(&mut self, at: At, scope: &Scope) -> Owner {
        let mut prop = |name| self.prop_text(at, name, scope).unwrap_or_else(|| "root".into());
        Owner { user: prop("owner"), group: prop("group") }
    }

    fn mode(&mut self, at: At, scope: &Scope) -> Option<u32> {
        self.parsed(at.node.prop("mode")?, at, scope, value::mode)
    }
}

/// Checks a package name: `name`, `name:arch`, `name=version` or `name/suite`, and never
/// an option of apt-get.
pub(super) fn package_name(text: &str) -> Result<String, String> {
    // For apt, `-` or `+` after a name means: remove or install this package.
    let ordered = text.ends_with(['-', '+']) && !text.ends_with("++");
    let good = text.starts_with(|c: char| c.is_ascii_alphanumeric()) && text.len() <= 200 && !ordered;
    let plain = text.chars().all(|c| c.is_ascii_alphanumeric() || "+-.:=~/_".contains(c));
    if good && plain {
        Ok(text.to_owned())
    } else {
        Err("expected a package name, optionally with `=VERSION`, `/SUITE` or `:ARCH`".into())
    }
}

fn unit_name(text: &str) -> Result<String, String> {
    let good = text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || ":-_.\\@".contains(c));
    if !good {
        return Err("expected a unit name: letters, digits and `:-_.\\@`".into());
    }
    Ok(vimg_model::unit(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_never_options() {
        assert!(package_name("nginx-light").is_ok());
        assert!(package_name("libstdc++6=12.2.0-14~x").is_ok());
        assert!(package_name("g++").is_ok());
        assert!(package_name("-oDPkg::Pre-Invoke::=sh").is_err());
        assert!(package_name("nginx-").is_err());
        assert!(package_name("-oDir::Bin=/x++").is_err());
        assert!(package_name("a,b").is_err());
        assert_eq!(unit_name("nginx"), Ok("nginx.service".into()));
        assert_eq!(unit_name("apt-daily.timer"), Ok("apt-daily.timer".into()));
        assert!(unit_name("--now").is_err());
    }
}

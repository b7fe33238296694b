//! The primitives, and everything that the rest of vimg needs to know about them.
//!
//! The matches name every primitive, so that a new one can't be forgotten.

use serde::{Deserialize, Serialize};

use crate::account::{Owner, User};
use crate::field::{Convert, optional};
use crate::script::{Around, Run, Script, When};
use crate::service::ServiceState;

/// A primitive: a declared resource of a machine, or a script. `C` is the content of a
/// file, `T` a tree of files, and `S` a secret: a recipe names files of the project, the
/// agent gets blobs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[expect(missing_docs, reason = "the fields are those of the recipe language")]
pub enum Primitive<C, T = C, S = String> {
    /// All packages of a configuration, sorted. Those in `recommends`, which are among the
    /// names, come with the packages that they recommend.
    Package { names: Vec<String>, recommends: Vec<String> },
    /// A file. Default mode: that of the content, which is 0644 or, for an executable
    /// file of the project, 0755.
    File { path: String, content: C, mode: Option<u32>, owner: Owner },
    /// A directory, with a tree copied into it if there is one. Default mode: 0755.
    Directory { path: String, mode: Option<u32>, owner: Owner, tree: Option<T> },
    /// A symbolic link.
    Symlink { path: String, target: String },
    /// An unpacked archive.
    Archive { path: String, content: C, strip: u32, owner: Owner },
    /// A group.
    Group { name: String, gid: Option<u32>, system: bool },
    /// A user.
    User(User),
    /// A public key with which a user can log in by SSH.
    AuthorizedKey { user: String, key: String },
    /// A unit of the init system; `unit` includes the suffix.
    Service { unit: String, enabled: Option<bool>, masked: Option<bool>, state: Option<ServiceState> },
    /// A kernel setting.
    Sysctl { key: String, value: String },
    /// A kernel module.
    KernelModule { name: String },
    /// Words of the kernel's command line.
    KernelParameter { words: Vec<String> },
    /// A clean shutdown of the machine, followed by a boot.
    Reboot,
    /// A script that runs once, when the layer is applied.
    Run(Run<C, S>),
    /// A hook or operation: a script that stays in the machine and runs later.
    Hook { when: When, script: Script<C> },
}

/// A primitive in the form to which `V` converts.
pub type Converted<V, C, T, S> = Primitive<
    <V as Convert<C, T, S>>::Content,
    <V as Convert<C, T, S>>::Tree,
    <V as Convert<C, T, S>>::Secret,
>;

/// What does the work of a primitive. It decides which advice helps after a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tool<'a> {
    /// The machine's package manager.
    Packages,
    /// The user's script.
    Script(&'a Around),
    /// The machine's init system.
    Init,
    /// The agent itself, and small programs of the machine.
    Agent,
}

/// The turn of a primitive in an update that replaces layers of a running machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn<'a> {
    /// These packages can be installed early, while the old layers still work.
    Early(&'a [String]),
    /// It must be applied after all old layers are reverted completely: a purge of their
    /// packages may remove it, which is not known before.
    AfterAll,
    /// It is applied in its layer.
    InLayer,
}

impl<C, T, S> Primitive<C, T, S> {
    /// Names the primitive for people, by its word in recipes.
    pub fn label(&self) -> String {
        match self {
            Self::Package { names, .. } => format!("package {}", names.join(" ")),
            Self::File { path, .. } => format!("file {path}"),
            Self::Directory { path, .. } => format!("directory {path}"),
            Self::Symlink { path, .. } => format!("symlink {path}"),
            Self::Archive { path, .. } => format!("archive {path}"),
            Self::Group { name, .. } => format!("group {name}"),
            Self::User(user) => format!("user {}", user.name),
            Self::AuthorizedKey { user, .. } => format!("authorized-key {user}"),
            Self::Service { unit, .. } => format!("service {unit}"),
            Self::Sysctl { key, .. } => format!("sysctl {key}"),
            Self::KernelModule { name } => format!("kernel-module {name}"),
            Self::KernelParameter { words } => format!("kernel-parameter {}", words.join(" ")),
            Self::Reboot => "reboot".to_owned(),
            Self::Run(_) => "run".to_owned(),
            Self::Hook { when, .. } => when.label(),
        }
    }

    /// Names the resource, if a configuration may declare it only once.
    pub fn resource(&self) -> Option<String> {
        match self {
            Self::File { path, .. } | Self::Symlink { path, .. } => Some(format!("`{path}`")),
            Self::Directory { path, tree: None, .. } => Some(format!("`{path}`")),
            Self::User(user) => Some(format!("the user `{}`", user.name)),
            Self::Group { name, .. } => Some(format!("the group `{name}`")),
            Self::Sysctl { key, .. } => Some(format!("the setting `{key}`")),
            Self::KernelModule { name } => Some(format!("the kernel module `{name}`")),
            Self::Service { unit, .. } => Some(format!("the service `{unit}`")),
            // Trees and archives may be merged, packages and kernel parameters are joined,
            // a user may have several keys, and scripts are no resources.
            Self::Directory { tree: Some(_), .. }
            | Self::AuthorizedKey { .. }
            | Self::Package { .. }
            | Self::KernelParameter { .. }
            | Self::Archive { .. }
            | Self::Reboot
            | Self::Run(_)
            | Self::Hook { .. } => None,
        }
    }

    /// The path at which, or below which, it writes what a recipe asks for.
    pub fn path(&self) -> Option<&str> {
        match self {
            Self::File { path, .. }
            | Self::Directory { path, .. }
            | Self::Symlink { path, .. }
            | Self::Archive { path, .. } => Some(path),
            Self::Package { .. }
            | Self::Group { .. }
            | Self::User(_)
            | Self::AuthorizedKey { .. }
            | Self::Service { .. }
            | Self::Sysctl { .. }
            | Self::KernelModule { .. }
            | Self::KernelParameter { .. }
            | Self::Reboot
            | Self::Run(_)
            | Self::Hook { .. } => None,
        }
    }

    /// What does its work.
    pub fn tool(&self) -> Tool<'_> {
        match self {
            Self::Package { .. } => Tool::Packages,
            Self::Run(run) => Tool::Script(&run.script.around),
            Self::Service { .. } => Tool::Init,
            Self::File { .. }
            | Self::Directory { .. }
            | Self::Symlink { .. }
            | Self::Archive { .. }
            | Self::Group { .. }
            | Self::User(_)
            | Self::AuthorizedKey { .. }
            | Self::Sysctl { .. }
            | Self::KernelModule { .. }
            | Self::KernelParameter { .. }
            | Self::Reboot
            | Self::Hook { .. } => Tool::Agent,
        }
    }

    /// Its turn in an update that replaces layers.
    pub fn turn(&self) -> Turn<'_> {
        match self {
            Self::Package { names, .. } => Turn::Early(names),
            Self::Group { .. } | Self::User(_) => Turn::AfterAll,
            Self::AuthorizedKey { .. }
            | Self::File { .. }
            | Self::Directory { .. }
            | Self::Symlink { .. }
            | Self::Archive { .. }
            | Self::Service { .. }
            | Self::Sysctl { .. }
            | Self::KernelModule { .. }
            | Self::KernelParameter { .. }
            | Self::Reboot
            | Self::Run(_)
            | Self::Hook { .. } => Turn::InLayer,
        }
    }

    /// Whether it gives the same result in a machine in which other layers were applied
    /// as after a boot. That is certain only if the agent itself writes the files.
    pub fn is_quiet(&self) -> bool {
        match self {
            Self::File { .. }
            | Self::Directory { .. }
            | Self::Symlink { .. }
            | Self::Group { .. }
            | Self::User(_)
            | Self::AuthorizedKey { .. } => true,
            Self::Package { .. }
            | Self::Archive { .. }
            | Self::Service { .. }
            | Self::Sysctl { .. }
            | Self::KernelModule { .. }
            | Self::KernelParameter { .. }
            | Self::Reboot
            | Self::Run(_)
            | Self::Hook { .. } => false,
        }
    }

    /// Whether the agent can undo it.
    pub fn has_undo(&self) -> bool {
        match self {
            Self::Run(run) => run.undo.is_some(),
            // The agent records what it changes.
            Self::Package { .. }
            | Self::File { .. }
            | Self::Directory { .. }
            | Self::Symlink { .. }
            | Self::Archive { .. }
            | Self::Group { .. }
            | Self::User(_)
            | Self::AuthorizedKey { .. }
            | Self::Service { .. }
            | Self::Sysctl { .. }
            | Self::KernelModule { .. }
            | Self::KernelParameter { .. }
            | Self::Reboot
            | Self::Hook { .. } => true,
        }
    }

    /// Whether it shuts the machine down and boots it again. The host does that between
    /// two parts of a layer, and only a booted machine can.
    pub fn reboots(&self) -> bool {
        match self {
            Self::Reboot => true,
            Self::Package { .. }
            | Self::File { .. }
            | Self::Directory { .. }
            | Self::Symlink { .. }
            | Self::Archive { .. }
            | Self::Group { .. }
            | Self::User(_)
            | Self::AuthorizedKey { .. }
            | Self::Service { .. }
            | Self::Sysctl { .. }
            | Self::KernelModule { .. }
            | Self::KernelParameter { .. }
            | Self::Run(_)
            | Self::Hook { .. } => false,
        }
    }

    /// Whether the agent runs it later, in the finished machine.
    pub fn runs_later(&self) -> bool {
        match self {
            Self::Hook { .. } => true,
            Self::Package { .. }
            | Self::File { .. }
            | Self::Directory { .. }
            | Self::Symlink { .. }
            | Self::Archive { .. }
            | Self::Group { .. }
            | Self::User(_)
            | Self::AuthorizedKey { .. }
            | Self::Service { .. }
            | Self::Sysctl { .. }
            | Self::KernelModule { .. }
            | Self::KernelParameter { .. }
            | Self::Reboot
            | Self::Run(_) => false,
        }
    }

    /// Whether it may use the network while it is applied.
    pub fn wants_network(&self) -> bool {
        match self.tool() {
            Tool::Packages => true,
            Tool::Script(around) => around.network,
            Tool::Init | Tool::Agent => false,
        }
    }

    /// The time in seconds that the recipe allows for it, besides that of every step.
    pub fn time_limit(&self) -> u64 {
        match self.tool() {
            Tool::Script(around) => around.timeout,
            Tool::Packages | Tool::Init | Tool::Agent => 0,
        }
    }

    /// Whether it may change which packages are available: it is a script, or writes to a
    /// place where package managers keep sources, keys or pins.
    pub fn may_change_sources(&self) -> bool {
        const PLACES: [&str; 3] = ["/etc/apt", "/usr/share/keyrings", "/var/lib/dpkg"];
        // A directory may contain such a place, or be inside one.
        let near = |path: &str| {
            let inside =
                |a: &str, b: &str| a == b || a.strip_prefix(b).is_some_and(|rest| rest.starts_with('/'));
            path == "/" || PLACES.iter().any(|place| inside(path, place) || inside(place, path))
        };
        matches!(self.tool(), Tool::Script(_)) || self.path().is_some_and(near)
    }

    /// Whether it expects that the services of packages before it are started.
    pub fn expects_services(&self) -> bool {
        match self {
            Self::Run(_) => true,
            Self::Service { state, .. } => *state == Some(ServiceState::Stopped),
            Self::Package { .. }
            | Self::File { .. }
            | Self::Directory { .. }
            | Self::Symlink { .. }
            | Self::Archive { .. }
            | Self::Group { .. }
            | Self::User(_)
            | Self::AuthorizedKey { .. }
            | Self::Sysctl { .. }
            | Self::KernelModule { .. }
            | Self::KernelParameter { .. }
            | Self::Reboot
            | Self::Hook { .. } => false,
        }
    }

    /// The words that it adds to the kernel's command line.
    pub fn kernel_parameters(&self) -> &[String] {
        match self {
            Self::KernelParameter { words } => words,
            Self::Package { .. }
            | Self::File { .. }
            | Self::Directory { .. }
            | Self::Symlink { .. }
            | Self::Archive { .. }
            | Self::Group { .. }
            | Self::User(_)
            | Self::AuthorizedKey { .. }
            | Self::Service { .. }
            | Self::Sysctl { .. }
            | Self::KernelModule { .. }
            | Self::Reboot
            | Self::Run(_)
            | Self::Hook { .. } => &[],
        }
    }

    /// The secrets that it receives.
    pub fn secrets(&self) -> &[S] {
        match self {
            Self::Run(run) => &run.secrets,
            Self::Package { .. }
            | Self::File { .. }
            | Self::Directory { .. }
            | Self::Symlink { .. }
            | Self::Archive { .. }
            | Self::Group { .. }
            | Self::User(_)
            | Self::AuthorizedKey { .. }
            | Self::Service { .. }
            | Self::Sysctl { .. }
            | Self::KernelModule { .. }
            | Self::KernelParameter { .. }
            | Self::Reboot
            | Self::Hook { .. } => &[],
        }
    }

    /// Converts the primitive to another form, and passes its fields on. The result has
    /// no default modes of files.
    ///
    /// # Errors
    ///
    /// A content can't be converted.
    pub fn convert<V: Convert<C, T, S>>(&self, to: &mut V) -> Result<Converted<V, C, T, S>, V::Error> {
        let label = self.label();
        Ok(match self {
            Self::Package { names, recommends } => {
                to.value("package", &names.join(" "));
                let recommending = (!recommends.is_empty()).then(|| recommends.join(" "));
                optional(to, "package recommends", recommending.as_ref());
                Primitive::Package { names: names.clone(), recommends: recommends.clone() }
            }
            Self::File { path, content, mode, owner } => {
                to.value(&label, &"");
                let (content, own) = to.content(&label, content)?;
                let mode = mode.unwrap_or(own);
                to.value(&format!("{label} mode"), &format_args!("{mode:04o}"));
                owner.describe(&label, to);
                Primitive::File { path: path.clone(), content, mode: Some(mode), owner: owner.clone() }
            }
            Self::Directory { path, mode, owner, tree } => {
                to.value(&label, &"");
                let octal = mode.map(|mode| format!("{mode:04o}"));
                optional(to, &format!("{label} mode"), octal.as_ref());
                owner.describe(&label, to);
                let tree = tree.as_ref().map(|tree| to.tree(tree)).transpose()?;
                Primitive::Directory { path: path.clone(), mode: *mode, owner: owner.clone(), tree }
            }
            Self::Symlink { path, target } => {
                to.value(&label, target);
                Primitive::Symlink { path: path.clone(), target: target.clone() }
            }
            Self::Archive { path, content, strip, owner } => {
                to.value(&label, &"");
                to.value(&format!("{label} strip"), strip);
                owner.describe(&label, to);
                let (content, _) = to.content(&label, content)?;
                Primitive::Archive { path: path.clone(), content, strip: *strip, owner: owner.clone() }
            }
            Self::Group { name, gid, system } => {
                to.value(&label, &"");
                optional(to, &format!("{label} gid"), gid.as_ref());
                to.value(&format!("{label} system"), system);
                Primitive::Group { name: name.clone(), gid: *gid, system: *system }
            }
            Self::User(user) => {
                user.describe(&label, to);
                Primitive::User(user.clone())
            }
            Self::AuthorizedKey { user, key } => {
                to.value(&label, key);
                Primitive::AuthorizedKey { user: user.clone(), key: key.clone() }
            }
            Self::Service { unit, enabled, masked, state } => {
                to.value(&label, &"");
                optional(to, &format!("{label} enabled"), enabled.as_ref());
                optional(to, &format!("{label} masked"), masked.as_ref());
                optional(to, &format!("{label} state"), state.map(ServiceState::word).as_ref());
                Primitive::Service { unit: unit.clone(), enabled: *enabled, masked: *masked, state: *state }
            }
            Self::Sysctl { key, value } => {
                to.value(&label, value);
                Primitive::Sysctl { key: key.clone(), value: value.clone() }
            }
            Self::KernelModule { name } => {
                to.value(&label, &"");
                Primitive::KernelModule { name: name.clone() }
            }
            Self::KernelParameter { words } => {
                to.value("kernel-parameter", &words.join(" "));
                Primitive::KernelParameter { words: words.clone() }
            }
            Self::Reboot => {
                to.value(&label, &"");
                Primitive::Reboot
            }
            Self::Run(run) => Primitive::Run(run.convert(&label, to)?),
            Self::Hook { when, script } => {
                Primitive::Hook { when: when.clone(), script: script.convert(&label, to)? }
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wire_has_the_words_of_the_language() {
        let link = Primitive::<u8>::Symlink { path: "/a".into(), target: "b".into() };
        let json = serde_json::to_string(&link).unwrap();
        assert_eq!(json, r#"{"symlink":{"path":"/a","target":"b"}}"#);
        assert_eq!(serde_json::from_str::<Primitive<u8>>(&json).unwrap(), link);
        assert_eq!(link.label(), "symlink /a");
    }

    #[test]
    fn sources_of_packages_are_known_by_their_place() {
        let directory = |path: &str| {
            let owner = Owner { user: "root".into(), group: "root".into() };
            Primitive::<u8>::Directory { path: path.into(), mode: None, owner, tree: Some(1) }
        };
        for path in ["/", "/etc", "/etc/apt", "/etc/apt/sources.list.d", "/usr/share"] {
            assert!(directory(path).may_change_sources(), "{path}");
        }
        for path in ["/etc/aptitude", "/srv", "/usr/share/keyrings-old"] {
            assert!(!directory(path).may_change_sources(), "{path}");
        }
    }
}

//! What a user has set once and for all: `vimg/config.kdl` below
//! `$XDG_CONFIG_HOME`; and what a project has: `vimg.kdl` beside its recipe.
//! Flags and the environment say more than both do.

use std::path::{Path, PathBuf};

use clap::ValueEnum;
use vimg_lang::{Setting, Settings, Sources, Takes};

use super::output::Error;
use super::read::read_recipe;
use crate::host::network::{Access, Proxies, Reach};
use crate::provider::host::{self, Choice};
use crate::provider::qemu::{self, Accel, Kvm};
use crate::store::Store;

/// The project's settings: its caches and trusted keys.
pub(super) const PROJECT_SETTINGS: &str = "vimg.kdl";

/// What a user may set.
const USER: &[Setting] = &[
    ("provider", Takes::Word(&["auto", "qemu", "container"])),
    ("accel", Takes::Word(&["auto", "kvm", "tcg"])),
    ("network-allow", Takes::Texts(1)),
    ("cache-from", Takes::Texts(1)),
    ("cache-to", Takes::Texts(1)),
    ("trust", Takes::Texts(2)),
];
/// What a project may set, for all who build it: nothing of their machines.
const PROJECT: &[Setting] =
    &[("cache-from", Takes::Texts(1)), ("cache-to", Takes::Texts(1)), ("trust", Takes::Texts(2))];

/// How instances are run.
#[derive(Debug, clap::Args)]
pub(super) struct ProviderArgs {
    /// How to apply layers that need no booted machine
    #[arg(long, value_enum, env = "VIMG_PROVIDER")]
    provider: Option<ProviderChoice>,
    /// How to run machines
    #[arg(long, value_enum, env = "VIMG_ACCEL")]
    accel: Option<AccelChoice>,
    /// Let guests reach more than the internet: `host` (services on this
    /// host's loopback), a network such as `10.1.0.0/16`, or `all`
    #[arg(long, value_name = "WHAT", env = "VIMG_NETWORK_ALLOW", value_delimiter = ',')]
    network_allow: Vec<String>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum ProviderChoice {
    /// QEMU with KVM, else a container if allowed, else QEMU
    Auto,
    /// An appliance under QEMU
    Qemu,
    /// A container of the host's kernel; takes root
    Container,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum AccelChoice {
    /// KVM where it works, emulation elsewhere
    Auto,
    Kvm,
    Tcg,
}

impl ProviderArgs {
    /// What was chosen: by flag or environment, by the settings, or `auto`.
    pub(super) fn choose(&self) -> Result<(Choice, Option<Accel>), Error> {
        let set = user()?;
        let provider = self.provider.or_else(|| word(&set, "provider"));
        let accel = self.accel.or_else(|| word(&set, "accel"));
        let choice = match provider {
            None | Some(ProviderChoice::Auto) => Choice::Auto,
            Some(ProviderChoice::Qemu) => Choice::Qemu,
            Some(ProviderChoice::Container) => Choice::Container,
        };
        let accel = match accel {
            None | Some(AccelChoice::Auto) => None,
            Some(AccelChoice::Kvm) => Some(Accel::Kvm),
            Some(AccelChoice::Tcg) => Some(Accel::Tcg),
        };
        Ok((choice, accel))
    }
}

impl ProviderArgs {
    /// What guests may reach: by the flag and the environment, and by the
    /// user's settings. A project has no say in it; the name and password of a
    /// proxy are for guests of projects that were allowed to have them.
    pub(super) fn access(&self, password: bool) -> Result<Access, Error> {
        let set = user()?;
        let set = set.get("network-allow").into_iter().flatten().flatten();
        let mut reach = Reach::default();
        for text in self.network_allow.iter().filter(|text| !text.is_empty()).chain(set) {
            reach.allow(text).map_err(|why| {
                Error::Message(format!("invalid value `{text}` for `network-allow`: {why}"), None, 2)
            })?;
        }
        let proxies = if password { proxies() } else { proxies().without_password() };
        Ok(Access { reach, proxies })
    }
}

/// The proxies that the environment names. Programs agree on names in small
/// letters; for `http_proxy` they agree on nothing else.
pub(super) fn proxies() -> Proxies {
    let var = |names: &[&str]| {
        names.iter().find_map(|name| std::env::var(name).ok()).filter(|value| !value.is_empty())
    };
    Proxies {
        http: var(&["http_proxy"]),
        https: var(&["https_proxy", "HTTPS_PROXY"]),
        no: var(&["no_proxy", "NO_PROXY"]),
    }
}

/// How instances will be run, and why, in words.
pub(super) struct Explained {
    /// Layers that need no booted machine.
    pub(super) offline: String,
    /// Machines.
    pub(super) booted: String,
}

impl ProviderArgs {
    /// Says what was chosen and why, without starting a machine.
    pub(super) fn explain(&self, store: &Store) -> Result<Explained, Error> {
        let (choice, accel) = self.choose()?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|e| Error::host(format!("the runtime does not start: {e}")))?;
        runtime.block_on(async {
            let kvm = match (accel, qemu::Programs::find().await) {
                (_, Err(error)) => {
                    let why = format!("not at all: {error}");
                    return Ok(Explained { offline: why.clone(), booted: why });
                }
                (Some(Accel::Kvm), _) => Kvm::Works,
                (Some(Accel::Tcg), _) => Kvm::Fails("it was asked for emulation".into()),
                (None, Ok(programs)) => qemu::kvm_report(&programs, &store.probes()),
            };
            let booted = match kvm {
                Kvm::Works => "under QEMU with KVM",
                Kvm::Unknown => "under QEMU, with KVM if it works, or else emulated",
                Kvm::Fails(_) => "under QEMU, emulated",
            };
            let offline = host::explain(choice, &kvm, store.root()).await;
            Ok(Explained { offline, booted: booted.into() })
        })
    }
}

/// What a setting says, which is one of the words by now.
fn word<T: ValueEnum>(set: &Settings, name: &str) -> Option<T> {
    T::from_str(set.get(name)?.first()?.first()?, false).ok()
}

/// Where this user's settings are.
pub(super) fn dir() -> Option<PathBuf> {
    let dir = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
    let config = dir("XDG_CONFIG_HOME").or_else(|| Some(dir("HOME")?.join(".config")))?;
    Some(config.join("vimg"))
}

/// The user's settings.
pub(super) fn user() -> Result<Settings, Error> {
    dir().map_or(Ok(Settings::new()), |dir| read(&dir.join("config.kdl"), USER))
}

/// The settings of the project at `root`.
pub(super) fn project(root: &Path) -> Result<Settings, Error> {
    read(&root.join(PROJECT_SETTINGS), PROJECT)
}

pub(super) fn read(path: &Path, known: &[Setting]) -> Result<Settings, Error> {
    if !path.exists() {
        return Ok(Settings::new());
    }
    let text = read_recipe(path)?;
    let mut sources = Sources::default();
    vimg_lang::settings(&path.display().to_string(), &text, known, &mut sources)
        .map_err(|diagnostics| Error::Recipe(Box::new(sources), diagnostics))
}

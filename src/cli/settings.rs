//! Settings in files: the user's `vimg/config.kdl` below `$XDG_CONFIG_HOME`, and
//! the project's `vimg.kdl` beside its recipe. Flags and the environment win over
//! both.

use std::path::{Path, PathBuf};

use clap::ValueEnum;
use vimg_lang::{Setting, Settings, Sources, Takes};

use super::output::Error;
use super::read::read_recipe;
use crate::host::network::{Access, Proxies, Reach};
use crate::provider::host::{self, Choice};
use crate::provider::qemu::{self, Accel, Kvm};
use crate::store::{Area, Store};

/// The project's settings: its caches and trusted keys.
pub(super) const PROJECT_SETTINGS: &str = "vimg.kdl";

/// Settings that a user can make.
const USER: &[Setting] = &[
    ("provider", Takes::Word(&["auto", "qemu", "container"])),
    ("accel", Takes::Word(&["auto", "kvm", "tcg"])),
    ("network-allow", Takes::Texts(1)),
    ("cache-from", Takes::Texts(1)),
    ("cache-to", Takes::Texts(1)),
    ("trust", Takes::Texts(2)),
];
/// Settings that a project can make for everyone who builds it. None of them
/// concerns the host.
const PROJECT: &[Setting] =
    &[("cache-from", Takes::Texts(1)), ("cache-to", Takes::Texts(1)), ("trust", Takes::Texts(2))];

/// Options that choose how machines, appliances and containers run.
#[derive(Debug, clap::Args)]
pub(super) struct ProviderArgs {
    /// Runner of offline layers: how to apply layers that need no booted machine
    #[arg(long, value_enum, env = "VIMG_PROVIDER")]
    provider: Option<ProviderChoice>,
    /// Accelerator of machines
    #[arg(long, value_enum, env = "VIMG_ACCEL")]
    accel: Option<AccelChoice>,
    /// Let guests reach more than the internet: `host` (services on this
    /// host's loopback), a network such as `10.1.0.0/16`, or `all`
    #[arg(long, value_name = "WHAT", env = "VIMG_NETWORK_ALLOW", value_delimiter = ',')]
    network_allow: Vec<String>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum ProviderChoice {
    /// An appliance with KVM, else a container if allowed, else an emulated
    /// appliance
    Auto,
    /// An appliance, under QEMU
    Qemu,
    /// A container on the host's kernel; needs root
    Container,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum AccelChoice {
    /// KVM if it works, else emulation
    Auto,
    Kvm,
    Tcg,
}

impl ProviderArgs {
    /// Returns the choice of the flag, the environment or the settings, in this
    /// order.
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
    /// Returns what guests may reach: what the flag or the environment allows, plus
    /// what the user's settings allow. A project can't change it. With `password`,
    /// guests get the names and passwords of proxies.
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

/// Returns the proxies that the environment names. `HTTP_PROXY` does not count,
/// because programs agree only on the lower-case name.
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

/// Returns the directories of the store that providers use.
pub(super) fn dirs(store: &Store) -> qemu::Dirs {
    qemu::Dirs {
        probes: store.dir(Area::Probes),
        appliances: store.dir(Area::Appliances),
        snapshots: store.dir(Area::Snapshots),
    }
}

/// How layers are applied and machines are booted, and why, for people.
pub(super) struct Explained {
    /// For layers that need no booted machine.
    pub(super) offline: host::Offline,
    /// The state of knowledge about KVM; `None` if it does not matter.
    pub(super) kvm: Option<Kvm>,
    /// For machines.
    pub(super) booted: String,
}

impl ProviderArgs {
    /// Explains the choice without starting a machine.
    pub(super) fn explain(&self, store: &Store) -> Result<Explained, Error> {
        let (choice, accel) = self.choose()?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|e| Error::host(format!("can't start the async runtime: {e}")))?;
        runtime.block_on(async {
            let kvm = match (accel, qemu::Programs::find(None).await) {
                (_, Err(error)) => {
                    let why = format!("not at all: {error}");
                    let offline = host::Offline { text: why.clone(), trouble: None };
                    return Ok(Explained { offline, kvm: None, booted: why });
                }
                (Some(Accel::Kvm), _) => Kvm::Works,
                (Some(Accel::Tcg), _) => Kvm::Fails("emulation was requested".into()),
                (None, Ok(programs)) => qemu::kvm_report(&programs, &store.dir(Area::Probes)),
            };
            let booted = match kvm {
                Kvm::Works => "under QEMU with KVM",
                Kvm::Unknown => "under QEMU, with KVM if it works, or else emulated",
                Kvm::Fails(_) => "under QEMU, emulated",
            };
            let offline = host::explain(choice, &kvm, store.root()).await;
            let kvm = accel.is_none().then_some(kvm);
            Ok(Explained { offline, kvm, booted: booted.into() })
        })
    }
}

/// Returns the value of a setting that has one of several words.
fn word<T: ValueEnum>(set: &Settings, name: &str) -> Option<T> {
    T::from_str(set.get(name)?.first()?.first()?, false).ok()
}

/// Returns the directory of the user's settings.
pub(super) fn dir() -> Option<PathBuf> {
    let dir = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
    let config = dir("XDG_CONFIG_HOME").or_else(|| Some(dir("HOME")?.join(".config")))?;
    Some(config.join("vimg"))
}

/// Reads the user's settings.
pub(super) fn user() -> Result<Settings, Error> {
    dir().map_or(Ok(Settings::new()), |dir| read(&dir.join("config.kdl"), USER))
}

/// Reads the settings of the project at `root`.
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

//! What a user has set once and for all: `vimg/config.kdl` below
//! `$XDG_CONFIG_HOME`. Flags and the environment say more than it does.

use std::path::PathBuf;

use clap::ValueEnum;
use vimg_lang::{Setting, Sources};

use super::Error;
use crate::provider::host::Choice;
use crate::provider::qemu::Accel;

const KNOWN: &[Setting] = &[("provider", &["auto", "qemu", "container"]), ("accel", &["auto", "kvm", "tcg"])];

/// How instances are run.
#[derive(Debug, clap::Args)]
pub(super) struct ProviderArgs {
    /// How to apply layers that need no booted machine
    #[arg(long, value_enum, env = "VIMG_PROVIDER")]
    provider: Option<ProviderChoice>,
    /// How to run machines
    #[arg(long, value_enum, env = "VIMG_ACCEL")]
    accel: Option<AccelChoice>,
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
        let set = read()?;
        let word = |name: &str| set.get(name).map(String::as_str);
        let provider = self.provider.or(match word("provider") {
            Some("qemu") => Some(ProviderChoice::Qemu),
            Some("container") => Some(ProviderChoice::Container),
            _ => None,
        });
        let accel = self.accel.or(match word("accel") {
            Some("kvm") => Some(AccelChoice::Kvm),
            Some("tcg") => Some(AccelChoice::Tcg),
            _ => None,
        });
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

fn path() -> Option<PathBuf> {
    let dir = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
    let config = dir("XDG_CONFIG_HOME").or_else(|| Some(dir("HOME")?.join(".config")))?;
    Some(config.join("vimg/config.kdl"))
}

fn read() -> Result<std::collections::BTreeMap<String, String>, Error> {
    let Some(path) = path().filter(|p| p.exists()) else { return Ok(Default::default()) };
    let text = super::read_recipe(&path)?;
    let mut sources = Sources::default();
    vimg_lang::settings(&path.display().to_string(), &text, KNOWN, &mut sources)
        .map_err(|diagnostics| Error::Recipe(Box::new(sources), diagnostics))
}

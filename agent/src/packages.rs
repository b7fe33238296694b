//! The package manager of the machine. A new one is a file here and a line in the table.

mod manager;
mod route;
mod control;
mod apt;

use crate::distribution::Distribution;
use crate::failure::Failure;

pub(crate) use manager::{List, Mark, Packages, With, parse, write};

/// The package managers that the agent knows, by the family of distributions that has
/// them.
const KNOWN: &[(&str, &dyn Packages)] = &[("debian", &apt::Apt)];

/// Finds the package manager of this machine: the one of its distribution, or else one
/// that is installed, because an image may give itself another name.
///
/// # Errors
///
/// The agent knows none of those that are installed.
pub(crate) fn find() -> Result<&'static dyn Packages, Failure> {
    choose(&Distribution::read(), |manager| manager.is_installed())
}

fn choose(
    distribution: &Distribution,
    is_installed: impl Fn(&dyn Packages) -> bool,
) -> Result<&'static dyn Packages, Failure> {
    let installed = || KNOWN.iter().filter(|(_, manager)| is_installed(*manager));
    let own = installed().find(|(family, _)| distribution.is_like(family));
    own.or_else(|| installed().next()).map(|(_, manager)| *manager).ok_or_else(|| {
        let names: Vec<&str> = KNOWN.iter().map(|(_, manager)| manager.name()).collect();
        Failure::new(format!(
            "the machine has {distribution}, without a package manager that vimg supports: {}",
            names.join(", ")
        ))
    })
}

/// Lists the installed packages of this machine, one per line; nothing if its package
/// manager is unknown.
pub(crate) fn list() -> String {
    find().map(Packages::list).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_package_manager_is_known_by_the_distribution_or_by_itself() {
        for text in ["ID=debian", "ID=ubuntu\nID_LIKE=debian", "ID=acme", ""] {
            let found = choose(&Distribution::of(text), |_| true).map(|manager| manager.name());
            assert_eq!(found.ok(), Some("apt"), "{text}");
        }
        let failure = choose(&Distribution::of("ID=fedora"), |_| false).err().unwrap();
        let expected =
            "the machine has the distribution `fedora`, without a package manager that vimg supports: apt";
        assert_eq!(failure.message, expected);
    }
}

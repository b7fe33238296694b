//! What the agent needs of a package manager, and the list of packages that it keeps.

use std::collections::{BTreeMap, HashSet};

use crate::command::Output;
use crate::failure::Failure;
use crate::init::Verb;

/// An installed package.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Package {
    pub(crate) version: String,
    /// Whether it was installed only as a dependency.
    pub(crate) automatic: bool,
}

/// Packages by name and, if it matters, architecture: `NAME` or `NAME:ARCHITECTURE`.
pub(crate) type List = BTreeMap<String, Package>;

/// How a package is marked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mark {
    /// The user wants it.
    Manual,
    /// Only other packages need it.
    Automatic,
}

/// The packages that come with a package.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum With {
    /// The packages that it needs.
    Needed,
    /// Those that it recommends as well.
    Recommended,
}

/// A package manager. A spec is what a recipe names: a package, perhaps with a version,
/// an architecture or a source.
pub(crate) trait Packages: Sync {
    /// Its name, for messages.
    fn name(&self) -> &'static str;

    /// Whether it is installed in this machine.
    fn is_installed(&self) -> bool;

    /// Lists the installed packages, one per line: name and architecture, version, and
    /// `auto` or `manual`.
    fn list(&self) -> String;

    /// Whether the packages of a spec are there; `false` if only the package manager can
    /// tell.
    fn has(&self, spec: &str, there: &List) -> bool;

    /// Whether the package of a spec is installed only as a dependency.
    fn is_automatic(&self, spec: &str, there: &List) -> bool;

    /// Returns the name of a package without everything else.
    fn bare<'a>(&self, spec: &'a str) -> &'a str;

    /// Whether one of `specs` names the package.
    fn is_asked(&self, name: &str, specs: &[String]) -> bool {
        specs.iter().any(|spec| self.bare(spec) == self.bare(name))
    }

    /// Fetches the lists of packages, unless that was just done.
    fn refresh(&self, output: &Output) -> Result<(), Failure>;

    /// Refreshes the lists, and installs packages as they are asked for.
    fn install(&self, specs: &[&String], with: With, output: &Output) -> Result<(), Failure>;

    /// Returns what the installed package of a spec recommends and the machine lacks: for
    /// each, the packages of which one is enough.
    fn lacking(&self, spec: &str) -> Vec<Vec<String>>;

    /// Returns the names of the packages that contain a file of this name, in whatever
    /// directory.
    fn with_file(&self, name: &str) -> Vec<String>;

    /// Installs packages in earlier versions. If `careful`, leaves out those for which
    /// others would have to be removed. Returns the specs of those left out.
    fn restore(
        &self,
        packages: &[(&String, &String)],
        careful: bool,
        output: &Output,
    ) -> Result<Vec<String>, Failure>;

    /// Removes packages with their settings.
    fn remove(&self, names: &[String], output: &Output) -> Result<(), Failure>;

    /// Marks packages.
    fn mark(&self, mark: Mark, specs: &[&String], output: &Output) -> Result<(), Failure>;

    /// Returns the bare names of automatic packages that no other package needs.
    fn idle(&self) -> Result<HashSet<String>, Failure>;

    /// Whether installing packages would remove others.
    fn would_remove(&self, specs: &[&String]) -> Result<bool, Failure>;

    /// Returns why a package is not installed, for people.
    fn ask(&self, name: &str) -> Result<(), String>;

    /// Lists the files of packages, one per line.
    fn files_of(&self, packages: &[String]) -> Result<String, Failure>;

    /// Whether all packages that contain one of `paths`, each of which some package has,
    /// are among `packages`; for at least one of the paths.
    fn owns_alone(&self, packages: &[String], paths: &[&str]) -> Result<bool, Failure>;

    /// The file that keeps packages from starting services, and its text: it stands in
    /// the machine while a layer is applied offline.
    fn forbids(&self) -> Option<(&'static str, &'static str)>;

    /// Whether [`Packages::hold`] works here: the machine may have its own rule for which
    /// services packages start.
    fn can_hold(&self) -> bool;

    /// Keeps packages from starting services in a running machine, until the result is
    /// dropped.
    fn hold(&self) -> Result<Box<dyn Hold>, Failure>;

    /// Directories of downloads, which sealing empties.
    fn caches(&self) -> &'static [&'static str];
}

/// Packages may start no services while this lives.
pub(crate) trait Hold {
    /// Returns what packages have asked for meanwhile: names of services, with or without
    /// a suffix, and what to do with them.
    fn asked(&self) -> Vec<(String, Verb)>;
}

/// Writes a list that [`parse`] can read.
pub(crate) fn write(packages: &List) -> String {
    let line = |(name, package): (&String, &Package)| {
        format!("{name} {} {}\n", package.version, if package.automatic { "auto" } else { "manual" })
    };
    packages.iter().map(line).collect()
}

/// Parses such a list. The architecture `all` fits every machine, and is left out.
pub(crate) fn parse(list: &str) -> List {
    list.lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            let (name, version, how) = (words.next()?, words.next()?, words.next()?);
            let name = name.strip_suffix(":all").unwrap_or(name).to_owned();
            Some((name, Package { version: version.to_owned(), automatic: how == "auto" }))
        })
        .collect()
}

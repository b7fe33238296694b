//! The directories of a store. It owns all of them: nothing else knows their
//! names, and each is its user's alone.

/// A directory of the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Area {
    /// A directory for each state.
    States,
    /// Kernels and initrds, by their digests.
    Blobs,
    /// Work in progress, removed with its process.
    Staging,
    /// Locks of states that are built.
    Locks,
    /// Servers and their disks; no cache.
    Servers,
    /// What each project last built.
    Projects,
    /// Parsed recipes.
    Parsed,
    /// Results of probes of the host's programs.
    Probes,
    /// Memory snapshots of appliances.
    Appliances,
    /// Memory snapshots of machines.
    Snapshots,
    /// The youngest records that were seen in caches.
    Seen,
    /// Files that were fetched in part.
    Partial,
}

impl Area {
    /// All of them.
    pub const ALL: [Self; 12] = [
        Self::States,
        Self::Blobs,
        Self::Staging,
        Self::Locks,
        Self::Servers,
        Self::Projects,
        Self::Parsed,
        Self::Probes,
        Self::Appliances,
        Self::Snapshots,
        Self::Seen,
        Self::Partial,
    ];

    /// The name of its directory.
    pub fn name(self) -> &'static str {
        match self {
            Self::States => "states",
            Self::Blobs => "blobs",
            Self::Staging => "staging",
            Self::Locks => "locks",
            Self::Servers => "servers",
            Self::Projects => "projects",
            Self::Parsed => "parsed",
            Self::Probes => "probes",
            Self::Appliances => "appliances",
            Self::Snapshots => "snapshots",
            Self::Seen => "seen",
            Self::Partial => "partial",
        }
    }
}

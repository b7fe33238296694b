//! A state as caches store it: a format with a version of its own, so that a
//! new field of a local record is no new format of caches.

use serde::{Deserialize, Serialize};

use crate::digest::{Description, Key};
use crate::store::{Boot, Disk, Record, StateId};

/// The part of a state's record that vimg signs and sends.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WireState {
    /// The state's key.
    pub key: Key,
    /// The ID of this build of it.
    pub id: StateId,
    /// The kind of its node.
    pub kind: String,
    /// The node's name when it was built.
    pub name: String,
    /// Everything that entered the key.
    pub description: Description,
    /// Its disk.
    pub disk: Disk,
    /// The kernel and initrd for a direct boot.
    pub boot: Option<Boot>,
    /// The kernel and modules for an appliance.
    pub appliance: Option<Boot>,
    /// Whether only the kernel of a host has written to the disk's filesystem.
    pub trusted_filesystem: bool,
    /// When it was built, in seconds since 1970.
    pub made: u64,
    /// How long the build took, in seconds.
    pub seconds: f64,
    /// Its runner.
    pub provider: String,
    /// Of an output: the state that it was exported from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<(Key, StateId)>,
    /// The earlier identical state (early cutoff).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub same: Option<(Key, StateId)>,
}

impl WireState {
    /// Takes what is sent from a record. Sizes on this machine and the origin
    /// stay here.
    pub fn of(record: &Record) -> Self {
        Self {
            key: record.key,
            id: record.id,
            kind: record.kind.clone(),
            name: record.name.clone(),
            description: record.description.clone(),
            disk: record.disk.clone(),
            boot: record.boot,
            appliance: record.appliance,
            trusted_filesystem: record.trusted_filesystem,
            made: record.made,
            seconds: record.seconds,
            provider: record.provider.clone(),
            source: record.source,
            same: record.same,
        }
    }

    /// Makes the record of a fetched state. Its size and its origin are for the
    /// caller to add.
    pub fn record(&self) -> Record {
        let (description, disk) = (self.description.clone(), self.disk.clone());
        Record {
            id: self.id,
            boot: self.boot,
            appliance: self.appliance,
            trusted_filesystem: self.trusted_filesystem,
            made: self.made,
            seconds: self.seconds,
            provider: self.provider.clone(),
            source: self.source,
            same: self.same,
            ..Record::new(self.key, &self.kind, &self.name, description, disk)
        }
    }
}

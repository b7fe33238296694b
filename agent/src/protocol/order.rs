//! Orders: the steps of layers. Most make a primitive; the others say what to do with
//! layers as a whole.
//!
//! The matches name every order, so that a new one can't be forgotten.

use serde::{Deserialize, Serialize};

use super::blob::Blob;

/// A primitive whose contents are blobs that the agent requests.
pub type Primitive = vimg_model::Primitive<Blob>;

/// A script as a blob.
pub type Script = vimg_model::Script<Blob>;

/// A script that runs once, as a blob, with the names of its secrets.
pub type Run = vimg_model::Run<Blob>;

/// A step that the agent does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// Make a primitive.
    Make(Primitive),
    /// Install packages of the current layer, a new one, while the leaving layers still
    /// work. Their services start with the layer's own `package`. Does nothing if the
    /// installation would remove other packages.
    Preinstall {
        /// The packages.
        names: Vec<String>,
        /// The layers that are reverted later.
        leaving: Vec<String>,
    },
    /// Revert layers, in this order, except for their packages, and stop the services of
    /// these packages; `Revert` does the rest. If packages could not be preinstalled,
    /// revert the layers completely.
    Leave {
        /// The layers.
        layers: Vec<String>,
        /// The paths of the new layers.
        paths: Vec<String>,
    },
    /// Revert a layer with its page of the ledger.
    Revert {
        /// The layer.
        layer: String,
    },
    /// Begin or continue the page of a layer, for the steps that follow.
    Layer {
        /// The layer.
        name: String,
    },
}

impl Order {
    /// The primitive to make, if that is the order.
    pub fn primitive(&self) -> Option<&Primitive> {
        match self {
            Self::Make(primitive) => Some(primitive),
            Self::Preinstall { .. } | Self::Leave { .. } | Self::Revert { .. } | Self::Layer { .. } => None,
        }
    }

    /// Whether it may use the network.
    pub fn wants_network(&self) -> bool {
        match self {
            Self::Make(primitive) => primitive.wants_network(),
            // A revert may install packages again, or run the `undo` of a script.
            Self::Preinstall { .. } | Self::Leave { .. } | Self::Revert { .. } => true,
            Self::Layer { .. } => false,
        }
    }

    /// The time in seconds that the recipe allows for it, besides that of every step.
    pub fn time_limit(&self) -> u64 {
        self.primitive().map_or(0, Primitive::time_limit)
    }

    /// Whether it gives the same result in a machine in which other layers were applied
    /// as after a boot.
    pub fn is_quiet(&self) -> bool {
        match self {
            Self::Make(primitive) => primitive.is_quiet(),
            Self::Layer { .. } => true,
            Self::Preinstall { .. } | Self::Leave { .. } | Self::Revert { .. } => false,
        }
    }

    /// The names of the secrets that it receives.
    pub fn secrets(&self) -> &[String] {
        self.primitive().map_or(&[], Primitive::secrets)
    }

    /// Whether it is a reboot, which ends the part of a layer that one boot applies.
    pub fn is_reboot(&self) -> bool {
        self.primitive().is_some_and(Primitive::reboots)
    }
}

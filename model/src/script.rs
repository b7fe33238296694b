//! Scripts: what runs, in which environment, and when.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::field::{Convert, Fields};

/// A script and its environment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Script<C> {
    /// The script itself.
    pub content: C,
    /// Its environment.
    #[serde(flatten)]
    pub around: Around,
}

impl<C> Script<C> {
    /// Converts the script of the step `name`, and passes its fields on.
    pub(crate) fn convert<T, S, V: Convert<C, T, S>>(
        &self,
        name: &str,
        to: &mut V,
    ) -> Result<Script<V::Content>, V::Error> {
        self.around.describe(name, to);
        Ok(Script { content: to.script(name, &self.content)?, around: self.around.clone() })
    }
}

/// The environment of a script. See the recipe language.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Around {
    /// Environment variables.
    pub env: BTreeMap<String, String>,
    /// Name of the user that runs it.
    pub user: String,
    /// Working directory.
    pub workdir: String,
    /// Time limit in seconds.
    pub timeout: u64,
    /// Whether it may use the network.
    #[serde(default)]
    pub network: bool,
}

impl Around {
    fn describe(&self, name: &str, to: &mut impl Fields) {
        to.value(&format!("{name} user"), &self.user);
        to.value(&format!("{name} workdir"), &self.workdir);
        to.value(&format!("{name} timeout"), &self.timeout);
        if self.network {
            to.value(&format!("{name} network"), &self.network);
        }
        for (variable, value) in &self.env {
            to.value(&format!("{name} env {variable}"), value);
        }
    }
}

/// A script that runs once, when its layer is applied. See the recipe language.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run<C, S = String> {
    /// The script.
    pub script: Script<C>,
    /// A script that undoes what the script did.
    pub undo: Option<String>,
    /// The secrets that it receives.
    pub secrets: Vec<S>,
}

impl<C, S> Run<C, S> {
    /// Converts the step `name`, and passes its fields on.
    pub(crate) fn convert<T, V: Convert<C, T, S>>(
        &self,
        name: &str,
        to: &mut V,
    ) -> Result<Run<V::Content, V::Secret>, V::Error> {
        let secrets = self.secrets.iter().map(|secret| to.secret(secret)).collect();
        if let Some(undo) = &self.undo {
            to.text(&format!("{name} undo"), undo);
        }
        Ok(Run { script: self.script.convert(name, to)?, undo: self.undo.clone(), secrets })
    }
}

/// The event that runs a hook or operation. On the wire and in machines it is a text:
/// `first-boot`, `each-boot`, `decommission` or `operation/NAME`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum When {
    /// The first boot of the finished machine.
    FirstBoot,
    /// Each boot of the finished machine.
    EachBoot,
    /// The end of a server.
    Decommission,
    /// A request by name: `vimg exec SERVER --operation NAME`.
    Operation(String),
}

impl When {
    /// The events of `on`, in recipes.
    pub const WORDS: &[&str] = &["first-boot", "each-boot", "decommission"];

    /// The event of `on` with this word.
    pub fn event(word: &str) -> Option<Self> {
        match word {
            "first-boot" => Some(Self::FirstBoot),
            "each-boot" => Some(Self::EachBoot),
            "decommission" => Some(Self::Decommission),
            _ => None,
        }
    }

    /// Names the event for people, by the words of recipes.
    pub(crate) fn label(&self) -> String {
        match self {
            Self::FirstBoot | Self::EachBoot | Self::Decommission => format!("on {self}"),
            Self::Operation(name) => format!("operation {name}"),
        }
    }
}

impl fmt::Display for When {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::FirstBoot => f.write_str("first-boot"),
            Self::EachBoot => f.write_str("each-boot"),
            Self::Decommission => f.write_str("decommission"),
            Self::Operation(name) => write!(f, "operation/{name}"),
        }
    }
}

impl FromStr for When {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.strip_prefix("operation/") {
            Some(name) => Ok(Self::Operation(name.to_owned())),
            None => Self::event(text).ok_or_else(|| format!("unknown event `{text}`")),
        }
    }
}

impl TryFrom<String> for When {
    type Error = String;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<When> for String {
    fn from(when: When) -> Self {
        when.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_survive_being_text() {
        for word in When::WORDS {
            assert_eq!(When::event(word).map(|when| when.to_string()).as_deref(), Some(*word));
        }
        for text in ["first-boot", "each-boot", "decommission", "operation/rotate"] {
            assert_eq!(text.parse::<When>().map(String::from).as_deref(), Ok(text));
        }
        assert!("reboot".parse::<When>().is_err());
        assert_eq!(When::event("operation/rotate"), None);
    }
}

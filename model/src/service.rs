//! Units of the init system: their names, and the state of a service.

use serde::{Deserialize, Serialize};

/// The types of units, which are the suffixes of their names (systemd.unit(5)).
const TYPES: [&str; 11] = [
    ".service",
    ".socket",
    ".target",
    ".device",
    ".mount",
    ".automount",
    ".swap",
    ".timer",
    ".path",
    ".slice",
    ".scope",
];

/// Completes the name of a unit: a name without a type is that of a service.
pub fn unit(name: &str) -> String {
    if TYPES.iter().any(|end| name.ends_with(end)) { name.to_owned() } else { format!("{name}.service") }
}

/// The state of a service after the step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ServiceState {
    /// Start the service if it does not run.
    Running,
    /// Stop the service if it runs.
    Stopped,
    /// Restart the service in any case.
    Restarted,
}

impl ServiceState {
    /// All states.
    const ALL: [Self; 3] = [Self::Running, Self::Stopped, Self::Restarted];

    /// Their words in recipes.
    pub const WORDS: &[&str] = &[Self::Running.word(), Self::Stopped.word(), Self::Restarted.word()];

    /// Its word in recipes.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Stopped => "stopped",
            Self::Restarted => "restarted",
        }
    }

    /// The state with this word.
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.word() == word)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_unit_without_a_type_is_a_service() {
        for whole in ["mnt-data.automount", "swapfile.swap", "a@b.timer", "a.service"] {
            assert_eq!(unit(whole), whole);
        }
        assert_eq!(unit("openvpn@office"), "openvpn@office.service");
        assert_eq!(unit("org.example.daemon"), "org.example.daemon.service");
    }

    #[test]
    fn each_word_is_a_state_and_no_other() {
        for word in ServiceState::WORDS {
            assert_eq!(ServiceState::parse(word).map(ServiceState::word), Some(*word));
        }
        assert_eq!(ServiceState::parse("started"), None);
    }
}

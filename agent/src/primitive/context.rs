//! The context of a primitive: channel, ledger and the state of the current change.

use super::pending::Switch;
use crate::command::Output;
use crate::failure::Failure;
use crate::fetch::{Channel, Sender};
use crate::ledger::Ledger;

/// The context of a primitive.
pub(crate) struct Context<'a> {
    pub(crate) channel: &'a mut Channel,
    pub(crate) sender: &'a Sender,
    pub(crate) ledger: &'a mut Ledger,
    pub(crate) switch: &'a mut Switch,
    pub(crate) step: usize,
}

impl Context<'_> {
    pub(crate) fn output(&self) -> Output<'_> {
        Output { sender: self.sender, step: self.step, hidden: &[] }
    }

    /// Enables or disables the network.
    pub(crate) fn network(&mut self, open: bool) -> Result<(), Failure> {
        self.channel.network(open).map_err(|e| Failure::new(format!("can't change the network access: {e}")))
    }

    /// Adds a line to the output of the step.
    pub(crate) fn say(&self, line: &str) -> Result<(), Failure> {
        self.output().say(line).map_err(|e| Failure::new(format!("can't send to the host: {e}")))
    }
}

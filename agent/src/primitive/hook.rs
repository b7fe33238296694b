//! `on` and `operation`: scripts that stay in the machine and run later; see
//! [`crate::hooks`]. They are files of the agent, so they are reverted like files.

use super::context::Context;
use super::file;
use crate::failure::Failure;
use crate::hooks;
use crate::protocol::{Script, When};
use crate::system;

pub(super) fn apply(when: &When, script: &Script, context: &mut Context) -> Result<bool, Failure> {
    let user = &script.around.user;
    if system::user(user).is_none() {
        return Err(Failure::new(format!("there is no user `{user}` in the machine")));
    }
    // The names sort in the order of the layers and of their steps.
    let path = hooks::dir(when).join(format!("{}.{:05}", context.ledger.page(), context.step));
    let around = serde_json::to_string(&script.around).map_err(|e| Failure::new(e.to_string()))?;
    let changed = file::text(&hooks::around(&path), &around, context)?;
    Ok(file::apply(&path, script.content, 0o755, (0, 0), context)? || changed)
}

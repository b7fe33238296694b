//! Applies a layer: its steps in order, up to the first that fails.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::Path;

use crate::failure::HOME;
use crate::fetch::Channel;
use crate::offline::Guests;
use crate::primitive::{self, Context};
use crate::protocol::{FromAgent, Primitive};
use crate::system;

/// Applies `steps` beginning with `from`, up to the first that wants the
/// machine to boot again, and reports each. The returned message is the last.
pub(crate) fn apply(
    channel: &mut Channel,
    layer: &str,
    steps: &[Primitive],
    from: usize,
    offline: bool,
    boot_stamp: &mut String,
) -> io::Result<FromAgent> {
    let sender = channel.sender.clone();
    let guests = match Guests::enter(offline) {
        Ok(guests) => guests,
        Err(error) => return Ok(FromAgent::Refused { message: format!("prepare the layer: {error}") }),
    };
    for (step, primitive) in steps.iter().enumerate().skip(from) {
        sender.send(&FromAgent::Started { step })?;
        if matches!(primitive, Primitive::Reboot) {
            return Ok(FromAgent::RebootDue { step, boot_changed: boot_changed(boot_stamp) });
        }
        let mut context = Context { channel, sender: &sender, step };
        match primitive::apply(primitive, &mut context) {
            Ok(changed) => sender.send(&FromAgent::Finished { step, changed })?,
            Err(failure) => {
                return Ok(FromAgent::Failed { step, message: failure.message, exit: failure.exit });
            }
        }
    }
    drop(guests);
    if let Err(error) = note(layer) {
        let step = steps.len().saturating_sub(1);
        return Ok(FromAgent::Failed { step, message: format!("{HOME}/layers: {error}"), exit: None });
    }
    Ok(FromAgent::Done { boot_changed: boot_changed(boot_stamp) })
}

/// Whether the machine would boot something else than when `stamp` was taken.
fn boot_changed(stamp: &mut String) -> bool {
    let now = system::boot_stamp();
    let changed = now != *stamp;
    *stamp = now;
    changed
}

/// Keeps the machine's own list of its layers.
fn note(layer: &str) -> io::Result<()> {
    let _ = fs::remove_dir_all(Path::new(HOME).join("tmp"));
    fs::create_dir_all(HOME)?;
    let mut file = OpenOptions::new().append(true).create(true).open(Path::new(HOME).join("layers"))?;
    writeln!(file, "{layer}")
}

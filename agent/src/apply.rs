//! Applies a layer: its steps in order, up to the first that fails.

use std::fs;
use std::io;
use std::path::Path;

use crate::failure::HOME;
use crate::fetch::Channel;
use crate::ledger::Ledger;
use crate::offline::Guests;
use crate::packages;
use crate::primitive::{self, Context, Switch};
use crate::protocol::{Apply, FromAgent, Order};
use crate::resolver::Resolver;
use crate::system;

/// Applies steps up to the first `reboot`, and reports each of them. Returns the last
/// message to the host.
pub(crate) fn apply(channel: &mut Channel, what: &Apply, boot_stamp: &mut String) -> io::Result<FromAgent> {
    let Apply { layer, steps, from, offline, durable, host } = what;
    channel.forget_network();
    let from = *from;
    let sender = channel.sender.clone();
    let forbids = packages::find().ok().and_then(|packages| packages.forbids());
    let guests = match Guests::enter(*offline, host.as_deref(), forbids) {
        Ok(guests) => guests,
        Err(error) => return Ok(FromAgent::Refused { message: format!("prepare the layer: {error}") }),
    };
    let mut ledger = Ledger::below(Path::new(HOME), *durable);
    // After a reboot, continue the page of the current layer.
    let named = |o: &Order| if let Order::Layer { name } = o { Some(name.clone()) } else { None };
    if let Some(layer) = steps.iter().take(from).rev().find_map(named).or(layer.clone())
        && let Err(failure) = ledger.enter(&layer)
    {
        return Ok(failure.of(from));
    }
    let mut switch = Switch::default();
    for (step, order) in steps.iter().enumerate().skip(from) {
        sender.send(&FromAgent::Started { step })?;
        if order.is_reboot() {
            return Ok(FromAgent::RebootDue { step, boot_changed: boot_changed(boot_stamp) });
        }
        let entered = if order.wants_network() { Resolver::enter() } else { Ok(None) };
        let resolver = match entered {
            Ok(resolver) => resolver,
            Err(error) => return Ok(FromAgent::Refused { message: format!("prepare the network: {error}") }),
        };
        let mut context =
            Context { channel, sender: &sender, ledger: &mut ledger, switch: &mut switch, step };
        let made = primitive::settle(Some(order), &mut context)
            .and_then(|()| primitive::apply(order, &mut context))
            .and_then(|changed| match steps.get(step + 1) {
                Some(_) => Ok(changed),
                None => primitive::settle(None, &mut context).map(|()| changed),
            });
        drop(resolver);
        match made {
            Ok(changed) => sender.send(&FromAgent::Finished { step, changed })?,
            Err(failure) => return Ok(failure.of(step)),
        }
    }
    drop(guests);
    let _ = fs::remove_dir_all(Path::new(HOME).join("tmp"));
    Ok(FromAgent::Done { boot_changed: boot_changed(boot_stamp) })
}

/// Whether the machine would boot another kernel or initrd than when `stamp` was taken.
/// Updates `stamp`.
fn boot_changed(stamp: &mut String) -> bool {
    let now = system::boot_stamp();
    let changed = now != *stamp;
    *stamp = now;
    changed
}

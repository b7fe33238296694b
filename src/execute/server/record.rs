//! The record of a server, and how it boots from it.

use std::path::{Path, PathBuf};

use vimg_lang::model::{Forward, Machine};

use crate::graph::ServerPart;
use crate::provider::{Lasting, Launch, Retarget};
use crate::store::{self, ServerHome, read_server};

/// The longest chain of disks that a server may have. Each change adds one, and
/// a chain of 128 disks takes twice as long to read.
pub(super) const MOST_DISKS: usize = 100;

/// The record of a server.
pub type ServerRecord = store::ServerRecord<ServerPart>;

/// Reads the record of a server. Returns `None` if there is none that this
/// version can read.
pub fn known(dir: &Path) -> Option<ServerRecord> {
    read_server(dir)
}

pub(super) fn forwards(record: &ServerRecord) -> Vec<Forward> {
    let forward = |(address, host, guest): &(String, u16, u16)| Forward {
        address: address.clone(),
        host: *host,
        guest: *guest,
    };
    record.forwards.iter().map(forward).collect()
}

pub(super) fn lead(record: &mut ServerRecord, forwards: &[Forward]) {
    record.forwards = forwards.iter().map(|f| (f.address.clone(), f.host, f.guest)).collect();
}

/// Returns the request to boot a server from its own disks.
pub(super) fn launch(home: &ServerHome, record: &ServerRecord, boot: Option<(PathBuf, PathBuf)>) -> Launch {
    let (cpus, memory, disk) = record.machine;
    let parameters: Vec<&str> =
        record.parts.iter().flat_map(|part| &part.kernel_parameters).map(String::as_str).collect();
    Launch {
        chain: home.chain(record),
        overlay: home.overlay(record),
        again: true,
        machine: Machine { cpus, memory, disk },
        parameters: parameters.join(" "),
        boot,
        offline: None,
        memory: None,
        network: true,
        retarget: Retarget::Never,
        scratch: home.dir().to_owned(),
        watched: false,
        lasting: Some(Lasting { forwards: forwards(record) }),
    }
}

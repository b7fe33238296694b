//! Whether what is made in a machine may be kept that booted from other disks
//! than it is to stand on.

use std::path::PathBuf;
use std::sync::Arc;

use crate::ext4::Altered;
use crate::graph::SECRET;
use crate::provider::Carried;
use crate::store::{Record, Store};

/// The state whose disk it stands on, and what is to be changed of it for one
/// that is made on `wanted`. A sentence says why it may not be kept.
pub(super) fn vet(
    store: &Store,
    wanted: &[PathBuf],
    carried: &Carried,
) -> Result<(Record, Arc<[Altered]>), String> {
    let owners = |chain: &[PathBuf]| chain.iter().map(|disk| store.owner(disk)).collect::<Option<Vec<_>>>();
    let (Some(there), Some(here)) = (owners(&carried.chain), owners(wanted)) else {
        return Err("the disk that a kept one booted from went away".into());
    };
    // Who sends what lies on it to a cache sends the disk below as well.
    let foreign = |record: &&Record| here.iter().all(|own| own.key != record.key);
    if let Some(record) = there.iter().filter(foreign).find(|record| hands_secrets(record)) {
        return Err(format!("a kept one booted from {}, which was handed a secret", record.name));
    }
    let set_by_clock = |all: &[Record], seconds: i64| all.iter().any(|r| r.during().contains(&seconds));
    let altered = carried.altered.iter().cloned().map(|mut altered| {
        let change = &mut altered.change;
        change.chosen =
            !set_by_clock(&there, change.modified.seconds) || !set_by_clock(&here, change.to.seconds);
        altered
    });
    let altered = altered.collect();
    there.into_iter().next_back().map(|top| (top, altered)).ok_or_else(|| "it stands on no disk".into())
}

/// Whether a state's layer was handed what must not leave with what others
/// made.
pub(super) fn hands_secrets(record: &Record) -> bool {
    record.description.fields.iter().any(|field| field.name.starts_with(SECRET))
}

#[cfg(test)]
mod tests {
    use vimg_agent::protocol::{Change, Inode, Time};

    use super::*;
    use crate::digest::{Description, Digest, Key};
    use crate::store::{Disk, DiskKind};

    /// Commits a state and gives the path of its disk.
    fn state(store: &Store, name: &str, field: &str) -> PathBuf {
        let key = Key(Digest::of(name.as_bytes()));
        let mut description = Description::default();
        description.value(field, "1");
        let disk = Disk { kind: DiskKind::Qcow2, backing: None, depth: 0 };
        let mut record = Record::new(key, "layer", name, description, disk);
        (record.made, record.seconds) = (1000, 5.0);
        let staging = store.staging().unwrap();
        std::fs::write(staging.path().join("disk.qcow2"), name).unwrap();
        store.commit(staging, &record).unwrap();
        store.state_dir(&key).join("disk.qcow2")
    }

    fn carried(chain: &[&PathBuf], to: i64) -> Carried {
        let change = Change {
            inode: Inode { number: 20, generation: 1 },
            size: 5,
            modified: Time { seconds: 998, nanoseconds: 0 },
            to: Time { seconds: to, nanoseconds: 0 },
            chosen: false,
            content: None,
            path: None,
        };
        let altered = Arc::new([Altered { change, content: None }]);
        Carried { altered, chain: chain.iter().map(|path| (*path).clone()).collect() }
    }

    #[test]
    fn what_stands_on_a_foreign_secret_is_not_kept() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let [base, plain, secret] =
            [("base", "a"), ("plain", "b"), ("secret", "run secret token")].map(|(n, f)| state(&store, n, f));
        let vet = |wanted: &[&PathBuf], there: &[&PathBuf]| {
            let wanted: Vec<PathBuf> = wanted.iter().map(|path| (*path).clone()).collect();
            super::vet(&store, &wanted, &carried(there, 1000)).map(|(below, _)| below.name)
        };
        assert_eq!(vet(&[&base], &[&base, &plain]), Ok("plain".to_owned()));
        assert!(vet(&[&base, &plain], &[&base, &secret]).unwrap_err().contains("secret"));
        assert_eq!(vet(&[&base, &secret, &plain], &[&base, &secret]), Ok("secret".to_owned()));
        let gone = dir.path().join("states/x/disk.qcow2");
        assert!(vet(&[&base], &[&gone]).is_err());
    }

    #[test]
    fn times_that_no_layer_was_made_at_were_chosen() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let [a, b] = ["a", "b"].map(|name| state(&store, name, "x"));
        let chosen = |to| {
            let (_, altered) = vet(&store, std::slice::from_ref(&b), &carried(&[&a], to)).unwrap();
            altered[0].change.chosen
        };
        assert!(!chosen(996) && chosen(1_577_836_800) && chosen(900));
    }
}

//! Decides whether a layer built in a retargeted snapshot may be stored.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use crate::disk::ext4::Altered;
use crate::provider::Retargeted;
use crate::store::{Record, Store};

/// The most layers whose times are compared.
const MOST_LAYERS: usize = 256;

/// Returns the state whose disk the snapshot booted from, and the files to
/// change for a layer on `wanted`. The error says why the layer may not be
/// stored.
pub(super) fn vet(
    store: &Store,
    wanted: &[PathBuf],
    retargeted: &Retargeted,
) -> Result<(Record, Arc<[Altered]>), String> {
    let owners = |chain: &[PathBuf]| chain.iter().map(|disk| store.owner(disk)).collect::<Option<Vec<_>>>();
    let (Some(there), Some(here)) = (owners(&retargeted.chain), owners(wanted)) else {
        return Err("a disk of the snapshot was removed".into());
    };
    let [gone, come] = [foreign(&there, &here), foreign(&here, &there)];
    // A layer goes to a cache together with the disks below it, so a secret of
    // the snapshot's disk would go along. A secret of the wanted disk would be
    // written into the layer, and no record would say so.
    if let Some(record) = gone.iter().chain(&come).find(|record| hands_secrets(record)) {
        return Err(format!("only one of the disks has {}, which received a secret", record.name));
    }
    let [gone, come] = [gone, come].map(|records| times(store, &records, &[&there, &here]));
    let during = |times: &[Range<i64>], seconds: i64| times.iter().any(|range| range.contains(&seconds));
    let altered = retargeted.altered.iter().cloned().map(|mut altered| {
        let change = &mut altered.change;
        change.chosen = !during(&gone, change.modified.seconds) || !during(&come, change.to.seconds);
        altered
    });
    let altered = altered.collect();
    there.into_iter().next_back().map(|top| (top, altered)).ok_or_else(|| "the snapshot has no disk".into())
}

/// Returns the states of a chain that another one lacks.
fn foreign<'a>(chain: &'a [Record], other: &[Record]) -> Vec<&'a Record> {
    chain.iter().filter(|record| other.iter().all(|there| there.key != record.key)).collect()
}

/// Returns when these layers were built, and when the layers were built that
/// the recipe has below them. A layer built in a retargeted snapshot contains
/// files of the latter, which are not on the disks below it. Leaves out layers
/// that both chains have.
fn times(store: &Store, records: &[&Record], chains: &[&[Record]; 2]) -> Vec<Range<i64>> {
    let mut times = Vec::new();
    for record in records {
        let mut next = Some((*record).clone());
        while let Some(record) = next.filter(|_| times.len() < MOST_LAYERS) {
            times.push(record.during());
            let parent = record.description.facts.parent.and_then(|key| store.record(&key));
            let shared = |one: &Record| chains.iter().all(|chain| chain.iter().any(|r| r.key == one.key));
            next = parent.filter(|parent| !shared(parent));
        }
    }
    times
}

/// Whether the layer of a state received a secret.
pub(super) fn hands_secrets(record: &Record) -> bool {
    !record.description.facts.secrets.is_empty()
}

#[cfg(test)]
mod tests {
    use vimg_agent::protocol::{Change, Inode, Time};

    use super::*;
    use crate::digest::{Description, Digest, Key};
    use crate::store::{Disk, DiskKind};

    /// Commits a state and returns the path of its disk.
    fn state(store: &Store, name: &str, field: &str) -> PathBuf {
        let key = Key(Digest::of(name.as_bytes()));
        let mut description = Description::default();
        match field.strip_prefix("secret ") {
            Some(secret) => description.secret(secret, 1),
            None => description.value(field, "1"),
        }
        let disk = Disk { kind: DiskKind::Qcow2, backing: None, depth: 0 };
        let mut record = Record::new(key, "layer", name, description, disk);
        (record.made, record.seconds) = (1000, 5.0);
        let staging = store.staging().unwrap();
        std::fs::write(staging.path().join("disk.qcow2"), name).unwrap();
        store.commit(staging, &record).unwrap();
        store.state_dir(&key).join("disk.qcow2")
    }

    fn retargeted(chain: &[&PathBuf], to: i64) -> Retargeted {
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
        Retargeted { altered, chain: chain.iter().map(|path| (*path).clone()).collect() }
    }

    #[test]
    fn what_stands_on_a_foreign_secret_is_not_kept() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let [base, plain, secret] =
            [("base", "a"), ("plain", "b"), ("secret", "secret token")].map(|(n, f)| state(&store, n, f));
        let vet = |wanted: &[&PathBuf], there: &[&PathBuf]| {
            let wanted: Vec<PathBuf> = wanted.iter().map(|path| (*path).clone()).collect();
            super::vet(&store, &wanted, &retargeted(there, 1000)).map(|(below, _)| below.name)
        };
        assert_eq!(vet(&[&base], &[&base, &plain]), Ok("plain".to_owned()));
        assert!(vet(&[&base, &plain], &[&base, &secret]).unwrap_err().contains("secret"));
        assert!(vet(&[&base, &secret], &[&base, &plain]).unwrap_err().contains("secret"));
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
            let (_, altered) = vet(&store, std::slice::from_ref(&b), &retargeted(&[&a], to)).unwrap();
            altered[0].change.chosen
        };
        assert!(!chosen(996) && chosen(1_577_836_800) && chosen(900));
        // A layer that both chains have did not change the file, whenever it
        // was built.
        let both = super::vet(&store, std::slice::from_ref(&a), &retargeted(&[&a], 996)).unwrap().1;
        assert!(both[0].change.chosen);
    }
}

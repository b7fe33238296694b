//! Caches: one conformance test for all of them, in memory and on real servers;
//! what a server or a writer may do wrong; and a proxy that does all of that.

#![expect(clippy::unwrap_used, reason = "a test that can't go on fails")]

#[path = "caches/common.rs"]
mod common;
#[path = "caches/faults.rs"]
mod faults;
#[path = "caches/poison.rs"]
mod poison;
#[path = "common/port.rs"]
mod port;
#[path = "caches/s3s.rs"]
mod s3_here;
#[path = "caches/servers.rs"]
mod servers;
#[path = "caches/upkeep.rs"]
mod upkeep;

use std::sync::Arc;
use std::time::Duration;

use common::{Runner, listed, wait};
use vimg::cache::gc::{self, Keep};
use vimg::cache::object::Object;
use vimg::cache::remote::Remote;
use vimg::cache::spec::Spec;

/// What a kind of cache can't do.
#[derive(Default, Clone, Copy)]
struct Lacks {
    /// vimg can't delete from it, because it cleans up by its own rules.
    deletion: bool,
}

/// Tests what every cache must do. `spec` describes the cache, without its
/// domain.
fn behaves(spec: &str, lacks: Lacks) {
    let open =
        |to: bool| Arc::new(Remote::open(Spec::parse(&format!("{spec},domain=main"), to).unwrap()).unwrap());
    let mut first = Runner::new();
    let (base, layer, output) = first.project(1);
    let all = [base, layer, output];

    // An empty cache finds nothing.
    let reader = open(false);
    assert!(wait(first.with(&reader, None).find(&first.names(&all), &first.sink())).is_empty());

    // Everything is sent once, and not a second time.
    let writer = open(true);
    let caches = first.with(&reader, Some(&writer));
    let pushed = first.push(&caches, &writer, &all);
    assert_eq!((pushed.sent, pushed.there), (3, 0));
    assert!(pushed.bytes > 1_900_000, "noise can't be compressed: {}", pushed.bytes);
    let again = first.push(&caches, &writer, &all);
    assert_eq!((again.sent, again.there, again.bytes), (0, 3, 0));

    // Of two writers of a new object, only the first succeeds.
    let note = Object::Build { domain: "main".into(), name: "note".into() };
    assert!(wait(writer.put_new(&note, &b"first"[..], &[])).unwrap());
    assert!(!wait(writer.put_new(&note, &b"second"[..], &[])).unwrap());
    assert_eq!(wait(reader.get(&note, 100)).unwrap().unwrap(), b"first");

    // Another runner has nothing. It fetches an output without the states
    // below.
    let second = Runner::new();
    let reader = open(false);
    let caches = second.with(&reader, None);
    second.fetch(&caches, output).unwrap();
    assert!(second.same(&first, output));
    assert!(!second.store.has(&base) && !second.store.has(&layer));
    let (down, up, _) = reader.moved();
    assert!(down < 1_100_000 && up == 0, "{down} read, {up} written");

    // A layer comes with the disks below it.
    second.fetch(&caches, layer).unwrap();
    assert!(second.same(&first, layer) && second.same(&first, base));
    assert_eq!(second.store.chain(&layer).unwrap().len(), 2);
    // A fetched state is not sent back, but a layer built on it is sent.
    let writer = open(true);
    let caches = second.with(&reader, Some(&writer));
    let mut second = second;
    let more = second.layer("web@more", layer, 9);
    let pushed = second.push(&caches, &writer, &[base, layer, more]);
    assert_eq!((pushed.sent, pushed.there), (1, 2));
    assert!(pushed.bytes < 500_000, "{}", pushed.bytes);

    // One byte of an output changes, and only that change is sent.
    let changed = second.changed_output(output);
    let pushed = second.push(&caches, &writer, &[changed]);
    assert_eq!(pushed.sent, 1);
    assert!(pushed.bytes < 100_000, "{}", pushed.bytes);
    let third = Runner::new();
    let reader = open(false);
    third.fetch(&third.with(&reader, None), changed).unwrap();
    assert!(third.same(&second, changed) && !third.same_files(&first, changed, output));

    // All its states are listed, and good.
    let listing = wait(gc::list(&reader)).unwrap();
    assert_eq!(listed(&listing).len(), 5);
    let caches = first.with(&reader, None);
    let verified = wait(caches.verify(&reader, true)).unwrap();
    assert_eq!((verified.good, verified.wrong.len()), (5, 0), "{:?}", verified.wrong);
    // Everything can be copied to another cache, and used there.
    let id = vimg::digest::Digest::of(spec.as_bytes());
    let copy = Spec::parse(&format!("type=memory,id={id},domain=main"), true).unwrap();
    let copy = Arc::new(Remote::open(copy).unwrap());
    let copied = wait(caches.copy(&reader, &copy)).unwrap();
    assert_eq!((copied.records, copied.damaged), (5, 0));
    let again = wait(caches.copy(&reader, &copy)).unwrap();
    assert_eq!((again.records, again.damaged), (0, 0));
    if lacks.deletion {
        return;
    }

    // Nothing is old, so nothing is deleted.
    let keep = |age: Option<u64>, size: Option<u64>, grace: u64| Keep {
        age: age.map(Duration::from_secs),
        size,
        grace: Duration::from_secs(grace),
        dry_run: false,
    };
    let clean = |keep: &Keep| wait(gc::clean(&reader, keep)).unwrap();
    let cleaned = clean(&keep(Some(3600), None, 0));
    assert_eq!((cleaned.records, cleaned.packs, cleaned.tombstones), (0, 0, 0));
    // The cache is too large. Records are deleted first, and packs only at the
    // next collection, so that a running build still finds the packs of records
    // that it has read.
    let cleaned = clean(&keep(None, Some(0), 3600));
    assert_eq!((cleaned.records, cleaned.packs), (5, 0));
    assert!(cleaned.tombstones > 3);
    assert_eq!(clean(&keep(None, None, 3600)).packs, 0, "not so long ago");
    let gone = clean(&keep(None, None, 0));
    assert_eq!((gone.packs, gone.left), (cleaned.tombstones, 0));
    let listing = wait(gc::list(&reader)).unwrap();
    assert!(listing.records.is_empty() && listing.packs.is_empty());
}

#[test]
fn memory_behaves() {
    behaves("type=memory,id=template", Lacks::default());
}

#[test]
fn a_directory_behaves() {
    let dir = tempfile::tempdir().unwrap();
    behaves(&format!("type=local,src={0},dest={0}", dir.path().display()), Lacks::default());
}

#[test]
fn s3_in_this_process_behaves() {
    let server = s3_here::serve();
    behaves(&server.spec(), Lacks::default());
}

#[test]
fn moto_behaves() {
    let server = servers::moto();
    behaves(&server.spec(), Lacks::default());
}

#[test]
fn webdav_behaves() {
    let server = servers::webdav();
    behaves(&server.spec(), Lacks::default());
}

#[test]
fn a_registry_behaves() {
    let server = servers::registry();
    behaves(&server.spec(), Lacks { deletion: true });
}

#[test]
fn a_registry_with_a_password_behaves() {
    let server = servers::registry_with_password();
    behaves(&server.spec(), Lacks { deletion: true });
}

#[test]
fn azure_behaves() {
    let server = servers::azurite();
    behaves(&server.spec(), Lacks::default());
}

#[test]
fn google_behaves() {
    let server = servers::google();
    behaves(&server.spec(), Lacks::default());
}

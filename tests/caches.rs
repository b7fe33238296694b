//! Caches: one set of demands on all of them, in memory and real servers; what
//! a server or its writer may do wrong; and a proxy that does all of it.

#![expect(clippy::unwrap_used, reason = "a test that can't go on fails")]

#[path = "caches/common.rs"]
mod common;
#[path = "caches/faults.rs"]
mod faults;
#[path = "caches/poison.rs"]
mod poison;
#[path = "caches/s3s.rs"]
mod s3_here;
#[path = "caches/servers.rs"]
mod servers;
#[path = "caches/upkeep.rs"]
mod upkeep;

use std::sync::Arc;
use std::time::Duration;

use common::{Runner, listed, wait};
use vimg::cache::keep::{self, Keep};
use vimg::cache::object::Object;
use vimg::cache::remote::Remote;
use vimg::cache::spec::Spec;

/// What a cache can't do, for it is not made for it.
#[derive(Default, Clone, Copy)]
struct Lacks {
    /// It cleans up by its own rules.
    deletion: bool,
}

/// What is demanded of every cache. `spec` names it without the words that
/// tell reading from writing apart.
fn behaves(spec: &str, lacks: Lacks) {
    let open =
        |to: bool| Arc::new(Remote::open(Spec::parse(&format!("{spec},domain=main"), to).unwrap()).unwrap());
    let mut first = Runner::new();
    let (base, layer, output) = first.project(1);
    let all = [base, layer, output];

    // It is empty, and says so.
    let reader = open(false);
    assert!(wait(first.with(&reader, None).find(&first.names(&all), &first.sink())).is_empty());

    // Everything is sent once, and not again.
    let writer = open(true);
    let caches = first.with(&reader, Some(&writer));
    let pushed = first.push(&caches, &writer, &all);
    assert_eq!((pushed.sent, pushed.there), (3, 0));
    assert!(pushed.bytes > 1_900_000, "noise can't be compressed: {}", pushed.bytes);
    let again = first.push(&caches, &writer, &all);
    assert_eq!((again.sent, again.there, again.bytes), (0, 3, 0));

    // Of two who write what was not there, one is the first.
    let note = Object::Build { domain: "main".into(), name: "note".into() };
    assert!(wait(writer.put_new(&note, &b"first"[..], &[])).unwrap());
    assert!(!wait(writer.put_new(&note, &b"second"[..], &[])).unwrap());
    assert_eq!(wait(reader.get(&note, 100)).unwrap().unwrap(), b"first");

    // Another runner has nothing. It gets an output without what is below.
    let second = Runner::new();
    let reader = open(false);
    let caches = second.with(&reader, None);
    second.fetch(&caches, output).unwrap();
    assert!(second.same(&first, output));
    assert!(!second.store.has(&base) && !second.store.has(&layer));
    let (down, up, _) = reader.moved();
    assert!(down < 1_100_000 && up == 0, "{down} read, {up} written");

    // A layer comes with what it lies on.
    second.fetch(&caches, layer).unwrap();
    assert!(second.same(&first, layer) && second.same(&first, base));
    assert_eq!(second.store.chain(&layer).unwrap().len(), 2);
    // What came is not sent back, and what is built on it is.
    let writer = open(true);
    let caches = second.with(&reader, Some(&writer));
    let mut second = second;
    let more = second.layer("web@more", layer, 9);
    let pushed = second.push(&caches, &writer, &[base, layer, more]);
    assert_eq!((pushed.sent, pushed.there), (1, 2));
    assert!(pushed.bytes < 500_000, "{}", pushed.bytes);

    // One byte of an output changes: that is what is sent.
    let changed = second.changed_output(output);
    let pushed = second.push(&caches, &writer, &[changed]);
    assert_eq!(pushed.sent, 1);
    assert!(pushed.bytes < 100_000, "{}", pushed.bytes);
    let third = Runner::new();
    let reader = open(false);
    third.fetch(&third.with(&reader, None), changed).unwrap();
    assert!(third.same(&second, changed) && !third.same_files(&first, changed, output));

    // What it holds is listed, and good.
    let listing = wait(keep::list(&reader)).unwrap();
    assert_eq!(listed(&listing).len(), 5);
    let caches = first.with(&reader, None);
    let verified = wait(caches.verify(&reader, true)).unwrap();
    assert_eq!((verified.good, verified.wrong.len()), (5, 0), "{:?}", verified.wrong);
    // All of it can be copied elsewhere, and used there.
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

    // Nothing is old: nothing goes.
    let keep = |age: Option<u64>, size: Option<u64>, grace: u64| Keep {
        age: age.map(Duration::from_secs),
        size,
        grace: Duration::from_secs(grace),
        dry_run: false,
    };
    let clean = |keep: &Keep| wait(keep::clean(&reader, keep)).unwrap();
    let cleaned = clean(&keep(Some(3600), None, 0));
    assert_eq!((cleaned.records, cleaned.packs, cleaned.condemned), (0, 0, 0));
    // Too much of it: records go first, and packs only the time after, so that
    // a build that is under way finds what it has seen.
    let cleaned = clean(&keep(None, Some(0), 3600));
    assert_eq!((cleaned.records, cleaned.packs), (5, 0));
    assert!(cleaned.condemned > 3);
    assert_eq!(clean(&keep(None, None, 3600)).packs, 0, "not so long ago");
    let gone = clean(&keep(None, None, 0));
    assert_eq!((gone.packs, gone.left), (cleaned.condemned, 0));
    let listing = wait(keep::list(&reader)).unwrap();
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

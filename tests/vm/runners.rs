//! Two machines that share only a cache.

#[path = "../caches/servers.rs"]
#[expect(dead_code, reason = "the tests of caches use the others")]
mod servers;

use std::collections::BTreeMap;
use std::path::Path;

use vimg::cache::sign::Signer;
use vimg::digest::Key;
use vimg::store::Store;

use crate::machines::{Project, Tested};

/// Returns the states of a store, with the ID of each.
fn states(store: &Path) -> BTreeMap<Key, String> {
    let store = Store::open(store).unwrap();
    store.states().into_iter().map(|record| (record.key, record.id.to_string())).collect()
}

/// Returns how many bytes were read from caches and written to them.
fn moved(tested: &Tested) -> (u64, u64) {
    let caches = tested.all("cache");
    let sum = |member: &str| caches.iter().map(|event| event[member].as_u64().unwrap()).sum();
    (sum("down"), sum("up"))
}

#[test]
fn a_second_runner_builds_only_missing_states() {
    let server = servers::moto();
    let (from, to) = (format!("--cache-from={}", server.spec()), format!("--cache-to={}", server.spec()));
    let key = Signer::generate().unwrap().secret();
    let runner = |name: &str| Project::copy_of(&format!("{name}/web"), "examples/web");
    let (one, two) = (runner("runner-1"), runner("runner-2"));
    let run = |project: &Project, store: Option<&Path>, args: &[&str]| {
        let tested = project.vimg_with(args, |command| {
            command.env("VIMG_CACHE_KEY", &key);
            command.envs(store.map(|store| ("VIMG_STORE", store)));
        });
        tested.succeeds();
        tested
    };
    let first = run(&one, None, &["build", &to]);
    let (_, all) = moved(&first);
    assert!(all > 100_000_000, "{all} bytes are no image");

    // Without a signing key, vimg says so, even if there is nothing to build.
    let keyless = one.vimg(&["build", &to]);
    keyless.succeeds();
    assert!(keyless.stdout.contains("there is no signing key"), "{}", keyless.stdout);

    // The cache has everything: nothing is built or started, and vimg fetches
    // only the disk and the results of checks.
    let store = two.empty_store();
    let second = run(&two, Some(&store), &["build", &from]);
    assert_eq!((second.boots(), second.built()), (0, vec![]));
    assert_eq!(second.all("fetched").len(), 3, "a disk and two checks");
    // `planned` comes before all progress, so that a program knows the amount of work.
    let first = |event: &str| second.stdout.lines().position(|line| line.contains(&format!("\"{event}\"")));
    assert!(first("planned").is_some() && first("planned") < first("moving"), "{}", second.stdout);
    let disk = |project: &Project| std::fs::read(project.path("web.qcow2")).unwrap();
    assert!(disk(&one) == disk(&two), "the disks differ");
    let (down, _) = moved(&second);
    assert!(down < disk(&two).len() as u64 + 2_000_000, "{down} bytes were read");

    // An edit that other tests of this example do not make, because they share
    // a store with the first runner. vimg fetches the layer below, and builds
    // nothing else.
    two.edit("site/404.html", "Not here", "Nothing there");
    two.give_away();
    let plan = run(&two, Some(&store), &["plan", &from]);
    assert!(plan.stdout.contains("differs from the cached one in: file site/404.html"), "{}", plan.stdout);
    let edited = run(&two, Some(&store), &["build", "--no-output", &from, &to]);
    let mut built = edited.built();
    built.sort();
    assert_eq!((edited.boots(), built), (0, vec!["web@site".to_owned(), "web@tuning".to_owned()]));
    let (_, up) = moved(&edited);
    assert!(up < 8_000_000, "{up} bytes were written for one of a page");

    // Both stores have the same builds of states.
    let (ours, theirs) = (states(&store), states(&Project::common_store()));
    let shared: Vec<&Key> = ours.keys().filter(|key| theirs.contains_key(key)).collect();
    assert!(shared.len() >= 5, "{shared:?}");
    assert!(shared.iter().all(|key| ours[key] == theirs[key]));

    // The first runner makes the same edit, and fetches the layers of the
    // second.
    one.edit("site/404.html", "Not here", "Nothing there");
    one.give_away();
    let back = run(&one, None, &["build", "--no-output", &from]);
    assert_eq!((back.boots(), back.built()), (0, vec![]));
}

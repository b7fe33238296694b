//! The store beside builds and servers: what a garbage collection may take, and
//! what a full disk does. Machines are maps in memory (`common`); everything
//! above them is real.

#![expect(clippy::unwrap_used, reason = "a test that can't go on fails")]

mod common;
#[path = "store/bench.rs"]
mod bench;
#[path = "store/full.rs"]
mod full;
#[path = "store/kills.rs"]
mod kills;
#[path = "store/servers.rs"]
mod servers;

use bench::{Bench, build, images};
use common::Fake;

#[test]
fn what_left_the_recipe_is_free_and_what_was_not_asked_for_stays() {
    let bench = Bench::new();
    bench.write(&images(&["a", "b"]));
    let built = build(&bench.project, &bench.store, Fake::default(), |_| true);
    assert_eq!((built.outcome.failures.len(), built.notices.len()), (0, 0));
    assert_eq!(bench.states(), ["a@ca", "b@cb", "base:base"]);
    // A build of one image does not give up the others.
    build(&bench.project, &bench.store, Fake::default(), |image| image == "a");
    assert_eq!(bench.collect(), [""; 0]);
    // The recipe gives up an image with the next build.
    bench.write(&images(&["a"]));
    assert_eq!(bench.collect(), [""; 0]);
    build(&bench.project, &bench.store, Fake::default(), |image| image == "a");
    assert_eq!(bench.collect(), ["b@cb"]);
    assert_eq!(bench.states(), ["a@ca", "base:base"]);
}

//! Builds on a disk that is full.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use vimg::execute::FailureKind;
use vimg::store::{Area, Store};

use super::bench::{Bench, build, images};
use crate::common::{Fake, Full, read_state};

/// Says that the disk is full as soon as the store has more than so many
/// states.
fn holds(bench: &Bench, most: usize) -> Full {
    let states = bench.store.dir(Area::States);
    Arc::new(move || std::fs::read_dir(&states).unwrap().count() > most)
}

/// Leaves states in the store that nothing needs: those of `count` earlier
/// contents of a layer.
fn leave(bench: &Bench, count: usize) {
    for n in 0..=count {
        bench.write(&images(&["a"]).replace("content=\"1\"", &format!("content=\"old {n}\"")));
        build(&bench.project, &bench.store, Fake::default(), |_| true);
    }
}

#[test]
fn a_full_disk_is_cleaned_up_and_the_build_goes_on() {
    let bench = Bench::new();
    leave(&bench, 8);
    // Base, one state that the project needs, and eight that nothing needs.
    assert_eq!(bench.store.states().len(), 10);
    let recipe = images(&["a", "b", "c"]).replace("content=\"1\"", "content=\"new\"");
    let checked = "image \"d\" { from \"a\"; output \"qcow2\" path=\"d\"; check \"c\" { run \"true\" } }\n";
    bench.write(&(recipe + checked));
    // Machines stop; bases and conversions can't be written.
    let fake = Fake { full: Some(holds(&bench, 9)), ..Fake::default() };
    let built = build(&bench.project, &bench.store, fake, |_| true);
    assert!(built.outcome.failures.is_empty(), "{:?}", built.outcome.failures);
    // Three layers, a check, a seal and an output, on top of the base.
    assert_eq!((built.outcome.built, built.notices.len()), (6, 1), "{:?}", built.notices);
    assert_eq!(built.notices[0], "the disk is full: vimg removed 1 MiB that nothing needs from the store");
    let states = bench.states();
    assert_eq!(states, ["a@ca", "a@ca", "b@cb", "base:base", "c@cc", "d:check/c", "d:qcow2", "d:seal"]);
    let top = bench.store.states().into_iter().find(|record| record.name == "d:qcow2").unwrap();
    let disk = bench.store.state_dir(&top.key).join("disk.qcow2");
    assert_eq!(read_state(&disk)["format"], "qcow2");
}

#[test]
fn a_full_disk_with_nothing_to_remove_is_the_error() {
    let bench = Bench::new();
    bench.write(&images(&["a"]));
    let fake = Fake { full: Some(holds(&bench, 0)), ..Fake::default() };
    let built = build(&bench.project, &bench.store, fake, |_| true);
    let [failure] = &built.outcome.failures[..] else { panic!("{:?}", built.outcome.failures) };
    assert_eq!((failure.kind, built.launches), (FailureKind::Full, 1));
    assert_eq!(failure.message, "the disk that holds the store is full");
    assert!(failure.help.as_ref().unwrap().contains("Make room on the host's disk of"));
    assert_eq!(built.notices, ["the disk is full: the store has nothing to remove"]);
    assert_eq!(bench.states(), ["base:base"]);
    // With room, the next build continues.
    let built = build(&bench.project, &bench.store, Fake::default(), |_| true);
    assert_eq!((built.outcome.failures.len(), built.outcome.built), (0, 1));
}

#[test]
fn a_disk_that_stays_full_is_tried_once_more() {
    let bench = Bench::new();
    leave(&bench, 3);
    bench.write(&images(&["a", "b"]).replace("content=\"1\"", "content=\"new\""));
    let fake = Fake { full: Some(Arc::new(|| true)), ..Fake::default() };
    let built = build(&bench.project, &bench.store, fake, |_| true);
    // Both layers were running when the garbage was collected.
    assert_eq!((built.outcome.failures.len(), built.launches, built.notices.len()), (2, 4, 1));
    assert!(built.outcome.failures.iter().all(|failure| failure.kind == FailureKind::Full));
    assert_eq!(bench.states(), ["a@ca", "base:base"]);
}

/// Mounts a small filesystem in memory for this thread and those that it
/// starts. Returns whether that is permitted.
fn mount(dir: &Path, bytes: usize) -> bool {
    use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
    // SAFETY: the thread shares no descriptors with others that this affects.
    if unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) }.is_err() {
        return false;
    }
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
    let options = std::ffi::CString::new(format!("size={bytes}")).unwrap();
    mount("tmpfs", dir, "tmpfs", MountFlags::empty(), Some(options.as_c_str())).unwrap();
    true
}

/// The build below needs at least so many pages of its disk: one for its lease,
/// and two for each state. It can do without the logs.
const ROOMS: u64 = 5;

/// The last page of a real disk is taken, wherever the build needs the next
/// one. It goes on. Only root can mount the disk.
#[test]
fn a_real_disk_may_be_full_anywhere() {
    let test = || {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        if !mount(dir.path(), 2 << 20) {
            return;
        }
        let mut collected = 0;
        // So many pages are free when the build begins.
        for room in 0..ROOMS {
            let root = dir.path().join(format!("store-{room}"));
            let bench = Bench { store: Store::open(&root).unwrap(), ..Bench::new() };
            leave(&bench, 10);
            let ballast = std::fs::File::create(dir.path().join("ballast")).unwrap();
            let fill = |bytes: usize| (&ballast).write_all(&vec![1; bytes]);
            while fill(4096).is_ok() {}
            let length = ballast.metadata().unwrap().len();
            ballast.set_len(length.next_multiple_of(4096) - room * 4096).unwrap();
            bench.write(&images(&["a", "b"]));
            let built = build(&bench.project, &bench.store, Fake::default(), |_| true);
            assert!(built.outcome.failures.is_empty(), "{room}: {:?}", built.outcome.failures);
            assert_eq!((bench.states().len(), built.outcome.built), (4, 2), "{room}");
            collected += built.notices.len();
            std::fs::remove_dir_all(&root).unwrap();
            std::fs::remove_file(dir.path().join("ballast")).unwrap();
        }
        assert_eq!(collected, ROOMS as usize, "each of these disks was full");
    };
    std::thread::spawn(test).join().unwrap();
}

//! Servers and the states that they stand on.

use std::path::PathBuf;

use vimg::execute::server::Came;
use vimg::store::Area;

use super::bench::{Bench, build, images, up};
use crate::common::{Fake, read_state};

fn with_kernels() -> Fake {
    Fake { kernels: true, ..Fake::default() }
}

/// A server whose image is built, and its directory.
fn started() -> (Bench, PathBuf) {
    let bench = Bench::new();
    bench.write(&(images(&["a"]) + "server \"web\" { image \"a\" }\n"));
    let built = build(&bench.project, &bench.store, with_kernels(), |_| true);
    assert!(built.outcome.failures.is_empty(), "{:?}", built.outcome.failures);
    assert_eq!(up(&bench.project, &bench.store, with_kernels()).unwrap(), Came::New);
    let home = bench.store.servers(&bench.project.canonicalize().unwrap()).join("web");
    (bench, home)
}

#[test]
fn a_server_boots_its_own_data_when_the_store_is_emptied() {
    let (bench, home) = started();
    let own = read_state(&home.join("disk-0.qcow2"));
    assert!(own.contains_key("/a"), "{own:?}");
    // Its machine ends with the process; its directory stays.
    for area in [Area::States, Area::Blobs, Area::Snapshots, Area::Projects] {
        for entry in std::fs::read_dir(bench.store.dir(area)).unwrap().flatten() {
            let removed = if entry.path().is_dir() { std::fs::remove_dir_all } else { std::fs::remove_file };
            removed(entry.path()).unwrap();
        }
    }
    assert_eq!(up(&bench.project, &bench.store, with_kernels()).unwrap(), Came::Back);
    // Another build of its image does not get under it.
    bench.write(&(images(&["a"]).replace("\"1\"", "\"2\"") + "server \"web\" { image \"a\" }\n"));
    build(&bench.project, &bench.store, with_kernels(), |_| true);
    assert_eq!(up(&bench.project, &bench.store, with_kernels()).unwrap(), Came::Back);
    assert_eq!(read_state(&home.join("disk-0.qcow2")), own);
    assert_eq!(read_state(&home.join("base-1.qcow2"))["/a"], own["/a"]);
    // A collection takes nothing of it.
    bench.collect();
    assert_eq!(up(&bench.project, &bench.store, with_kernels()).unwrap(), Came::Back);
}

#[test]
fn a_server_without_its_own_files_is_refused_with_the_reason() {
    let (bench, home) = started();
    let refused = || up(&bench.project, &bench.store, with_kernels()).unwrap_err().message;
    // The kernel is in the store, too, until someone removes it there.
    std::fs::remove_file(home.join("kernel")).unwrap();
    assert_eq!(up(&bench.project, &bench.store, with_kernels()).unwrap(), Came::Back);
    std::fs::remove_file(home.join("kernel")).unwrap();
    for blob in std::fs::read_dir(bench.store.dir(Area::Blobs)).unwrap().flatten() {
        std::fs::remove_file(blob.path()).unwrap();
    }
    assert!(refused().starts_with("server `web`: its kernel or initrd is missing"), "{}", refused());
    std::fs::remove_file(home.join("base-1.qcow2")).unwrap();
    assert!(refused().starts_with("server `web`: one of its disks is missing"), "{}", refused());
}

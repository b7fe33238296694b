//! Interrupted transfers resume, used states stay young, and a near cache gets
//! what came from a far one.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use vimg::cache::remote::Remote;
use vimg::cache::spec::Spec;

use crate::common::{Runner, objects};

fn local(dir: &Path, more: &str) -> Arc<Remote> {
    let spec = format!("type=local,src={},domain=main{more}", dir.display());
    Arc::new(Remote::open(Spec::parse(&spec, false).unwrap()).unwrap())
}

fn packs(dir: &Path) -> Vec<PathBuf> {
    let mut all: Vec<(u64, PathBuf)> = std::fs::read_dir(dir.join(objects()).join("packs"))
        .unwrap()
        .map(|entry| entry.unwrap())
        .map(|entry| (entry.metadata().unwrap().len(), entry.path()))
        .collect();
    all.sort();
    all.into_iter().map(|(_, path)| path).collect()
}

#[test]
fn what_was_interrupted_is_gone_on_with() {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = Runner::new();
    // Several packs, one of which is missing at first.
    let key = writer.large_output(40_000_000);
    let remote = local(dir.path(), "");
    let sent = writer.push(&writer.with(&remote, Some(&remote)), &remote, &[key]);
    let all = packs(dir.path());
    assert_eq!(all.len(), 3);
    let reader = Runner::new();
    let hidden = dir.path().join("hidden");
    std::fs::rename(&all[2], &hidden).unwrap();
    let remote = local(dir.path(), "");
    assert!(reader.fetch(&reader.with(&remote, None), key).unwrap_err().contains("a pack is missing"));
    std::fs::rename(&hidden, &all[2]).unwrap();
    let remote = local(dir.path(), "");
    let rest = reader.fetch(&reader.with(&remote, None), key).unwrap();
    assert!(reader.same(&writer, key));
    assert!(rest < 35_000_000, "{rest} bytes were read again");
    assert!(std::fs::read_dir(reader.store.root().join("partial")).unwrap().next().is_none());

    // The other direction: packs that were sent before the record are not sent
    // again.
    std::fs::remove_dir_all(dir.path().join(objects()).join("records")).unwrap();
    std::fs::remove_file(&all[0]).unwrap();
    let remote = local(dir.path(), "");
    let again = writer.push(&writer.with(&remote, Some(&remote)), &remote, &[key]);
    assert_eq!(again.sent, 1);
    assert!(again.bytes < sent.bytes / 2, "{} bytes were sent again", again.bytes);
    let reader = Runner::new();
    reader.fetch(&reader.with(&local(dir.path(), ""), None), key).unwrap();
}

#[test]
fn what_is_used_stays_young() {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = Runner::new();
    let (base, layer, output) = writer.project(90);
    let remote = local(dir.path(), "");
    writer.push(&writer.with(&remote, Some(&remote)), &remote, &[base, layer, output]);
    let files = || {
        let mut all = packs(dir.path());
        all.extend(
            [base, layer, output].map(|key| dir.path().join(objects()).join(format!("records/main/{key}"))),
        );
        all
    };
    let old = SystemTime::now() - Duration::from_secs(2 * 86_400);
    for file in files() {
        std::fs::File::options().write(true).open(file).unwrap().set_modified(old).unwrap();
    }
    let young = || files().iter().filter(|f| f.metadata().unwrap().modified().unwrap() > old).count();
    let push = |more: &str| {
        let remote = local(dir.path(), more);
        let pushed = writer.push(&writer.with(&remote, Some(&remote)), &remote, &[base, layer, output]);
        assert_eq!((pushed.sent, pushed.there), (0, 3));
    };
    push(",touch_refresh=3d");
    assert_eq!(young(), 0);
    push("");
    assert_eq!(young(), files().len());
    let reader = Runner::new();
    reader.fetch(&reader.with(&local(dir.path(), ""), None), layer).unwrap();
    assert!(reader.same(&writer, layer));
}

#[test]
fn what_comes_from_afar_is_kept_near() {
    let (near, far) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut writer = Runner::new();
    let (base, layer, output) = writer.project(95);
    let remote = local(far.path(), "");
    writer.push(&writer.with(&remote, Some(&remote)), &remote, &[base, layer, output]);
    let reader = Runner::new();
    let mut caches = reader.with(&local(near.path(), ""), None);
    caches.from.push(local(far.path(), ""));
    reader.fetch(&caches, layer).unwrap();
    assert!(reader.same(&writer, layer));
    // The next runner needs only the near cache, for the state that was
    // fetched.
    let next = Runner::new();
    let caches = next.with(&local(near.path(), ""), None);
    next.fetch(&caches, layer).unwrap();
    assert!(next.same(&writer, layer) && next.same(&writer, base));
    assert!(next.fetch(&caches, output).is_err());
}

/// Makes a cache with an output of a project.
fn with_output(seed: u64) -> (tempfile::TempDir, Runner, vimg::digest::Key) {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = Runner::new();
    let (_, _, output) = writer.project(seed);
    let remote = local(dir.path(), "");
    writer.push(&writer.with(&remote, Some(&remote)), &remote, &[output]);
    (dir, writer, output)
}

#[test]
fn what_is_gone_is_not_referred_to_again() {
    let (dir, mut writer, output) = with_output(300);
    // Delete the packs, as a rule of a bucket may do. The record is still
    // young.
    for pack in packs(dir.path()) {
        std::fs::remove_file(pack).unwrap();
    }
    let changed = writer.changed_output(output);
    let remote = local(dir.path(), "");
    let pushed = writer.push(&writer.with(&remote, Some(&remote)), &remote, &[changed]);
    assert!(pushed.bytes > 900_000, "{} bytes are not all of it", pushed.bytes);
    let reader = Runner::new();
    reader.fetch(&reader.with(&local(dir.path(), ""), None), changed).unwrap();
    assert!(reader.same(&writer, changed));
}

#[test]
fn what_is_referred_to_again_is_young() {
    let (dir, mut writer, output) = with_output(310);
    let old = SystemTime::now() - Duration::from_secs(2 * 86_400);
    let before = packs(dir.path());
    for pack in &before {
        std::fs::File::options().write(true).open(pack).unwrap().set_modified(old).unwrap();
    }
    let changed = writer.changed_output(output);
    let remote = local(dir.path(), "");
    let pushed = writer.push(&writer.with(&remote, Some(&remote)), &remote, &[changed]);
    assert!(pushed.bytes < 100_000, "{}", pushed.bytes);
    assert!(before.iter().all(|pack| pack.metadata().unwrap().modified().unwrap() > old));
}

#[test]
fn a_copy_says_what_it_left_out() {
    let (dir, writer, _) = with_output(320);
    let from = local(dir.path(), "");
    let caches = writer.with(&from, None);
    // A cache that can't be written is an error, not an omission.
    let nowhere = tempfile::tempdir().unwrap();
    std::fs::write(nowhere.path().join(objects()), "no directory").unwrap();
    assert!(crate::common::wait(caches.copy(&from, &local(nowhere.path(), ""))).is_err());
    std::fs::write(&packs(dir.path())[0], "damaged").unwrap();
    let to = tempfile::tempdir().unwrap();
    let copied = crate::common::wait(caches.copy(&from, &local(to.path(), ""))).unwrap();
    assert_eq!((copied.records, copied.damaged), (0, 1));
}

#[test]
fn whatever_a_record_needs_and_is_gone_is_sent_again() {
    let (dir, mut writer, output) = with_output(330);
    let (base, layer, _) = writer.project(340);
    let changed = writer.changed_output(output);
    let keys = [base, layer, output, changed];
    let push = || {
        let remote = local(dir.path(), "");
        writer.push(&writer.with(&remote, Some(&remote)), &remote, &keys)
    };
    push();
    let age = || {
        let old = SystemTime::now() - Duration::from_secs(2 * 86_400);
        for key in keys {
            let record = dir.path().join(objects()).join(format!("records/main/{key}"));
            std::fs::File::options().write(true).open(record).unwrap().set_modified(old).unwrap();
        }
    };
    // For each pack: states built on its state, or sharing its chunks, must be
    // sent again, too.
    for n in 0..packs(dir.path()).len() {
        age();
        std::fs::remove_file(&packs(dir.path())[n]).unwrap();
        assert!(push().sent > 0);
        for key in keys {
            let reader = Runner::new();
            reader.fetch(&reader.with(&local(dir.path(), ""), None), key).unwrap();
            assert!(reader.same(&writer, key));
        }
    }
}

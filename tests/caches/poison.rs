//! vimg does not use data that has a wrong signer, is in the wrong place or
//! does not match its name. Each case has its own message.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;
use vimg::cache::Caches;
use vimg::cache::entry::{self, Asked, Entry, Signed};
use vimg::cache::remote::Remote;
use vimg::cache::sign::{Signer, Trust};
use vimg::cache::spec::Spec;
use vimg::digest::Key;

use crate::common::{Runner, objects, signer, wait};

/// A directory as a cache, filled by a runner.
struct Poisoned {
    dir: tempfile::TempDir,
    writer: Runner,
    keys: [Key; 3],
}

impl Poisoned {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = Runner::new();
        let (base, layer, output) = writer.project(50);
        let poisoned = Self { dir, writer, keys: [base, layer, output] };
        assert_eq!(poisoned.push(), 3);
        poisoned
    }

    fn remote(&self, more: &str) -> Arc<Remote> {
        let spec = format!("type=local,src={},domain=main{more}", self.dir.path().display());
        Arc::new(Remote::open(Spec::parse(&spec, false).unwrap()).unwrap())
    }

    fn push(&self) -> usize {
        let remote = self.remote("");
        self.writer.push(&self.writer.with(&remote, Some(&remote)), &remote, &self.keys).sent
    }

    fn record(&self, key: &Key) -> PathBuf {
        self.dir.path().join(objects()).join(format!("records/main/{key}"))
    }

    fn packs(&self) -> Vec<PathBuf> {
        let dir = std::fs::read_dir(self.dir.path().join(objects()).join("packs")).unwrap();
        dir.map(|entry| entry.unwrap().path()).collect()
    }

    /// Checks that an empty runner can't fetch a state, and why.
    fn refused(&self, key: Key, why: &str) {
        let runner = Runner::new();
        let error = runner.fetch(&runner.with(&self.remote(""), None), key).unwrap_err();
        assert!(error.contains(why), "{error}");
        assert!(!runner.store.has(&key));
    }

    fn taken(&self, key: Key) {
        let runner = Runner::new();
        runner.fetch(&runner.with(&self.remote(""), None), key).unwrap();
        assert!(runner.same(&self.writer, key));
    }

    fn read(&self, key: &Key) -> Vec<Signed> {
        let mut trust = Trust::default();
        trust.add("main", signer().public());
        let domains = ["main".to_owned()];
        let asked = Asked {
            key: *key,
            domain: "main",
            domains: &domains,
            trust: &trust,
            now: u64::MAX,
            max_age: None,
        };
        entry::read(&std::fs::read(self.record(key)).unwrap(), &asked).unwrap()
    }

    /// Changes an entry and signs it again.
    fn resign(&self, key: &Key, by: &Signer, change: impl FnOnce(&mut Entry)) {
        let mut entry = self.read(key)[0].entry.clone();
        change(&mut entry);
        let signed = Entry::sign(&entry.domain, entry.written, entry.state, entry.files, None, by).unwrap();
        std::fs::write(self.record(key), entry::write(&[&signed]).unwrap()).unwrap();
    }

    /// Changes a record without signing it again.
    fn edit(&self, key: &Key, change: impl FnOnce(&mut Value)) {
        let bytes = zstd::decode_all(&*std::fs::read(self.record(key)).unwrap()).unwrap();
        let mut json: Value = serde_json::from_slice(&bytes).unwrap();
        change(&mut json);
        std::fs::write(self.record(key), zstd::encode_all(&*serde_json::to_vec(&json).unwrap(), 1).unwrap())
            .unwrap();
    }
}

#[test]
fn valid_blobs_under_a_wrong_key_are_refused() {
    let cache = Poisoned::new();
    let [base, layer, output] = cache.keys;
    let (theirs, place) = (cache.record(&layer), cache.record(&output));
    std::fs::copy(theirs, place).unwrap();
    cache.refused(output, "it is the record of another state");
    // A key that is not the hash of the description.
    cache.resign(&base, &signer(), |entry| entry.state.key = output);
    std::fs::copy(cache.record(&base), cache.record(&output)).unwrap();
    cache.refused(output, "its key does not match its description");
    // A runner that has the states repairs them.
    assert_eq!(cache.push(), 2);
    cache.taken(output);
    cache.taken(layer);
}

#[test]
fn an_untrusted_signature_is_refused() {
    let cache = Poisoned::new();
    let output = cache.keys[2];
    let stranger = Signer::generate().unwrap();
    cache.resign(&output, &stranger, |_| {});
    cache.refused(output, &format!("signed by {}, which is not trusted for `main`", stranger.public()));
    cache.push();
    // A wrong signature under the right name, a changed text under a right
    // signature, and no signature.
    cache.edit(&output, |json| json["entries"][0]["signatures"][0]["sig"] = "AAAA".into());
    cache.refused(output, "its signature is invalid");
    cache.push();
    cache.resign(&output, &signer(), |entry| entry.domain = "pr-1".into());
    // The cache is read for `main`, and no key is trusted for `pr-1` here.
    cache.refused(output, "which is not trusted for `pr-1`");
    cache.push();
    cache.edit(&output, |json| json["entries"][0]["signatures"] = Value::Array(Vec::new()));
    cache.refused(output, "it is not signed");
    cache.push();
    cache.taken(output);
    // Written by a clock that is years ahead: no record would ever be newer.
    cache.resign(&output, &signer(), |entry| entry.written += 100_000_000);
    cache.refused(output, "it was written in the future");
}

#[test]
fn what_one_cache_spoils_is_not_sent_to_others_again() {
    let (bad, good) = (Poisoned::new(), Poisoned::new());
    let output = bad.keys[2];
    assert_eq!(output, good.keys[2]);
    bad.resign(&output, &Signer::generate().unwrap(), |_| {});
    let runner = Runner::new();
    let (first, second) = (bad.remote(""), good.remote(""));
    let mut caches = runner.with(&first, Some(&second));
    caches.from.push(second.clone());
    runner.fetch(&caches, output).unwrap();
    assert!(runner.same(&good.writer, output));
    let pushed = runner.push(&caches, &second, &[output]);
    assert_eq!((pushed.sent, pushed.there), (0, 1));
    // It is sent to the damaged cache.
    let pushed = runner.push(&caches, &first, &[output]);
    assert_eq!(pushed.sent, 1);
    bad_is_good(&bad, &runner, output);
}

fn bad_is_good(cache: &Poisoned, runner: &Runner, output: Key) {
    let next = Runner::new();
    next.fetch(&next.with(&cache.remote(""), None), output).unwrap();
    assert!(next.same(runner, output));
}

#[test]
fn an_entry_of_another_domain_is_refused() {
    let cache = Poisoned::new();
    let output = cache.keys[2];
    cache.resign(&output, &signer(), |entry| entry.domain = "pr-1".into());
    let runner = Runner::new();
    let mut caches = runner.with(&cache.remote(""), None);
    caches.trust.add("pr-*", signer().public());
    let error = runner.fetch(&caches, output).unwrap_err();
    assert!(error.contains("it was signed for the domain `pr-1`"), "{error}");
}

#[test]
fn an_old_record_that_is_put_back_is_refused() {
    let cache = Poisoned::new();
    let output = cache.keys[2];
    let old = std::fs::read(cache.record(&output)).unwrap();
    cache.resign(&output, &signer(), |entry| entry.written += 100);
    let runner = Runner::new();
    let find = || {
        let caches = runner.with(&cache.remote(""), None);
        wait(caches.find(&runner.names(&[output]), &runner.sink())).len()
    };
    assert_eq!(find(), 1);
    assert_eq!(find(), 1, "the same is no older");
    std::fs::write(cache.record(&output), old).unwrap();
    assert_eq!(find(), 0);
    let told = runner.told().join("\n");
    assert!(told.contains("older than one that this machine has seen in its place"), "{told}");
    // A new runner refuses old records by their age.
    cache.resign(&output, &signer(), |entry| entry.written -= 40 * 86_400);
    let other = Runner::new();
    let error = other.fetch(&other.with(&cache.remote(",max-age=30d"), None), output).unwrap_err();
    assert!(error.contains("it is 40 days old, more than `max-age` allows"), "{error}");
    other.fetch(&other.with(&cache.remote(",max-age=60d"), None), output).unwrap();
}

#[test]
fn a_chain_that_does_not_fit_is_refused() {
    let cache = Poisoned::new();
    let [base, layer, _] = cache.keys;
    // Another build of the base is below the layer.
    cache.resign(&base, &signer(), |entry| entry.written += 1);
    let other = std::fs::read(cache.record(&base)).unwrap();
    let other: Value = serde_json::from_slice(&zstd::decode_all(&*other).unwrap()).unwrap();
    cache.edit(&layer, |json| json["entries"][1] = other["entries"][0].clone());
    cache.refused(layer, "it does not fit the disk below");
    cache.push();
    cache.edit(&layer, |json| {
        json["entries"].as_array_mut().unwrap().truncate(1);
    });
    cache.refused(layer, "the entry of a disk below is missing");
    cache.push();
    cache.taken(layer);
}

#[test]
fn bytes_that_are_not_what_they_should_be_are_refused() {
    let cache = Poisoned::new();
    let output = cache.keys[2];
    let damaged = |change: &dyn Fn(&Path), why: &str| {
        for pack in cache.packs() {
            change(&pack);
        }
        let runner = Runner::new();
        let remote = cache.remote("");
        let caches = runner.with(&remote, Some(&remote));
        let error = runner.fetch(&caches, output).unwrap_err();
        assert!(error.contains(why), "{error}");
        assert!(!runner.store.has(&output));
        // A runner that builds it sends all packs again, because it trusts none
        // of the existing ones.
        let found = wait(caches.find(&cache.writer.names(&[output]), &runner.sink()));
        assert!(found.is_empty(), "the cache is not asked for it again");
        for key in cache.keys {
            let _ = runner.fetch(&caches, key);
        }
        let pushed = cache.writer.push(&caches, &remote, &cache.keys);
        assert_eq!(pushed.sent, 3);
        cache.taken(output);
        cache.taken(cache.keys[1]);
    };
    let flip = |path: &Path| {
        let mut bytes = std::fs::read(path).unwrap();
        bytes[1000] ^= 1;
        std::fs::write(path, bytes).unwrap();
    };
    damaged(&flip, "a chunk is damaged");
    let cut = |path: &Path| {
        let bytes = std::fs::read(path).unwrap();
        std::fs::write(path, &bytes[..bytes.len() / 2]).unwrap();
    };
    damaged(&cut, "a pack is cut short");
    damaged(&|path| std::fs::remove_file(path).unwrap(), "a pack is missing");
    damaged(&|path| std::fs::write(path, "").unwrap(), "a pack is cut short");
    // A file that is not a record.
    std::fs::write(cache.record(&output), "what?").unwrap();
    cache.refused(output, "it is damaged");
    std::fs::write(cache.record(&output), zstd::encode_all(&*vec![b' '; 80 << 20], 1).unwrap()).unwrap();
    cache.refused(output, "larger than a record may be");
}

#[test]
fn a_disk_that_names_a_file_is_refused_whoever_signed_it() {
    let dir = tempfile::tempdir().unwrap();
    let spec = format!("type=local,src={},domain=main", dir.path().display());
    let remote = Arc::new(Remote::open(Spec::parse(&spec, false).unwrap()).unwrap());
    let mut writer = Runner::new();
    let (base, ..) = writer.project(60);
    let disk = writer.store.state_dir(&base).join("disk.qcow2");
    let rebased = std::process::Command::new("qemu-img")
        .args(["rebase", "-u", "-b", "/etc/passwd", "-F", "raw"])
        .arg(&disk)
        .status()
        .unwrap();
    assert!(rebased.success());
    // vimg does not send a changed disk, so this test commits the changed disk
    // as a state.
    assert!(!writer.store.is_sound(&base));
    let record = writer.store.states().into_iter().find(|record| record.key == base).unwrap();
    let staging = writer.store.staging().unwrap();
    std::fs::copy(&disk, staging.path().join("disk.qcow2")).unwrap();
    assert!(writer.store.commit(staging, &record).unwrap());
    writer.push(&writer.with(&remote, Some(&remote)), &remote, &[base]);
    let runner = Runner::new();
    let error = runner.fetch(&runner.with(&remote, None), base).unwrap_err();
    assert!(error.contains("its disk is refused: it names a backing file"), "{error}");
    assert!(!runner.store.has(&base));
}

/// A layer on another build of the same base does not fit.
#[test]
fn two_builds_of_a_base_do_not_mix() {
    let cache = Poisoned::new();
    let [_, layer, _] = cache.keys;
    let mut other = Runner::new();
    let (base, own, _) = other.project(50);
    assert_eq!((base, own), (cache.keys[0], layer), "the same keys, other blocks");
    let more = other.layer("web@more", base, 99);
    let remote = cache.remote("");
    let pushed = other.push(&other.with(&remote, Some(&remote)), &remote, &[base, own, more]);
    assert_eq!(pushed.sent, 0);
    assert_eq!(pushed.foreign, ["web:base", "web@site"]);
    // The store has its own build of the base, and the cached layer is on the
    // other one.
    let runner = Runner::new();
    let second = other.with(&remote, None);
    std::fs::remove_dir_all(other.store.state_dir(&layer)).unwrap();
    let error = other.fetch(&second, layer).unwrap_err();
    assert!(error.contains("another build of web:base"), "{error}");
    runner.fetch(&runner.with(&remote, None), layer).unwrap();
}

/// A state from one trust domain is not signed for another, and neither are
/// states built on it.
#[test]
fn one_domain_does_not_vouch_for_anothers_states() {
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let remote = |dir: &tempfile::TempDir, domain: &str| {
        let spec = format!("type=local,src={},domain={domain}", dir.path().display());
        Arc::new(Remote::open(Spec::parse(&spec, false).unwrap()).unwrap())
    };
    let (theirs, ours) = (remote(&dirs[0], "pr-7"), remote(&dirs[1], "main"));
    let trusting = |remote: &Arc<Remote>| {
        let mut trust = Trust::default();
        trust.add("*", signer().public());
        let mut caches = Caches::new(trust, Some(signer()), "web".into());
        caches.from.push(remote.clone());
        caches.to.push(remote.clone());
        caches
    };
    let mut writer = Runner::new();
    let (base, layer, _) = writer.project(70);
    assert_eq!(writer.push(&trusting(&theirs), &theirs, &[base, layer]).sent, 2);
    // A runner that serves both domains fetches them, and builds on top.
    let mut runner = Runner::new();
    runner.fetch(&trusting(&theirs), layer).unwrap();
    let origin = runner.store.record(&base).unwrap().origin.unwrap();
    assert_eq!((origin.domain.as_str(), origin.key), ("pr-7", signer().public().tag()));
    let own = runner.layer("web@own", layer, 71);
    let pushed = runner.push(&trusting(&ours), &ours, &[base, layer, own]);
    assert_eq!((pushed.sent, pushed.withheld.is_empty()), (0, false));
    assert!(runner.fetch(&trusting(&ours), own).is_err(), "nothing of it is there");
    // An output that was made from their states must not be signed either,
    // although its disk is on none of theirs.
    let output = runner.made_of("web:raw", layer, 72);
    let pushed = runner.push(&trusting(&ours), &ours, &[output]);
    assert_eq!((pushed.sent, pushed.withheld), (0, vec!["web:raw".to_owned()]));
    assert_eq!(runner.push(&trusting(&theirs), &theirs, &[output]).sent, 1);
    // It may be sent to the domain that it came from.
    assert_eq!(runner.push(&trusting(&theirs), &theirs, &[own]).sent, 1);
}

/// A disk with a flipped bit is not signed and sent.
#[test]
fn a_damaged_disk_is_not_sent() {
    let dir = tempfile::tempdir().unwrap();
    let spec = format!("type=local,src={},domain=main", dir.path().display());
    let remote = Arc::new(Remote::open(Spec::parse(&spec, false).unwrap()).unwrap());
    let mut writer = Runner::new();
    let (base, layer, _) = writer.project(80);
    let disk = writer.store.state_dir(&layer).join("disk.qcow2");
    let file = std::fs::File::options().read(true).write(true).open(disk).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, (1 << 20) + 4000).unwrap();
    file.write_all_at(&[byte[0] ^ 1], (1 << 20) + 4000).unwrap();
    let pushed = writer.push(&writer.with(&remote, Some(&remote)), &remote, &[base, layer]);
    assert_eq!((pushed.sent, pushed.damaged), (1, vec!["web@site".to_owned()]));
    assert!(writer.store.has(&base) && !writer.store.has(&layer), "it will be built again");
}

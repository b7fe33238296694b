//! Copies of good, damaged and malicious filesystems.

use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use super::*;

static NO_STOP: AtomicBool = AtomicBool::new(false);
static OPTIONS: ExtractOptions<'_> = ExtractOptions { owners: false, most: 16 << 20, stop: &NO_STOP };

/// Runs a program of e2fsprogs.
fn run(program: &str, args: &[&str]) {
    let output = Command::new(Path::new("/sbin").join(program)).args(args).output().unwrap();
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Makes a filesystem of a small machine.
fn guest(dir: &Path) -> Vec<u8> {
    let tree = dir.join("guest");
    for sub in ["etc/deep/er", "usr/lib", "dev"] {
        std::fs::create_dir_all(tree.join(sub)).unwrap();
    }
    let large = "0123456789".repeat(300_000);
    for (name, text) in [("usr/lib/os-release", "ID=it\n"), ("etc/large", &large), ("etc/tool", "x")] {
        std::fs::write(tree.join(name), text).unwrap();
    }
    std::fs::hard_link(tree.join("etc/tool"), tree.join("etc/deep/er/tool")).unwrap();
    std::fs::set_permissions(tree.join("etc/tool"), PermissionsExt::from_mode(0o6751)).unwrap();
    std::fs::set_permissions(tree.join("etc/deep"), PermissionsExt::from_mode(0o555)).unwrap();
    let sparse = std::fs::File::create(tree.join("etc/sparse")).unwrap();
    sparse.set_len(9 << 20).unwrap();
    sparse.write_all_at(b"end", (9 << 20) - 3).unwrap();
    symlink("../usr/lib/os-release", tree.join("etc/os-release")).unwrap();
    symlink("/usr/lib", tree.join("lib")).unwrap();
    symlink("../../../../etc/shadow", tree.join("etc/out")).unwrap();
    symlink("round", tree.join("etc/round")).unwrap();
    assert!(Command::new("mkfifo").arg(tree.join("dev/pipe")).status().unwrap().success());
    let image = dir.join("image");
    let path = image.to_str().unwrap();
    run("mke2fs", &["-q", "-t", "ext4", "-d", tree.to_str().unwrap(), path, "15M"]);
    run("debugfs", &["-w", "-R", "set_inode_field etc/large mtime 20200101000000", path]);
    std::fs::read(&image).unwrap()
}

fn copy(disk: &mut Vec<u8>, from: &str, name: Option<&str>, to: &Path) -> io::Result<Extracted> {
    let mut tree = Tree::open(disk, 0)?;
    let entry = tree.find(from.as_bytes())?.ok_or(io::ErrorKind::NotFound)?;
    extract(&mut tree, &entry, name.map(str::as_bytes), to, OPTIONS)
}

fn text(disk: &mut Vec<u8>, path: &str) -> io::Result<String> {
    let mut tree = Tree::open(disk, 0)?;
    let entry = tree.find(path.as_bytes())?.ok_or(io::ErrorKind::NotFound)?;
    let mut out = Vec::new();
    print(&mut tree, &entry, OPTIONS, &mut out)?;
    Ok(String::from_utf8(out).unwrap())
}

/// Returns the message of a failed copy.
fn refused(disk: &mut Vec<u8>, from: &str, name: Option<&str>, to: &Path) -> String {
    copy(disk, from, name, to).unwrap_err().to_string()
}

#[test]
fn a_tree_is_copied_with_its_metadata() {
    let dir = tempfile::tempdir().unwrap();
    let mut disk = guest(dir.path());
    let to = dir.path().join("to");
    std::fs::create_dir(&to).unwrap();
    // A second copy replaces the first.
    for _ in 0..2 {
        let done = copy(&mut disk, "/etc", Some("etc"), &to).unwrap();
        assert_eq!((done.count, done.skipped), (10, vec![]));
        assert!((3_000_000..3_100_000).contains(&done.bytes), "{}", done.bytes);
        std::fs::set_permissions(to.join("etc/deep"), PermissionsExt::from_mode(0o755)).unwrap();
    }
    let meta = |name: &str| std::fs::symlink_metadata(to.join("etc").join(name)).unwrap();
    assert_eq!(std::fs::read_to_string(to.join("etc/large")).unwrap(), "0123456789".repeat(300_000));
    assert_eq!((meta("large").mtime(), meta("large").mode() & 0o7777), (1_577_836_800, 0o644));
    assert_eq!(meta("tool").mode() & 0o7777, 0o751, "a set-ID bit of a guest's program was copied");
    assert_eq!((meta("tool").ino(), meta("tool").nlink()), (meta("deep/er/tool").ino(), 2));
    assert!(meta("sparse").size() == 9 << 20 && meta("sparse").blocks() * 512 < 1 << 20);
    assert_eq!(std::fs::read_link(to.join("etc/out")).unwrap(), Path::new("../../../../etc/shadow"));
    let left: Vec<PathBuf> = walkdir::WalkDir::new(&to).into_iter().map(|e| e.unwrap().into_path()).collect();
    assert_eq!(left.len(), 11, "a temporary file is left: {left:?}");
    // A copy under another name has the directory's mode.
    copy(&mut disk, "/etc/deep", Some("deep"), &to.join("new")).unwrap();
    assert_eq!(std::fs::metadata(to.join("new")).unwrap().mode() & 0o7777, 0o555);
}

#[test]
fn paths_are_those_in_the_machine() {
    let dir = tempfile::tempdir().unwrap();
    let mut disk = guest(dir.path());
    for path in
        ["/etc/os-release", "/lib/os-release", "/etc/../../../lib/./os-release", "/lib/../lib/os-release"]
    {
        assert_eq!(text(&mut disk, path).unwrap(), "ID=it\n", "{path}");
    }
    // The host has this file, and the guest does not.
    assert!(text(&mut disk, "/etc/out").is_err_and(|e| e.kind() == io::ErrorKind::NotFound));
    assert!(text(&mut disk, "/etc/tool/x").is_err_and(|e| e.kind() == io::ErrorKind::NotFound));
    assert_eq!(
        text(&mut disk, "/etc/round").unwrap_err().to_string(),
        "the path has too many symbolic links"
    );
    let sparse = text(&mut disk, "/etc/sparse").unwrap();
    assert!(sparse.len() == 9 << 20 && sparse.ends_with("\0\0end"));
    assert!(text(&mut disk, "/etc").unwrap_err().to_string().contains("not a regular file"));
    // The contents of a directory go into another.
    let done = copy(&mut disk, "/", None, dir.path()).unwrap();
    assert_eq!(done.skipped, ["dev/pipe"]);
    assert!(!std::fs::symlink_metadata(dir.path().join("dev/pipe")).is_ok_and(|m| m.file_type().is_fifo()));
    assert_eq!(std::fs::read_to_string(dir.path().join("usr/lib/os-release")).unwrap(), "ID=it\n");
}

#[test]
fn nothing_is_written_through_a_link_or_beside_the_destination() {
    let dir = tempfile::tempdir().unwrap();
    let mut disk = guest(dir.path());
    let (to, outside) = (dir.path().join("to"), dir.path().join("outside"));
    std::fs::create_dir_all(to.join("etc")).unwrap();
    std::fs::create_dir(&outside).unwrap();
    std::fs::write(outside.join("large"), "mine").unwrap();
    // A file in place of a link replaces the link, not the file behind it.
    symlink(outside.join("large"), to.join("etc/large")).unwrap();
    copy(&mut disk, "/etc/large", Some("large"), &to.join("etc")).unwrap();
    assert!(std::fs::symlink_metadata(to.join("etc/large")).unwrap().is_file());
    assert_eq!(std::fs::read_to_string(outside.join("large")).unwrap(), "mine");
    // A directory does not.
    symlink(&outside, to.join("etc/deep")).unwrap();
    let why = refused(&mut disk, "/etc", Some("etc"), &to);
    assert!(why.starts_with("etc/deep: "), "{why}");
    assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 1);
    // A file never replaces a directory, and a directory no file.
    std::fs::create_dir(to.join("tool")).unwrap();
    assert!(refused(&mut disk, "/etc/tool", Some("tool"), &to).starts_with("tool: "));
    assert!(refused(&mut disk, "/etc", Some("etc"), &to.join("etc/large")).contains("not a directory"));
    assert!(
        refused(&mut disk, "/etc/tool", Some("tool"), Path::new("/dev/null")).contains("not a directory")
    );
    assert!(refused(&mut disk, "/etc/tool", Some("tool"), &to.join("none/")).contains("no such directory"));
}

/// Replaces a text in a disk by another of the same length.
fn patched(disk: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
    assert_eq!(from.len(), to.len());
    let places: Vec<usize> =
        (0..disk.len() - from.len()).filter(|at| disk[*at..].starts_with(from)).collect();
    assert!(!places.is_empty());
    let mut disk = disk.to_vec();
    places.into_iter().for_each(|at| disk[at..at + to.len()].copy_from_slice(to));
    disk
}

#[test]
fn a_malicious_filesystem_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let disk = guest(dir.path());
    let to = dir.path().join("a/b/to");
    std::fs::create_dir_all(&to).unwrap();
    for name in [b"../..".as_slice(), b"/etcx", b"la\0ge"] {
        let mut named = patched(&disk, b"large", name);
        assert!(refused(&mut named, "/etc", Some("etc"), &to).ends_with("a name is invalid"), "{name:?}");
    }
    assert_eq!(std::fs::read_dir(dir.path().join("a")).unwrap().count(), 1);
    // A directory in itself, and a file that is larger than the disk.
    let image = dir.path().join("image");
    let order = |order: &str| {
        std::fs::write(&image, &disk).unwrap();
        run("debugfs", &["-w", "-R", order, image.to_str().unwrap()]);
        std::fs::read(&image).unwrap()
    };
    let why = refused(&mut order("ln /etc /etc/deep/er/again"), "/etc", Some("etc"), &to);
    assert_eq!(why, "etc/deep/er/again: a directory has two names");
    let mut huge = order("set_inode_field etc/sparse size 0x100000000000");
    assert!(text(&mut huge, "/etc/sparse").unwrap_err().to_string().contains("larger than the disk"));
    // Many files with the same blocks.
    let mut tree = disk.clone();
    let mut tree = Tree::open(&mut tree, 0).unwrap();
    let entry = tree.find(b"/etc").unwrap().unwrap();
    let few = ExtractOptions { most: 1 << 20, ..OPTIONS };
    let why = extract(&mut tree, &entry, Some(b"few"), &to, few).unwrap_err().to_string();
    assert_eq!(why, "few/large: the files have more content than the disk");
    let stop = AtomicBool::new(true);
    let stopped = ExtractOptions { stop: &stop, ..OPTIONS };
    let why = extract(&mut tree, &entry, Some(b"none"), &to, stopped).unwrap_err();
    assert_eq!(why.kind(), io::ErrorKind::Interrupted);
}

#[test]
fn no_disk_makes_it_panic_or_reach_outside() {
    use proptest::prelude::*;
    let dir = tempfile::tempdir().unwrap();
    let disk = guest(dir.path());
    let to = dir.path().join("a/to");
    let places: Vec<usize> = (0..disk.len()).filter(|at| disk[*at] != 0).collect();
    let config = ProptestConfig::with_cases(24);
    proptest!(config, |(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..40))| {
        let mut spoilt = disk.clone();
        for (at, byte) in changes {
            spoilt[*at.get(&places)] = byte;
        }
        std::fs::create_dir_all(&to).unwrap();
        let _ = copy(&mut spoilt, "/", None, &to);
        let _ = text(&mut spoilt, "/etc/os-release");
        let open = |entry: walkdir::Result<walkdir::DirEntry>| entry.ok().filter(|e| e.file_type().is_dir());
        for entry in walkdir::WalkDir::new(&to).into_iter().filter_map(open) {
            std::fs::set_permissions(entry.path(), PermissionsExt::from_mode(0o700)).unwrap();
        }
        std::fs::remove_dir_all(&to).unwrap();
        prop_assert_eq!(std::fs::read_dir(dir.path().join("a")).unwrap().count(), 0);
    });
}

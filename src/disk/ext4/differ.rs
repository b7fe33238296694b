//! Compares two filesystems with a common origin. It succeeds if both have the
//! same names, and only the contents of files differ.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::Range;

use vimg_agent::protocol::{self, Change};

use super::tables::{Ext4, Inode, Kind, ROOT, Source, odd, u32_at};

/// Maximum number of inodes that may differ, and of those in the result.
const MOST: usize = 4096;
const MOST_TOLD: usize = 2048;
/// Maximum number of paths in the result, and the maximum length of a path, in
/// bytes.
const MOST_NAMED: u32 = 64;
const LONGEST: usize = 200;
/// Maximum depth and number of files in special directories.
const DEEP: u32 = 16;
const MOST_THERE: usize = 1 << 17;
/// Limits of the search for a path: depth, and number of directories.
const MOST_DEEP: u32 = 40;
const MOST_VISITS: usize = 1 << 18;

/// Counters and dates in `struct ext4_super_block`: free blocks and inodes,
/// mounts, checks, the last mount point, bytes written, the upper bits of these
/// times, and the checksum. Everything else is equal in filesystems with a
/// common origin.
const COUNTERS: [Range<usize>; 7] =
    [0xC..0x14, 0x2C..0x36, 0x40..0x44, 0x88..0xC8, 0x178..0x180, 0x274..0x27A, 0x3FC..0x400];

/// A file or directory that differs in the second filesystem.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Altered {
    /// Its inode in the first filesystem, and how it differs.
    pub change: Change,
    /// Its new content, if it is a file whose content differs.
    pub content: Option<Vec<u8>>,
}

/// Directories with special rules, by path, and limits.
#[derive(Debug, Clone, Copy)]
pub struct Special<'a> {
    /// Contents of these directories are not compared.
    pub apart: &'a [&'a str],
    /// A file in these directories must not change.
    pub fixed: &'a [&'a str],
    /// Maximum total size of changed files, in bytes.
    pub most: u64,
    /// Whether a message names the file. To find its name may take a walk
    /// through all directories.
    pub named: bool,
}

/// The result of a comparison.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Difference {
    /// Only these files differ.
    Files(Vec<Altered>),
    /// More than contents of files differ; the message says what.
    More(String),
}

/// Compares the filesystems at offset `start` of `a` and `b`, which can differ
/// only in the ranges `changed` of the disk.
///
/// # Errors
///
/// Something can't be read or is invalid.
pub fn differ<S: Source>(
    a: &mut S,
    b: &mut S,
    start: u64,
    changed: &[Range<u64>],
    special: Special<'_>,
) -> io::Result<Difference> {
    let (a, b) = (Ext4::open(a, start)?, Ext4::open(b, start)?);
    if a.has_orphans || b.has_orphans {
        return Err(odd("a filesystem has files that were deleted while they were open"));
    }
    let plain = |superblock: &[u8; 1024]| {
        let mut plain = *superblock;
        COUNTERS.into_iter().for_each(|range| plain[range].fill(0));
        plain
    };
    if plain(&a.superblock) != plain(&b.superblock) || a.tables != b.tables {
        return Ok(Difference::More("the filesystem is a different one".into()));
    }
    let mut pair = Pair {
        a,
        b,
        apart: BTreeSet::new(),
        tops: BTreeSet::new(),
        fixed: BTreeSet::new(),
        left: special.most,
        named: special.named,
    };
    pair.apart = pair.gather(special.apart)?;
    pair.fixed = pair.gather(special.fixed)?;
    for path in special.apart {
        pair.tops.extend([pair.a.find(path)?, pair.b.find(path)?].into_iter().flatten());
    }
    pair.differ(changed)
}

struct Pair<'a, S> {
    a: Ext4<'a, S>,
    b: Ext4<'a, S>,
    /// Inodes that are not compared.
    apart: BTreeSet<u32>,
    /// Those of them whose metadata is compared.
    tops: BTreeSet<u32>,
    /// Inodes of files that must not change.
    fixed: BTreeSet<u32>,
    /// The rest of this size, in bytes.
    left: u64,
    named: bool,
}

/// Inodes that differ, in both filesystems.
type Both = BTreeMap<u32, (Inode, Inode)>;

impl<S: Source> Pair<'_, S> {
    fn differ(&mut self, changed: &[Range<u64>]) -> io::Result<Difference> {
        let both = self.changed_inodes(changed)?;
        // Files whose name has another inode in the second filesystem: the old
        // and the new inodes.
        let mut pairs = Vec::new();
        let mut names = BTreeMap::new();
        let (mut left, mut taken) = (BTreeSet::new(), BTreeSet::new());
        for (number, (a, b)) in &both {
            if a.kind() != Kind::Dir || b.kind() != Kind::Dir || !a.lives() || !b.lives() {
                continue;
            }
            if a.outside() != b.outside() || a.has_block() || b.has_block() {
                return self.more(*number, "has other metadata");
            }
            let (before, after) = (self.a.entries(a)?, self.b.entries(b)?);
            if let Some(name) = before.keys().find(|name| !after.contains_key(*name)) {
                return self.name(*number, name, "is gone");
            }
            for (name, new) in &after {
                if both.contains_key(new) {
                    names.insert(*new, (*number, name.clone()));
                }
                let Some(old) = before.get(name) else { return self.name(*number, name, "is new") };
                if old != new {
                    left.insert(*old);
                    taken.insert(*new);
                    pairs.push((*old, *new));
                }
            }
        }
        for (number, (a, b)) in &both {
            let known = (!a.lives() || left.contains(number)) && (!b.lives() || taken.contains(number));
            match (known, a.lives() && b.lives()) {
                (true, _) => {}
                (false, true) if !left.contains(number) && !taken.contains(number) => {
                    pairs.push((*number, *number));
                }
                // Its directory has not changed, which is impossible.
                _ => return Err(odd("a file has no name")),
            }
        }
        let (mut altered, mut named) = (Vec::new(), 0);
        for (old, new) in pairs {
            match self.alter(old, new)? {
                Ok(None) => {}
                Ok(Some(mut one)) => {
                    if one.content.is_some()
                        && named < MOST_NAMED
                        && let Some((directory, name)) = names.get(&new)
                    {
                        named += 1;
                        let path = self.b.above(*directory, 0)?.map(|path| below(&path, name));
                        one.change.path = path.filter(|path| path.len() <= LONGEST);
                    }
                    altered.push(one);
                }
                Err(what) => return self.more(old, &what),
            }
        }
        if altered.len() > MOST_TOLD {
            return Ok(Difference::More("too many files differ".into()));
        }
        Ok(Difference::Files(altered))
    }

    /// Reads the inode tables where they may differ.
    fn changed_inodes(&mut self, changed: &[Range<u64>]) -> io::Result<Both> {
        let mut both = Both::new();
        let (start, block, size) = (self.a.start, self.a.block, self.a.inode_size);
        let length = u64::from(self.a.per_group) * size;
        // The first ten inodes belong to the filesystem itself, except for the
        // root.
        let first = u32_at(&self.a.superblock, 0x54);
        for (group, table) in (0_u64..).zip(self.a.tables.clone()) {
            let table = start.saturating_add(table.saturating_mul(block));
            // The ranges that overlap the table, which is short.
            let from = changed.partition_point(|range| range.end <= table);
            for range in changed[from..].iter().take_while(|range| range.start < table.saturating_add(length))
            {
                // Rounds to whole inodes.
                let from = range.start.max(table).saturating_sub(table) / size * size;
                let to = (range.end - table).min(length).next_multiple_of(size);
                let mut tables = [vec![0; (to - from) as usize], vec![0; (to - from) as usize]];
                self.a.read_at(table + from, &mut tables[0])?;
                self.b.read_at(table + from, &mut tables[1])?;
                let inodes = tables[0].chunks_exact(size as usize).zip(tables[1].chunks_exact(size as usize));
                let numbers = group * u64::from(self.a.per_group) + from / size + 1..;
                for (number, (a, b)) in numbers.zip(inodes).filter(|(_, (a, b))| a != b) {
                    let number = u32::try_from(number).map_err(|_| odd("an inode number is out of range"))?;
                    // The metadata of a special directory itself is compared.
                    let (a, b) = (Inode(a.to_vec()), Inode(b.to_vec()));
                    let apart = self.apart.contains(&number)
                        && (!self.tops.contains(&number) || a.outside() == b.outside());
                    if (number == ROOT || number >= first) && !apart {
                        both.insert(number, (a, b));
                    }
                }
                if both.len() > MOST {
                    return Err(odd("too many files differ"));
                }
            }
        }
        Ok(both)
    }

    /// Compares a file with the one in its place. `Err` is a message for a
    /// difference other than content.
    fn alter(&mut self, old: u32, new: u32) -> io::Result<Result<Option<Altered>, String>> {
        let (a, b) = (self.a.inode(old)?, self.b.inode(new)?);
        if !a.lives() || !b.lives() {
            return Err(odd("a name has no file"));
        }
        if a.kind() != b.kind() {
            return Ok(Err("is of another kind".into()));
        }
        if a.outside() != b.outside() || a.has_block() || b.has_block() {
            return Ok(Err("has other metadata".into()));
        }
        // Another name of the file would then not be compared.
        if old != new && a.kind() != Kind::Dir && a.links() != 1 {
            return Ok(Err("has several hard links".into()));
        }
        let change = Change {
            inode: protocol::Inode { number: old, generation: a.generation() },
            size: a.size(),
            modified: a.modified(),
            to: b.modified(),
            chosen: false,
            content: None,
            path: None,
        };
        let mut altered = Altered { change, content: None };
        match a.kind() {
            // Its entries were compared before.
            Kind::Dir if old == new => {}
            Kind::Dir => return Ok(Err("is another directory".into())),
            Kind::File => {
                let same_size = a.size() == b.size();
                if !same_size && b.size() > self.left {
                    return Ok(Err("and others have too much new content".into()));
                }
                let after = self.b.content(&b)?;
                if !same_size || self.a.content(&a)? != after {
                    let Some(left) = self.left.checked_sub(b.size()) else {
                        return Ok(Err("and others have too much new content".into()));
                    };
                    self.left = left;
                    // Writing the file removes set-id bits and some attributes.
                    if a.links() != 1 || a.mode() & 0o6000 != 0 || !a.attributes().is_empty() {
                        return Ok(Err("changed, and has hard links, set-id bits or attributes".into()));
                    }
                    if self.fixed.contains(&old) || self.fixed.contains(&new) {
                        return Ok(Err("may have been read by the kernel".into()));
                    }
                    altered.change.content = Some(b.size());
                    altered.content = Some(after);
                }
            }
            Kind::Link => {
                let same = if a.has_extents() && b.has_extents() {
                    self.a.content(&a)? == self.b.content(&b)?
                } else {
                    a.map() == b.map()
                };
                return Ok(if same { Ok(None) } else { Err("points to another target".into()) });
            }
            Kind::Other if a.map() == b.map() => return Ok(Ok(None)),
            Kind::Other => return Ok(Err("is another device".into())),
        }
        let Altered { change, content } = &altered;
        Ok(Ok((content.is_some() || change.modified != change.to).then_some(altered)))
    }

    /// Collects the inodes at and below paths, in both filesystems.
    fn gather(&mut self, paths: &[&str]) -> io::Result<BTreeSet<u32>> {
        let mut there = BTreeSet::new();
        for path in paths {
            self.a.gather(path, &mut there)?;
            self.b.gather(path, &mut there)?;
        }
        Ok(there)
    }

    /// Makes a message about an inode of the first filesystem. If names are
    /// wanted, the machine boots, so the time for the search does not matter.
    fn more(&mut self, number: u32, what: &str) -> io::Result<Difference> {
        let path = if self.named { self.a.path(number)? } else { None };
        let path = path.unwrap_or_else(|| "a file".into());
        Ok(Difference::More(format!("{path} {what}")))
    }

    fn name(&mut self, directory: u32, name: &[u8], what: &str) -> io::Result<Difference> {
        let path = if self.named { self.a.path(directory)? } else { None };
        let path = path.unwrap_or_else(|| "...".into());
        Ok(Difference::More(format!("{} {what}", below(&path, name))))
    }
}

impl<S: Source> Ext4<'_, S> {
    /// Finds the inode of a path.
    fn find(&mut self, path: &str) -> io::Result<Option<u32>> {
        let mut number = ROOT;
        for name in path.split('/').filter(|name| !name.is_empty()) {
            let inode = self.inode(number)?;
            let is_dir = inode.kind() == Kind::Dir;
            let next = if is_dir { self.entries(&inode)?.remove(name.as_bytes()) } else { None };
            let Some(next) = next else { return Ok(None) };
            number = next;
        }
        Ok(Some(number))
    }

    /// Adds the inodes at and below a path, if it exists.
    fn gather(&mut self, path: &str, into: &mut BTreeSet<u32>) -> io::Result<()> {
        let Some(number) = self.find(path)? else { return Ok(()) };
        let (mut left, mut seen) = (vec![(number, 0)], BTreeSet::from([ROOT]));
        while let Some((number, depth)) = left.pop() {
            if !seen.insert(number) {
                continue;
            }
            if depth > DEEP || seen.len() > MOST_THERE || left.len() > MOST_THERE {
                return Err(odd("too many files"));
            }
            let inode = self.inode(number)?;
            if inode.kind() == Kind::Dir {
                left.extend(self.entries(&inode)?.into_values().map(|number| (number, depth + 1)));
            } else if inode.links() > 1 {
                // It has a name elsewhere, too.
                continue;
            }
            into.insert(number);
        }
        Ok(())
    }

    /// Finds the path of a directory by its parents.
    fn above(&mut self, number: u32, depth: u32) -> io::Result<Option<String>> {
        if number == ROOT || depth > MOST_DEEP {
            return Ok((number == ROOT).then(|| "/".to_owned()));
        }
        let inode = self.inode(number)?;
        // The second entry of its first block is `..`.
        let up = self.content(&inode)?.get(12..16).map_or(0, |bytes| u32_at(bytes, 0));
        let parent = self.inode(up)?;
        if parent.kind() != Kind::Dir {
            return Ok(None);
        }
        let name = self.entries(&parent)?.into_iter().find(|(_, n)| *n == number).map(|(name, _)| name);
        let (Some(name), Some(path)) = (name, self.above(up, depth + 1)?) else { return Ok(None) };
        Ok(Some(below(&path, &name)))
    }

    /// Searches for a path of an inode, down to a limited depth.
    fn path(&mut self, number: u32) -> io::Result<Option<String>> {
        let mut left = vec![(ROOT, "/".to_owned(), 0)];
        let mut seen = BTreeSet::new();
        while let Some((directory, path, depth)) = left.pop() {
            if directory == number {
                return Ok(Some(path));
            }
            if seen.len() > MOST_VISITS || left.len() > MOST_VISITS {
                return Ok(None);
            }
            let inode = self.inode(directory)?;
            if inode.kind() != Kind::Dir || depth > MOST_DEEP || !seen.insert(directory) {
                continue;
            }
            for (name, entry) in self.entries(&inode)? {
                left.push((entry, below(&path, &name), depth + 1));
            }
        }
        Ok(None)
    }
}

fn below(directory: &str, name: &[u8]) -> String {
    format!("{}/{}", directory.trim_end_matches('/'), String::from_utf8_lossy(name))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::path::Path;
    use std::process::Command;

    use super::*;

    impl Source for Vec<u8> {
        fn read_at(&mut self, at: u64, buffer: &mut [u8]) -> io::Result<()> {
            let at = usize::try_from(at).map_err(|_| odd("far"))?;
            let end = at.checked_add(buffer.len()).ok_or_else(|| odd("far"))?;
            buffer.copy_from_slice(self.get(at..end).ok_or_else(|| odd("beyond the end"))?);
            Ok(())
        }
    }

    const SPECIAL: Special = Special {
        apart: &["/var/log/journal", "/nothing"],
        fixed: &["/etc/conf.d"],
        most: 1 << 20,
        named: true,
    };
    const SIZE: usize = 16 << 20;
    /// Offset of the filesystem.
    const START: usize = 1 << 20;

    /// Runs a program of e2fsprogs.
    fn run(program: &str, args: &[&str]) {
        let output = Command::new(Path::new("/sbin").join(program)).args(args).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        // debugfs prints its version first, and always exits with 0.
        assert!(output.status.success() && said.lines().count() <= 1, "{program}: {said}");
    }

    /// Makes a filesystem with a few files, and the same one after some
    /// commands.
    fn two(dir: &Path, orders: &[&str]) -> (Vec<u8>, Vec<u8>) {
        let tree = dir.join("tree");
        std::fs::create_dir_all(tree.join("etc/conf.d")).unwrap();
        std::fs::create_dir_all(tree.join("var/log/journal")).unwrap();
        let large = "0123456789".repeat(30_000);
        for (name, text) in [
            ("etc/page", "one"),
            ("etc/conf.d/x", "x"),
            ("etc/conf.d/y", "y"),
            ("etc/large", &large),
            ("var/log/journal/a", "a"),
        ] {
            std::fs::write(tree.join(name), text).unwrap();
        }
        std::fs::set_permissions(tree.join("etc/conf.d/x"), PermissionsExt::from_mode(0o4755)).unwrap();
        // Two files with two names each.
        for (name, text) in [("etc/one", "1"), ("etc/two", "2")] {
            std::fs::write(tree.join(name), text).unwrap();
            std::fs::hard_link(tree.join(name), tree.join(format!("{name}-too"))).unwrap();
        }
        std::os::unix::fs::symlink("page", tree.join("etc/link")).unwrap();
        std::fs::write(dir.join("new"), "new content").unwrap();
        let image = dir.join("image");
        let path = image.to_str().unwrap();
        run("mke2fs", &["-q", "-t", "ext4", "-d", tree.to_str().unwrap(), path, "15M"]);
        let read = || {
            let mut disk = vec![0; START];
            disk.extend(std::fs::read(&image).unwrap());
            assert_eq!(disk.len(), SIZE);
            disk
        };
        let first = read();
        // A kernel updates the times of a changed directory; debugfs does not.
        let noted = ["etc", "etc/conf.d"].map(|dir| format!("set_inode_field {dir} mtime 20210101000000"));
        let noted = noted.iter().map(String::as_str).filter(|_| !orders.is_empty());
        for order in orders.iter().copied().chain(noted) {
            let order = order.replace("NEW", dir.join("new").to_str().unwrap());
            run("debugfs", &["-w", "-R", &order, path]);
        }
        (first, read())
    }

    fn whole() -> Vec<Range<u64>> {
        vec![Range { start: 0, end: SIZE as u64 }]
    }

    fn difference(orders: &[&str]) -> io::Result<Difference> {
        let dir = tempfile::tempdir().unwrap();
        let (mut a, mut b) = two(dir.path(), orders);
        differ(&mut a, &mut b, START as u64, &whole(), SPECIAL)
    }

    fn files(orders: &[&str]) -> Vec<Altered> {
        match difference(orders).unwrap() {
            Difference::Files(altered) => altered,
            Difference::More(what) => panic!("{what}"),
        }
    }

    #[test]
    fn contents_are_told() {
        assert_eq!(files(&[]), []);
        let altered = files(&["rm etc/page", "write NEW etc/page"]);
        let page: Vec<_> = altered.iter().filter(|a| a.content.is_some()).collect();
        assert_eq!(page.len(), 1, "{altered:?}");
        assert_eq!(page[0].content.as_deref(), Some(b"new content".as_slice()));
        assert_eq!((page[0].change.size, page[0].change.path.as_deref()), (3, Some("/etc/page")));
        // Another inode in its place, with a long content.
        let altered =
            files(&["write NEW etc/spare", "rm etc/large", "ln etc/spare etc/large", "unlink etc/spare"]);
        let large: Vec<_> = altered.iter().filter(|a| a.content.is_some()).collect();
        assert_eq!((large.len(), large[0].change.size), (1, 300_000));
        // Only times differ.
        let altered = files(&["set_inode_field etc/large mtime 20200101000000"]);
        let large: Vec<_> = altered.iter().filter(|a| a.change.size == 300_000).collect();
        assert_eq!(large.len(), 1, "{altered:?}");
        let time = protocol::Time { seconds: 1_577_836_800, nanoseconds: 0 };
        assert_eq!((large[0].change.to, &large[0].content), (time, &None));
    }

    #[test]
    fn more_than_contents_is_told_in_words() {
        let more = |orders: &[&str], words: &str| match difference(orders) {
            Ok(Difference::More(what)) => assert_eq!(what, words),
            Ok(Difference::Files(altered)) => panic!("{words}: {altered:?}"),
            Err(error) => assert_eq!(error.to_string(), words),
        };
        more(&["write NEW etc/conf.d/other"], "/etc/conf.d/other is new");
        more(&["rm etc/page"], "/etc/page is gone");
        more(&["mkdir etc/dir"], "/etc/dir is new");
        more(&["set_inode_field etc/page mode 0100600"], "/etc/page has other metadata");
        more(&["set_inode_field etc/page uid 7"], "/etc/page has other metadata");
        more(&["set_inode_field etc/conf.d mode 040700"], "/etc/conf.d has other metadata");
        more(&["rm etc/link", "symlink etc/link conf.d"], "/etc/link points to another target");
        more(
            &["rm etc/conf.d/x", "write NEW etc/conf.d/x", "set_inode_field etc/conf.d/x mode 0104755"],
            "/etc/conf.d/x changed, and has hard links, set-id bits or attributes",
        );
        more(&["rm etc/page", "symlink etc/page conf.d"], "/etc/page is of another kind");
        more(
            &["rm etc/conf.d/y", "write NEW etc/conf.d/y"],
            "/etc/conf.d/y may have been read by the kernel",
        );
        more(&["ea_set etc/page user.x y"], "/etc/page has other metadata");
        more(&["set_inode_field var/log/journal mode 040700"], "/var/log/journal has other metadata");
        more(
            &["unlink etc/one-too", "unlink etc/two", "ln etc/one etc/two", "ln etc/two-too etc/one-too"],
            "/etc/one-too has several hard links",
        );
        more(&["set_super_value volume_name other"], "the filesystem is a different one");
        more(&["feature needs_recovery"], "the ext4 filesystem has features that vimg can't read");
    }

    #[test]
    fn what_is_left_alone_is_left_alone() {
        for orders in [
            ["set_inode_field var/log/journal/a mtime 20200101000000"].as_slice(),
            &["rm var/log/journal/a", "write NEW var/log/journal/b"],
        ] {
            let altered = files(orders);
            assert!(altered.iter().all(|a| a.change.size == 1024 && a.content.is_none()), "{altered:?}");
        }
    }

    #[test]
    fn only_what_may_differ_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let (mut a, mut b) = two(dir.path(), &["set_inode_field etc/large mtime 20200101000000"]);
        let none =
            differ(&mut a, &mut b, START as u64, &[0..4096, (SIZE - 4096) as u64..SIZE as u64], SPECIAL);
        assert_eq!(none.unwrap(), Difference::Files(vec![]));
    }

    #[test]
    fn no_disk_makes_it_panic() {
        use proptest::prelude::*;
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = two(dir.path(), &["rm etc/page", "write NEW etc/page", "mkdir etc/dir"]);
        // Offsets with data: tables, directories, extent trees.
        let places: Vec<usize> = (START..SIZE).filter(|at| a[*at] != 0 || b[*at] != 0).collect();
        proptest!(ProptestConfig::with_cases(64), |(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..40))| {
            let mut spoilt = b.clone();
            for (at, byte) in changes {
                spoilt[*at.get(&places)] = byte;
            }
            let _ = differ(&mut a.clone(), &mut spoilt, START as u64, &whole(), SPECIAL);
        });
    }
}

//! Compares two disks with a common base.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use super::ext4::{self, Altered, Difference, Special};
use super::layout::Layout;
use super::qcow2::{self, Chain};

/// The disk of a built layer.
#[derive(Debug, Clone)]
pub struct Made {
    /// Its file, which is not written to any more.
    pub disk: PathBuf,
    /// When the layer was applied, in seconds since 1970.
    pub during: Range<i64>,
    /// Whether it was applied in a booted machine, which writes notes such as a
    /// journal.
    pub booted: bool,
}

/// A previous output, as qcow2.
#[derive(Debug, Clone)]
pub struct Exported {
    /// Its file.
    pub disk: PathBuf,
    /// The chain that it was exported from, the lowest first.
    pub chain: Vec<PathBuf>,
}

/// Paths at which booted machines keep notes. The notes of an earlier boot are
/// not part of what a boot or layer does.
pub const NOTES: [&str; 3] = ["/var/log/journal", "/var/lib/systemd/random-seed", "/var/lib/systemd/timers"];

/// Compares two disks whose lowest `shared` files are the same.
pub fn compare(a: &[PathBuf], b: &[PathBuf], shared: usize, special: Special<'_>) -> io::Result<Difference> {
    let (mut a, mut b) = (Chain::open(a)?, Chain::open(b)?);
    let size = a.size();
    if size != b.size() {
        return Ok(Difference::More("the disk has another size".into()));
    }
    let changed = qcow2::join([a.written(shared)?, b.written(shared)?].concat());
    // Both kernels mount what their tables say.
    let layout = Layout::of(&mut a)?;
    if Layout::of(&mut b)? != layout {
        return Ok(Difference::More("the root filesystem is in another place".into()));
    }
    let (start, end) = (layout.root.start, layout.root.end);
    // Nothing outside the root filesystem may differ.
    for range in &changed {
        for (from, to) in [(range.start, range.end.min(start)), (range.start.max(end), range.end)] {
            if !same(&mut a, &mut b, from, to.min(size))? {
                return Ok(Difference::More("the disk differs outside its root filesystem".into()));
            }
        }
    }
    ext4::differ(&mut a, &mut b, start, &changed, special)
}

fn same(a: &mut Chain, b: &mut Chain, mut from: u64, to: u64) -> io::Result<bool> {
    let mut buffers = [vec![0; 64 << 10], vec![0; 64 << 10]];
    while from < to {
        let length = (to - from).min(64 << 10) as usize;
        a.read_at(from, &mut buffers[0][..length])?;
        b.read_at(from, &mut buffers[1][..length])?;
        if buffers[0][..length] != buffers[1][..length] {
            return Ok(false);
        }
        from += length as u64;
    }
    Ok(true)
}

/// See [`super::DiskTool::alike`].
pub(super) fn alike(below: &[PathBuf], a: &Made, b: &Made) -> io::Result<bool> {
    let chain = |disk: &Path| below.iter().cloned().chain([disk.to_owned()]).collect::<Vec<_>>();
    let apart: &[&str] = if a.booted && b.booted { &NOTES } else { &[] };
    let special = Special { apart, fixed: &[], most: 0, named: false };
    let difference = compare(&chain(&a.disk), &chain(&b.disk), below.len(), special)?;
    Ok(match difference {
        Difference::Files(altered) => {
            altered.iter().all(|one| is_noise(one, [&a.during, &b.during])) && in_the_same_order(&altered)
        }
        Difference::More(_) => false,
    })
}

/// Whether a file differs only in the time at which its layer was built. A time
/// outside of the builds was chosen by someone, and counts.
fn is_noise(one: &Altered, during: [&Range<i64>; 2]) -> bool {
    let times = [&one.change.modified, &one.change.to];
    one.content.is_none() && times.iter().zip(during).all(|(time, during)| during.contains(&time.seconds))
}

/// Whether files were changed in the same order. The newer of two files matters
/// to `make`, `test -nt` and `rsync -u`. Times that are equal in one disk fit
/// any order in the other: a kernel's clock ticks a few hundred times a second,
/// at random moments.
fn in_the_same_order(altered: &[Altered]) -> bool {
    let mut times: Vec<_> = altered.iter().map(|one| (one.change.modified, one.change.to)).collect();
    times.sort_unstable();
    // The latest time, in the second disk, of the files that are older in the
    // first.
    let mut latest = None;
    times.chunk_by(|a, b| a.0 == b.0).all(|tied| {
        let fits = tied.iter().all(|(_, to)| latest.is_none_or(|latest| latest <= *to));
        latest = latest.max(tied.last().map(|(_, to)| *to));
        fits
    })
}

/// See [`super::DiskTool::revise`].
pub(super) fn revise(chain: &[PathBuf], earlier: &Exported, copies: &[File]) -> io::Result<()> {
    let shared = chain.iter().zip(&earlier.chain).take_while(|(a, b)| a == b).count();
    let (mut disk, mut before) = (Chain::open(chain)?, Chain::open(&earlier.chain)?);
    let changed = qcow2::join([disk.written(shared)?, before.written(shared)?].concat());
    let revision = qcow2::Revision::of(&earlier.disk, &mut disk, &changed)?;
    copies.iter().try_for_each(|copy| revision.make(copy))
}

#[cfg(test)]
mod tests {
    use vimg_agent::protocol::{Change, Inode, Time};

    use super::*;

    #[test]
    fn a_copy_of_one_disk_is_made_another_that_grew_from_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let run = |line: &[&str]| {
            let output = std::process::Command::new(line[0])
                .args(&line[1..])
                .current_dir(dir.path())
                .output()
                .unwrap();
            let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
            assert!(output.status.success(), "{line:?}: {said}");
            said
        };
        run(&["qemu-img", "create", "-q", "-f", "qcow2", "base", "4M"]);
        run(&["qemu-io", "-f", "qcow2", "-c", "write -P 7 0 2M", "base"]);
        // Where only one of them has written, the other has the content of the
        // base.
        for (name, write) in [("a", "write -P 1 256k 128k"), ("b", "write -P 2 1M 70k")] {
            run(&["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "base", name]);
            run(&["qemu-io", "-f", "qcow2", "-c", write, name]);
        }
        let packed = ["-c", "-O", "qcow2", "-o", "compression_type=zstd"];
        run(&[["qemu-img", "convert"].as_slice(), &packed, &["a", "out"]].concat());
        run(&["qemu-img", "convert", "-O", "raw", "b", "wanted"]);
        // In the store, headers name no backing file.
        for name in ["a", "b"] {
            run(&["qemu-img", "rebase", "-u", "-b", "", name]);
        }
        let earlier = Exported { disk: path("out"), chain: vec![path("base"), path("a")] };
        let copy = File::options().write(true).open(path("out")).unwrap();
        revise(&[path("base"), path("b")], &earlier, &[copy]).unwrap();
        assert!(run(&["qemu-img", "compare", "-f", "raw", "wanted", "out"]).contains("identical"));
        assert!(run(&["qemu-img", "check", "out"]).contains("No errors"));
    }

    #[test]
    fn times_are_noise_where_both_were_set_by_the_clock() {
        let one = |modified: i64, to: i64| Altered {
            change: Change {
                inode: Inode { number: 20, generation: 1 },
                size: 5,
                modified: Time { seconds: modified, nanoseconds: 0 },
                to: Time { seconds: to, nanoseconds: 0 },
                chosen: false,
                content: None,
                path: None,
            },
            content: None,
        };
        let noise = |one: &Altered| is_noise(one, [&(100..110), &(200..210)]);
        assert!(noise(&one(100, 209)));
        // A chosen time, and a time from below.
        assert!(!noise(&one(50, 205)) && !noise(&one(105, 50)) && !noise(&one(205, 105)));
        assert!(!noise(&Altered { content: Some(vec![1]), ..one(100, 209) }));

        // The order of two files counts; a common tick is noise.
        let ordered = |times: &[(i64, i64)]| {
            in_the_same_order(&times.iter().map(|(a, b)| one(*a, *b)).collect::<Vec<_>>())
        };
        assert!(ordered(&[(100, 200), (103, 201), (101, 201), (102, 201)]));
        assert!(ordered(&[(100, 205), (100, 201), (101, 205)]));
        assert!(!ordered(&[(100, 201), (101, 200)]));
        assert!(!ordered(&[(100, 203), (100, 200), (101, 202)]));
    }
}

//! Damaged files for everything that vimg parses from strangers: the functions
//! of the fuzz targets, on mutations of small valid files. The mutations depend
//! on a seed only, which each test prints; `VIMG_FUZZ_SEED` sets another.

#![expect(clippy::unwrap_used, reason = "a test that can't go on fails")]

#[path = "../fuzz/src/lib.rs"]
#[expect(unreachable_pub, reason = "it is the library of the fuzz targets")]
mod targets;

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use vimg::cache::entry::Entry;
use vimg::cache::sign::Signer;
use vimg::cache::wire::WireState;
use vimg::digest::{Description, Digest, Key};
use vimg::store::{Disk, DiskKind, Record};
use vimg_agent::protocol::{FromAgent, ToAgent, encode_data, encode_message};

/// A small, fast, repeatable source of choices (splitmix64).
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }

    /// Damages some bytes, as fuzzers do: flips, cuts, copies, large numbers.
    /// Half of the changes go to places of `hot`, if there are some.
    fn damage(&mut self, bytes: &mut Vec<u8>, hot: &[usize]) {
        for _ in 0..1 + self.below(6) {
            let at = match self.below(2) {
                0 if !hot.is_empty() => hot[self.below(hot.len())].min(bytes.len().saturating_sub(1)),
                _ => self.below(bytes.len()),
            };
            let end = (at + 1 + self.below(8)).min(bytes.len());
            match self.below(7) {
                0 => bytes.truncate(at),
                1 => drop(bytes.drain(at..end)),
                2 => {
                    let copy = bytes[at..end].to_vec();
                    let to = self.below(bytes.len());
                    bytes.splice(to..to, copy);
                }
                3 => bytes[at..end].fill(0xff),
                4 => bytes[at..end].fill(0),
                _ => bytes[at..end].iter_mut().take(1).for_each(|byte| *byte ^= 1 << self.below(8)),
            }
            if bytes.is_empty() {
                bytes.push(b'{');
            }
        }
    }
}

/// Calls a target with the seeds as they are, and with `count` damaged ones.
#[expect(clippy::print_stdout, reason = "a failed test shows its seed")]
fn mutate(name: &str, target: fn(&[u8]) -> bool, seeds: &[Vec<u8>], count: usize) {
    let seed = std::env::var("VIMG_FUZZ_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(1);
    println!("{name}: VIMG_FUZZ_SEED={seed}");
    let mut rng = Rng(seed);
    // In large seeds nearly all bytes are zero, and what matters is elsewhere.
    let hot: Vec<Vec<usize>> =
        seeds.iter().map(|seed| (0..seed.len()).filter(|at| seed[*at] != 0).collect()).collect();
    let valid: Vec<bool> = seeds.iter().map(|seed| target(seed)).collect();
    assert!(valid.iter().all(|valid| *valid), "{name}: not all seeds are valid: {valid:?}");
    for n in 0..count {
        let mut bytes = seeds[n % seeds.len()].clone();
        rng.damage(&mut bytes, &hot[n % seeds.len()]);
        let _ = target(&bytes);
    }
}

fn texts(all: &[&str]) -> Vec<Vec<u8>> {
    all.iter().map(|text| text.as_bytes().to_vec()).collect()
}

const RECIPE: &str = "param \"p\" default=\"x\"\nsecret \"s\" env=\"S\"\n\
image \"a\" {\n    bootstrap \"debian\" suite=\"bookworm\"\n    machine cpus=2 memory=\"1GiB\"\n    layer \"c\" port=80\n\
    check \"up\" { http \"http://localhost:{{ 1 + 2 }}/\" within=\"5s\" }\n    output \"qcow2\" path=\"a.img\"\n}\n\
capability \"k\" { input \"port\" type=\"int\" }\n\
configuration \"c\" provides=\"k\" {\n    input \"port\" type=\"int\" default=5\n    package \"nginx\"\n\
    file \"/f\" content=\"{{ port }} {{ p | upper }}\" mode=\"0600\"\n    run { script \"#!/bin/sh\\necho {{ port }}\"; env A=#\"b\"# }\n}\n";

#[test]
fn damaged_recipes() {
    mutate("recipe", targets::recipe, &texts(&[RECIPE, "/- a { b; }\n/* c */"]), 800);
}

#[test]
fn damaged_settings() {
    let seeds = [
        "cache-from \"type=s3,bucket=b,prefix=p,endpoint_url=http://127.0.0.1:9\"\naccel \"kvm\"\n",
        "trust \"main\" \"ed25519:AAAA\" // a comment\ncache-from \"host:5000/cache/web\"",
        "type=local,\"dest=/a,\"\"b\",timeout=5s,max-age=30d,domain=pr-7;main",
    ];
    mutate("settings", targets::settings, &texts(&seeds), 3000);
}

#[test]
fn damaged_frames() {
    let mut seed = encode_message(&FromAgent::Output { step: 3, text: "text".into() }).unwrap();
    seed.extend(encode_message(&FromAgent::Ready { failed_units: vec!["a.service".into()] }).unwrap());
    seed.extend(encode_data(b"data").unwrap());
    seed.extend(encode_message(&ToAgent::Digests { paths: vec!["/etc/passwd".into()] }).unwrap());
    mutate("frames", targets::frames, &[seed], 5000);
}

#[test]
fn damaged_records() {
    let disk = Disk { kind: DiskKind::Qcow2, backing: None, depth: 0 };
    let key = Key(Digest([7; 32]));
    let state = WireState::of(&Record::new(key, "base", "a:base", Description::default(), disk));
    let signer = Signer::generate().unwrap();
    let signed = Entry::sign("main", 1_700_000_000, state, vec![], None, &signer).unwrap();
    let payload = serde_json::to_vec(&signed.entry).unwrap();
    mutate("entry", targets::entry, &[payload, vimg::cache::entry::write(&[&signed]).unwrap()], 400);
}

#[test]
fn damaged_disks() {
    let mut header = vec![0; 2048];
    // Clusters of 512 bytes, one table for a disk of 32 KiB.
    for (at, field) in [
        (0, &b"QFI\xfb"[..]),
        (4, &3_u32.to_be_bytes()),
        (20, &9_u32.to_be_bytes()),
        (24, &32768_u64.to_be_bytes()),
        (36, &1_u32.to_be_bytes()),
        (40, &512_u64.to_be_bytes()),
        (48, &1024_u64.to_be_bytes()),
        (56, &1_u32.to_be_bytes()),
        (96, &4_u32.to_be_bytes()),
        (100, &112_u32.to_be_bytes()),
    ] {
        header[at..at + field.len()].copy_from_slice(field);
    }
    mutate("qcow2", targets::qcow2, &[header], 1500);
}

#[test]
fn damaged_partition_tables() {
    let mut file = tempfile::tempfile().unwrap();
    file.set_len(80 << 20).unwrap();
    vimg::disk::gpt::write(&mut file, [7; 16], &[0; 512], &[1; 2000]).unwrap();
    let mut table = vec![0; 34 * 512];
    file.read_exact_at(&mut table, 0).unwrap();
    // The disk ends with its table here, so its partitions begin and end there.
    for entry in 0..3 {
        let at = 1024 + entry * 128;
        table[at + 32..at + 40].copy_from_slice(&30_u64.to_le_bytes());
        table[at + 40..at + 48].copy_from_slice(&33_u64.to_le_bytes());
    }
    mutate("gpt", targets::gpt, &[table], 3000);
}

/// Makes a small filesystem with a directory and a file.
fn filesystem(dir: &Path) -> Vec<u8> {
    let (tree, image) = (dir.join("tree/etc"), dir.join("image"));
    std::fs::create_dir_all(&tree).unwrap();
    std::fs::write(tree.join("page"), "x".repeat(5000)).unwrap();
    std::os::unix::fs::symlink("../etc/page", tree.join("link")).unwrap();
    let made = Command::new("mke2fs")
        .args(["-q", "-t", "ext4", "-b", "1024", "-N", "32", "-O", "^has_journal,^resize_inode", "-d"])
        .args([dir.join("tree").as_os_str(), image.as_os_str()])
        .arg("256k")
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .status();
    assert!(made.unwrap().success());
    std::fs::read(image).unwrap()
}

#[test]
fn damaged_filesystems() {
    let dir = tempfile::tempdir().unwrap();
    let one = filesystem(dir.path());
    mutate("ext4", targets::ext4, &[[one.clone(), one].concat()], 400);
}

#[test]
fn damaged_configurations_of_boot_loaders() {
    let text = "set default=\"1>0\"\nset a='b c'\nif [ -s $prefix/grubenv ]; then\n  load_env\nelse\n  set x=${a}$a\nfi\n\
                function f {\n  insmod all_video\n}\nmenuentry \"x\" --id y {\n  f\n  search.fs_uuid abc root\n  \
                linux /vmlinuz root=UUID=abc $a\n  initrd /initrd.img\n}\n\
                submenu z { menuentry 'w' { linux /old \\\n  ro; } }\n";
    mutate("grub", targets::grub, &[text.as_bytes().to_vec()], 3000);
}

#[test]
fn damaged_efi_system_partitions() {
    let mut esp = vec![0; 16 << 10];
    esp[510..512].copy_from_slice(&[0x55, 0xaa]);
    esp[82..87].copy_from_slice(b"FAT32");
    // Sectors of 512 bytes, one in a cluster, one before the only table, which has one.
    for (at, value) in [(11, 0), (12, 2), (13, 1), (14, 1), (16, 1), (36, 1), (44, 2)] {
        esp[at] = value;
    }
    for (n, (name, attributes)) in
        [(b"EFI        ", 0x10), (b"BOOT       ", 0x10), (b"BOOTX64 EFI", 0)].into_iter().enumerate()
    {
        let entry = 1024 + n * 512;
        esp[entry..entry + 11].copy_from_slice(name);
        esp[entry + 11] = attributes;
        esp[entry + 26] = n as u8 + 3;
        esp[entry + 28] = 5;
        // The end of its chain.
        esp[512 + (n + 2) * 4..512 + (n + 3) * 4].copy_from_slice(&0x0fff_ffff_u32.to_le_bytes());
    }
    mutate("fat", targets::fat, &[esp], 2000);
}

/// Each target has a function, a file, an entry in the manifest, a row in its
/// README and a test here.
#[test]
fn all_targets_are_wired() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let read = |name: &str| std::fs::read_to_string(root.join(name)).unwrap();
    let (library, manifest, page) =
        (read("fuzz/src/lib.rs"), read("fuzz/Cargo.toml"), read("fuzz/README.md"));
    let own = read("tests/fuzz.rs");
    let mut count = 0;
    for line in library.lines().filter_map(|line| line.strip_prefix("pub fn ")) {
        let name = line.split('(').next().unwrap();
        assert!(read(&format!("fuzz/fuzz_targets/{name}.rs")).contains(&format!("vimg_fuzz::{name}(data)")));
        assert!(
            manifest.contains(&format!("name = \"{name}\"\npath = \"fuzz_targets/{name}.rs\"")),
            "{name}"
        );
        assert!(page.contains(&format!("| `{name}` |")), "{name} is not in fuzz/README.md");
        assert!(own.contains(&format!("targets::{name},")), "{name} is not tested here");
        count += 1;
    }
    assert_eq!(count, std::fs::read_dir(root.join("fuzz/fuzz_targets")).unwrap().count());
}

//! Tells without a boot what keeps a disk from booting: the configuration of
//! its boot loader, the files that this names, and the devices in fstab(5).

use std::fmt;
use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::ext4::{Head, Tree};
use super::fat;
use super::gpt;
use super::grub::{self, DefaultEntry, Loaded, Trouble};
use super::layout::Layout;
use super::qcow2::Chain;
use super::volumes::Volume;

/// Where GRUB's configuration is.
const GRUB: &str = "/boot/grub/grub.cfg";
/// The boot loader for UEFI, on the EFI system partition.
const EFI: &str = "EFI/BOOT/BOOTX64.EFI";
const FSTAB: &str = "/etc/fstab";
/// Maximum size of a configuration, in bytes.
const MOST: usize = 1 << 20;

/// How initial RAM disks begin: cpio archives, and what the kernel unpacks
/// (`lib/decompress.c`).
const INITRDS: [&[u8]; 8] = [
    b"0707",
    &[0x1f, 0x8b],
    &[0xfd, b'7', b'z', b'X', b'Z'],
    &[0x28, 0xb5, 0x2f, 0xfd],
    &[0x02, 0x21, 0x4c, 0x18],
    b"BZh",
    &[0x5d, 0, 0],
    &[0x89, b'L', b'Z', b'O'],
];

/// Something that keeps a disk from booting.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// The path of the file in the machine.
    pub file: String,
    /// The line, counted from 1, if there is one.
    pub line: Option<usize>,
    /// The mistake, in a sentence.
    pub what: String,
    /// What to do about it.
    pub help: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            Some(line) => write!(f, "{}, line {line}: {}", self.file, self.what),
            None => write!(f, "{}: {}", self.file, self.what),
        }
    }
}

impl Problem {
    fn new(file: &str, line: Option<usize>, what: impl Into<String>, help: &str) -> Self {
        Self { file: file.to_owned(), line, what: what.into(), help: help.to_owned() }
    }
}

/// Looks for problems of the disk that is a chain of files, the lowest first.
/// `own` says that vimg made the disk, so that it must boot by GRUB. Returns
/// nothing for a filesystem that vimg can't read.
///
/// # Errors
///
/// The disk can't be read.
pub fn problems(chain: &[impl AsRef<Path>], own: bool) -> io::Result<Vec<Problem>> {
    let mut disk = Chain::open(chain)?;
    let Ok(layout) = Layout::of(&mut disk) else { return Ok(Vec::new()) };
    let volumes = Volume::of(&mut disk)?;
    let mut found = Vec::new();
    if own {
        found.extend(efi(&mut disk, &volumes)?);
    }
    let Ok(tree) = Tree::open(&mut disk, layout.root.start) else { return Ok(found) };
    let mut root = Root { tree, volumes: &volumes, number: layout.number };
    found.extend(root.loader(own)?);
    found.extend(root.fstab()?);
    Ok(found)
}

fn efi(disk: &mut Chain, volumes: &[Volume]) -> io::Result<Option<Problem>> {
    let Some(esp) = volumes.iter().find(|volume| volume.partition.kind == gpt::ESP) else {
        return Ok(None);
    };
    let size = fat::size_of(disk, esp.partition.place.start, EFI)?;
    let missing = size.is_none_or(|size| size == 0);
    let help = "a script has changed the EFI system partition; keep this file, or copy your own to it";
    Ok(missing.then(|| Problem::new(EFI, None, "the boot loader for UEFI is missing or empty", help)))
}

/// The root filesystem, with what is beside it.
struct Root<'a> {
    tree: Tree<'a, Chain>,
    volumes: &'a [Volume],
    /// The number of its partition.
    number: usize,
}

impl Root<'_> {
    /// Checks what the boot loader boots.
    fn loader(&mut self, own: bool) -> io::Result<Option<Problem>> {
        if !own && self.tree.head(GRUB, 0)?.is_none() {
            return Ok(None);
        }
        let tree = &mut self.tree;
        let read = &mut |path: &str| {
            let head = tree.head(path, MOST)?;
            Ok(head.map(|head| String::from_utf8_lossy(&head.bytes).into_owned()))
        };
        let entry = match grub::default_entry(GRUB, read)? {
            Ok(entry) => entry,
            Err(Trouble { file, line, what }) => {
                let help = "fix what writes this file. Declare kernel parameters with `kernel-parameter` instead \
                            of editing it";
                return Ok(Some(Problem::new(&file, line, what, help)));
            }
        };
        if entry.other {
            return Ok(None);
        }
        if let Some(problem) = self.searched(&entry) {
            return Ok(Some(problem));
        }
        self.entry(&entry)
    }

    /// Checks that the filesystems exist that an entry looks for.
    fn searched(&self, entry: &DefaultEntry) -> Option<Problem> {
        let ((file, line), uuid) =
            entry.searched.iter().find(|(_, uuid)| !self.is_volume(&format!("UUID={uuid}")))?;
        let what = format!("no filesystem of the disk has the UUID {uuid}");
        Some(Problem::new(
            file,
            Some(*line),
            what,
            "use the UUID of the root filesystem, which `blkid` prints",
        ))
    }

    /// Checks the files and the command line of an entry.
    fn entry(&mut self, entry: &DefaultEntry) -> io::Result<Option<Problem>> {
        let Some(kernel) = &entry.kernel else {
            let what = format!("the entry \"{}\" loads no kernel", entry.title);
            return Ok(Some(Problem::new(GRUB, None, what, "add a `linux` command")));
        };
        // Files may be on another filesystem, for instance one for /boot.
        let elsewhere = entry.searched.iter().any(|(_, uuid)| !self.is_root(uuid));
        if !elsewhere {
            let is_kernel =
                |head: &[u8]| head.get(0x202..0x206) == Some(b"HdrS") || head.get(56..60) == Some(b"ARMd");
            let help = "a script or package has removed the kernel or cut it off; install a kernel package";
            if let Some(problem) = self.loaded(kernel, "a Linux kernel", help, is_kernel)? {
                return Ok(Some(problem));
            }
            let is_initrd = |head: &[u8]| INITRDS.iter().any(|magic| head.starts_with(magic));
            for initrd in &entry.initrds {
                let help = "`update-initramfs -u` writes it again";
                if let Some(problem) = self.loaded(initrd, "an initial RAM disk", help, is_initrd)? {
                    return Ok(Some(problem));
                }
            }
        }
        let value = |name: &str| entry.words.iter().rev().find_map(|word| word.strip_prefix(name));
        let (file, line) = &kernel.from;
        if let Some(root) = value("root=")
            && !self.is_volume(root)
        {
            let what = format!(
                "the kernel would look for its root filesystem on {root}, which the disk does not have"
            );
            return Ok(Some(Problem::new(
                file,
                Some(*line),
                what,
                "use `root=UUID=` with the UUID of the root filesystem",
            )));
        }
        self.init(value("init=").unwrap_or("/sbin/init"))
    }

    /// Checks a file that an entry loads.
    fn loaded(
        &mut self,
        file: &Loaded,
        kind: &str,
        help: &str,
        is_right: impl Fn(&[u8]) -> bool,
    ) -> io::Result<Option<Problem>> {
        let what = match self.tree.head(&file.path, 1024)? {
            None => format!("there is no file {}", file.path),
            Some(Head { size: 0, .. }) => format!("{} is empty", file.path),
            Some(head) if !is_right(&head.bytes) => format!("{} is not {kind}", file.path),
            Some(_) => return Ok(None),
        };
        Ok(Some(Problem::new(&file.from.0, Some(file.from.1), what, help)))
    }

    fn init(&mut self, path: &str) -> io::Result<Option<Problem>> {
        let what = match self.tree.head(path, 0)? {
            None => "there is no such file, and the kernel starts it first",
            Some(head) if head.size == 0 || head.mode & 0o111 == 0 => "the kernel can't start it",
            Some(_) => return Ok(None),
        };
        Ok(Some(Problem::new(path, None, what, "install an init system: the package `systemd-sysv`")))
    }

    /// Checks that the devices exist that a boot mounts and waits for.
    fn fstab(&mut self) -> io::Result<Option<Problem>> {
        let Some(table) = self.tree.head(FSTAB, MOST)? else { return Ok(None) };
        let text = String::from_utf8_lossy(&table.bytes).into_owned();
        for (n, line) in text.lines().enumerate().filter(|(_, line)| !line.trim_start().starts_with('#')) {
            let mut fields = line.split_whitespace();
            let (Some(device), Some(target)) = (fields.next(), fields.next()) else { continue };
            let options = fields.nth(1).unwrap_or_default();
            let waits = !options.split(',').any(|option| option == "nofail" || option == "noauto");
            if waits && !self.is_volume(device) {
                let what =
                    format!("{device} for {target} is not on the disk, so a boot would wait for it and fail");
                let help = "add the option `nofail` if the device is another disk, or correct its name";
                return Ok(Some(Problem::new(FSTAB, Some(n + 1), what, help)));
            }
        }
        Ok(None)
    }

    /// Whether a device can be on the disk.
    fn is_volume(&self, spec: &str) -> bool {
        self.volumes.iter().any(|volume| volume.is_named(spec) != Some(false))
    }

    fn is_root(&self, uuid: &str) -> bool {
        let spec = format!("UUID={uuid}");
        self.volumes.iter().any(|v| v.partition.number == self.number && v.is_named(&spec) == Some(true))
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::path::PathBuf;
    use std::process::Command;

    use super::*;

    const UUID: &str = "00010203-0405-8607-8809-0a0b0c0d0e0f";
    const SIZE: u64 = 96 << 20;
    const OPTIONS: &str =
        "none,has_journal,ext_attr,filetype,extent,64bit,sparse_super,extra_isize,metadata_csum";

    fn run(dir: &Path, line: &str) {
        let output = Command::new("sh").args(["-euc", line]).current_dir(dir).output().unwrap();
        assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// Makes a disk as a base has it, after the commands `damage` in its root.
    fn disk(dir: &Path, damage: &str) -> Vec<PathBuf> {
        let (tree, raw) = (dir.join("tree"), dir.join("raw"));
        run(dir, "rm -rf tree raw; mkdir -p tree/boot/grub tree/etc tree/sbin tree/lib/systemd");
        let config = format!(
            "set default=0\nsource /boot/grub/vimg.cfg\nmenuentry \"Debian\" {{\n  search.fs_uuid {UUID} root\n  \
             linux /vmlinuz root=UUID={UUID} ro $parameters\n  initrd /initrd.img\n}}\n"
        );
        fs::write(tree.join("boot/grub/grub.cfg"), config).unwrap();
        fs::write(tree.join("boot/grub/vimg.cfg"), "set parameters=\"quiet\"\n").unwrap();
        fs::write(tree.join("etc/fstab"), format!("# root\nUUID={UUID} / ext4 rw 0 0\n")).unwrap();
        let mut kernel = vec![0; 5000];
        kernel[0x202..0x206].copy_from_slice(b"HdrS");
        fs::write(tree.join("boot/vmlinuz-6.1"), kernel).unwrap();
        fs::write(tree.join("boot/initrd.img-6.1"), b"070701 and so on").unwrap();
        run(&tree, "ln -s boot/vmlinuz-6.1 vmlinuz; ln -s /boot/../boot/initrd.img-6.1 initrd.img");
        run(
            &tree,
            "echo x >lib/systemd/systemd; chmod 755 lib/systemd/systemd; ln -s ../lib/systemd/systemd sbin/init",
        );
        run(&tree, damage);
        let mut file = File::options().read(true).write(true).create_new(true).open(&raw).unwrap();
        file.set_len(SIZE).unwrap();
        gpt::write(&mut file, [7; 16], &[0; 512], &[1; 2000]).unwrap();
        let (start, end) = (gpt::ROOT_START * gpt::SECTOR, gpt::root_end(SIZE) * gpt::SECTOR);
        let kib = (end - start) / 1024;
        run(
            dir,
            &format!(
                "mke2fs -q -F -t ext4 -b 4096 -I 256 -O {OPTIONS} -U {UUID} -E offset={start} -d tree raw {kib}k"
            ),
        );
        run(dir, "if [ -e esp ]; then dd if=esp of=raw bs=1M seek=1 conv=notrunc,sparse status=none; fi");
        run(dir, "qemu-img convert -f raw -O qcow2 raw disk");
        vec![dir.join("disk")]
    }

    fn esp(dir: &Path) {
        run(dir, "truncate -s 64M esp; mkfs.vfat -F 32 -s 1 esp; mmd -i esp ::/EFI ::/EFI/BOOT; echo x >x");
        run(dir, "mcopy -i esp x ::/EFI/BOOT/BOOTX64.EFI");
    }

    #[test]
    fn what_keeps_a_disk_from_booting_has_its_place() {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path();
        esp(dir);
        let found = |damage: &str| {
            let found = problems(&disk(dir, damage), true).unwrap();
            found.iter().map(Problem::to_string).collect::<Vec<_>>().join("; ")
        };
        let grub = "/boot/grub/grub.cfg";
        for (damage, wanted) in [
            ("true", String::new()),
            ("echo nonsense >boot/grub/grub.cfg", format!("{grub}, line 1: GRUB has no command `nonsense`")),
            ("rm boot/grub/grub.cfg", format!("{grub}: the file does not exist")),
            ("rm boot/grub/vimg.cfg", format!("{grub}, line 2: there is no file /boot/grub/vimg.cfg")),
            ("rm vmlinuz", format!("{grub}, line 5: there is no file /vmlinuz")),
            ("echo x >boot/vmlinuz-6.1", format!("{grub}, line 5: /vmlinuz is not a Linux kernel")),
            (": >boot/initrd.img-6.1", format!("{grub}, line 6: /initrd.img is empty")),
            ("rm sbin/init", "/sbin/init: there is no such file, and the kernel starts it first".to_owned()),
            ("chmod 644 lib/systemd/systemd", "/sbin/init: the kernel can't start it".to_owned()),
            (
                "sed -i s/root=UUID=0/root=UUID=1/ boot/grub/grub.cfg",
                format!(
                    "{grub}, line 5: the kernel would look for its root filesystem on UUID=1{}, which the disk does not have",
                    &UUID[1..]
                ),
            ),
            (
                "echo 'UUID=abc /data ext4 defaults 0 0' >>etc/fstab",
                "/etc/fstab, line 3: UUID=abc for /data is not on the disk, so a boot would wait for it and fail".to_owned(),
            ),
            ("echo 'UUID=abc /data ext4 nofail 0 0' >>etc/fstab", String::new()),
            ("echo 'tmpfs /tmp tmpfs defaults 0 0' >>etc/fstab", String::new()),
        ] {
            assert_eq!(found(damage), wanted, "{damage}");
        }
        run(dir, "mdel -i esp ::/EFI/BOOT/BOOTX64.EFI");
        assert_eq!(found("true"), "EFI/BOOT/BOOTX64.EFI: the boot loader for UEFI is missing or empty");
        // A disk from elsewhere may boot in another way.
        assert_eq!(problems(&disk(dir, "rm boot/grub/grub.cfg"), false).unwrap(), []);
    }
}

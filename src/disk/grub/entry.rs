//! An entry of the menu: what it loads.

/// A file that an entry loads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loaded {
    /// The file of the configuration that says so, and the line.
    pub from: (String, usize),
    /// The path of the file that it loads.
    pub path: String,
}

/// The entry that boots without a choice in the menu.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DefaultEntry {
    /// Its title.
    pub title: String,
    /// The kernel.
    pub kernel: Option<Loaded>,
    /// The kernel's command line, as words.
    pub words: Vec<String>,
    /// The initial RAM disks.
    pub initrds: Vec<Loaded>,
    /// The UUIDs of the filesystems that it looks for, and the lines.
    pub searched: Vec<((String, usize), String)>,
    /// Whether it passes on to something else than a Linux kernel.
    pub other: bool,
}

impl DefaultEntry {
    /// Notes what a command loads.
    pub(super) fn load(&mut self, name: &str, words: &[String], from: (&str, usize)) {
        let from = (from.0.to_owned(), from.1);
        let loaded =
            |path: &String| Loaded { from: from.clone(), path: local(path).unwrap_or_else(|| path.clone()) };
        match name {
            "linux" | "linux16" | "linuxefi" => {
                self.kernel = words.first().map(loaded);
                self.words = words.iter().skip(1).cloned().collect();
            }
            "initrd" | "initrd16" | "initrdefi" => self.initrds = words.iter().map(loaded).collect(),
            "search.fs_uuid" => self.searched.extend(words.first().map(|uuid| (from.clone(), uuid.clone()))),
            "search" if words.iter().any(|word| word == "--fs-uuid" || word == "-u") => {
                self.searched.extend(words.last().map(|uuid| (from.clone(), uuid.clone())));
            }
            "chainloader" | "appleloader" | "multiboot" | "multiboot2" | "xen_hypervisor" | "kfreebsd"
            | "knetbsd" | "kopenbsd" | "xnu_kernel" | "legacy_kernel" | "legacy_configfile" | "ntldr"
            | "blscfg" => {
                self.other = true;
            }
            _ => {}
        }
    }
}

/// Returns a path without the device before it; `None` if there is only a
/// device.
pub(super) fn local(path: &str) -> Option<String> {
    let path = match path.strip_prefix('(') {
        Some(rest) => rest.split_once(')')?.1,
        None => path,
    };
    path.starts_with('/').then(|| path.to_owned())
}

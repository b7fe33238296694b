//! Which words a recipe may add to the kernel's command line.

/// Maximum length of a word, in bytes. The kernel's limit for the whole line is 2,048
/// (`COMMAND_LINE_SIZE` of x86).
const LONGEST: usize = 512;

/// Characters that mean something in the configuration of GRUB, or in the files that
/// Debian's `update-grub` reads as a shell.
const SYNTAX: [char; 5] = ['"', '\'', '\\', '$', '`'];

/// Words that vimg keeps for itself, with the reason. A machine with another value would
/// not boot, or not get as far as the agent.
const KEPT: &[(&[&str], &str)] = &[
    (&["root", "rootfstype", "rootflags", "ro", "rw"], "vimg finds and mounts the root filesystem"),
    (&["init", "rdinit", "initrd", "noinitrd", "BOOT_IMAGE"], "vimg decides what the kernel starts"),
    (
        &["systemd.unit", "single", "s", "S", "1", "2", "3", "4", "5", "rescue", "emergency"],
        "the machine would not start its services; use `run` with `systemctl set-default`",
    ),
    (&["-", "--", "---"], "the kernel would pass all further words to the init system"),
];

/// Checks a word of the kernel's command line.
///
/// # Errors
///
/// The reason why it can't be one.
pub(super) fn word(text: &str) -> Result<String, String> {
    if text.is_empty() || text.len() > LONGEST || !text.chars().all(|c| c.is_ascii_graphic()) {
        return Err(format!("expected a word of at most {LONGEST} ASCII characters, without spaces"));
    }
    if let Some(c) = text.chars().find(|c| SYNTAX.contains(c)) {
        return Err(format!("a parameter can't contain `{c}`, which boot loaders interpret"));
    }
    let name = text.split('=').next().unwrap_or_default();
    // The kernel reads `-` and `_` in names as the same character.
    let same = |other: &&str| other.replace('-', "_") == name.replace('-', "_");
    if let Some((_, why)) = KEPT.iter().find(|(names, _)| names.iter().any(same)) {
        return Err(format!("`{name}` can't be set: {why}"));
    }
    if name.is_empty() || name.starts_with("vimg") {
        return Err("expected the name of a parameter of the kernel or the init system".into());
    }
    Ok(text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_parameters_of_the_kernel_and_safe_in_files() {
        for good in ["mitigations=off", "quiet", "console=ttyS1,115200n8", "nosmt=force", "isolcpus=1-3,5"] {
            assert_eq!(word(good), Ok(good.to_owned()));
        }
        for bad in ["", "a b", "a=\"b\"", "a=$(b)", "a=`b`", "a=\u{e9}", "=x", "vimg.watched", "a\nb"] {
            assert!(word(bad).is_err(), "{bad}");
        }
        for kept in ["root=/dev/sda1", "init=/bin/sh", "rdinit=/x", "systemd.unit=rescue.target", "--", "rw"]
        {
            assert!(word(kept).unwrap_err().contains("can't be set"), "{kept}");
        }
        assert!(word(&"x".repeat(LONGEST + 1)).is_err());
    }
}

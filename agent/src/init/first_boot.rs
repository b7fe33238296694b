//! The first boot of an image under systemd: a unit that creates the keys of the machine
//! before any service needs them. It removes itself and all its files when it is done.

use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::Path;

/// The unit that creates keys. It comes before sysinit.target, and every ordinary service
/// comes after that: also instances of templates, which can't all be named in advance.
const KEYS: &str = "vimg-first-boot.service";
/// The unit that removes both units. It comes after the machine has got its ID: until
/// then, the next boot would be a first boot again.
const END: &str = "vimg-first-boot-done.service";
const UNITS: &str = "etc/systemd/system";
/// Units that start at boot, early and late.
const EARLY: &str = "sysinit.target.wants";
const LATE: &str = "multi-user.target.wants";

/// systemd enables every unit on a first boot that no preset disables
/// (systemd.preset(5)). Which services start is the recipe's business.
const PRESET: &str = "etc/systemd/system-preset/00-vimg-first-boot.preset";

/// systemd's questions on the console, which would wait for an answer before anything
/// else starts (systemd-firstboot(1)). A machine that starts from an image has no person at its
/// console.
const WIZARD: &str = "etc/systemd/system/systemd-firstboot.service.d/50-vimg-first-boot.conf";

/// Writes the units for the machine below `root`.
pub(super) fn prepare(root: &Path, commands: &[&str]) -> io::Result<()> {
    let units = root.join(UNITS);
    let wanted = services(&units.join(LATE));
    let mut own: Vec<String> = [KEYS, END].iter().map(|unit| format!("{UNITS}/{unit}")).collect();
    own.extend([format!("{UNITS}/{EARLY}/{KEYS}"), format!("{UNITS}/{LATE}/{END}")]);
    // Instances of templates say by this what they wait for.
    for template in templates(root, &wanted) {
        if !commands.is_empty() {
            let file = format!("{UNITS}/{template}.d/50-vimg-first-boot.conf");
            write(root, &file, &format!("[Unit]\nAfter={KEYS}\n"))?;
            own.push(file);
        }
    }
    write(root, PRESET, "disable *\n")?;
    write(root, WIZARD, &format!("[Unit]\nConditionPathExists=!/{PRESET}\n"))?;
    own.push(WIZARD.to_owned());
    let mut runs: String = commands.iter().map(|command| format!("ExecStart={command}\n")).collect();
    if runs.is_empty() {
        runs.push_str("ExecStart=/bin/true\n");
    }
    let keys = format!(
        "[Unit]\nDescription=Create the keys of this machine\nDefaultDependencies=no\n\
         ConditionPathExists=/{PRESET}\nRequiresMountsFor=/etc /tmp\n\
         After=local-fs.target systemd-tmpfiles-setup.service systemd-random-seed.service\n\
         Before=sysinit.target first-boot-complete.target shutdown.target {}\n\
         Wants=first-boot-complete.target\nConflicts=shutdown.target\n\n\
         [Service]\nType=oneshot\nRemainAfterExit=yes\n{runs}",
        wanted.join(" ")
    );
    write(root, &format!("{UNITS}/{KEYS}"), &keys)?;
    let own: Vec<String> = own.iter().map(|path| format!("/{path}")).collect();
    // The preset is removed last: it says that the rest is still to be done.
    let end = format!(
        "[Unit]\nDescription=End the first boot of this machine\n\
         ConditionPathExists=/{PRESET}\nRequires={KEYS}\n\
         After={KEYS} first-boot-complete.target systemd-machine-id-commit.service\n\n\
         [Service]\nType=oneshot\nExecStart=/bin/rm -f {} /{PRESET}\n",
        own.join(" ")
    );
    write(root, &format!("{UNITS}/{END}"), &end)?;
    for (dir, unit) in [(EARLY, KEYS), (LATE, END)] {
        let link = units.join(dir).join(unit);
        fs::create_dir_all(units.join(dir))?;
        match fs::remove_file(&link) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => symlink(format!("/{UNITS}/{unit}"), link)?,
        }
    }
    Ok(())
}

fn write(root: &Path, path: &str, text: &str) -> io::Result<()> {
    let place = root.join(path);
    fs::create_dir_all(place.parent().unwrap_or(root))?;
    fs::write(place, text)
}

/// Lists templates with the names of services.
fn templates(root: &Path, services: &[String]) -> Vec<String> {
    let dirs = [UNITS, "usr/lib/systemd/system", "lib/systemd/system"];
    let is_there = |template: &String| dirs.iter().any(|dir| root.join(dir).join(template).exists());
    let stems = services.iter().filter_map(|service| service.strip_suffix(".service"));
    stems.map(|stem| format!("{stem}@.service")).filter(is_there).collect()
}

/// Lists the services in a directory of links, without those of vimg.
fn services(dir: &Path) -> Vec<String> {
    let names = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut names: Vec<String> = names
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.ends_with(".service") && !name.starts_with("vimg-"))
        .collect();
    names.sort();
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_come_before_all_services_and_nothing_stays() {
        let root = tempfile::tempdir().unwrap();
        let units = root.path().join(UNITS);
        fs::create_dir_all(units.join(LATE)).unwrap();
        write(root.path(), "lib/systemd/system/postgresql@.service", "").unwrap();
        for name in ["postgresql.service", "nginx.service", "vimg-hooks.service", "remote-fs.target"] {
            symlink("/x", units.join(LATE).join(name)).unwrap();
        }
        prepare(root.path(), &["/usr/bin/ssh-keygen -A"]).unwrap();
        // An image may be sealed again.
        prepare(root.path(), &["/usr/bin/ssh-keygen -A"]).unwrap();
        let keys = fs::read_to_string(units.join(KEYS)).unwrap();
        assert!(keys.contains(" shutdown.target nginx.service postgresql.service\n"), "{keys}");
        assert!(keys.contains("ExecStart=/usr/bin/ssh-keygen -A\n"), "{keys}");
        let end = fs::read_to_string(units.join(END)).unwrap();
        let removed = end.lines().find_map(|line| line.strip_prefix("ExecStart=/bin/rm -f ")).unwrap();
        assert!(removed.ends_with(PRESET) && removed.contains("postgresql@.service.d"), "{removed}");
        for path in removed.split(' ') {
            fs::remove_file(root.path().join(&path[1..])).unwrap_or_else(|e| panic!("{path}: {e}"));
        }
        assert_eq!(services(&units.join(LATE)), ["nginx.service", "postgresql.service"]);
        assert_eq!(fs::read_dir(units.join(EARLY)).unwrap().count(), 0);
    }
}

//! Files whose form matters: programs of the machine skip a file in silence because of its
//! name, mode, owner or last line. A build would not notice.

use crate::model::Owner;

/// A program that ignores a file, and what to do.
pub(super) struct Ignored {
    pub(super) message: String,
    pub(super) help: String,
}

/// A directory whose files a program reads.
struct Place {
    dir: &'static str,
    reader: &'static str,
    names: Names,
    /// What else it asks of a file.
    asks: &'static [Ask],
}

/// The names that a program takes.
enum Names {
    /// Those with one of these endings. An empty one stands for a name without a dot.
    Ends(&'static [&'static str]),
    /// Letters, digits, `-` and `_` (run-parts(8)).
    Plain,
    /// Those without a dot, and without a `~` at the end (sudoers(5)).
    NoDot,
    Any,
}

/// What a program asks of a file.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ask {
    /// The last line ends with a newline.
    Newline,
    /// It belongs to root, and only root may write to it.
    OnlyRoot,
    /// It can be executed.
    Executable,
    /// It can't be executed.
    Data,
}

/// The places of Debian. Sources: cron(8), run-parts(8), sudoers(5), sysctl.d(5), modprobe.d(5),
/// modules-load.d(5), tmpfiles.d(5), sysusers.d(5), systemd.network(5), systemd.unit(5),
/// udev(7), apt.conf(5), sources.list(5), apt_preferences(5), dpkg.cfg(5), logrotate(8),
/// ldconfig(8), and the files that Debian's packages include others from.
const PLACES: &[Place] = &[
    place("/etc/cron.d", "cron", Names::Plain, &[Ask::Newline, Ask::OnlyRoot]),
    place("/etc/cron.hourly", "cron", Names::Plain, &[Ask::Executable]),
    place("/etc/cron.daily", "cron", Names::Plain, &[Ask::Executable]),
    place("/etc/cron.weekly", "cron", Names::Plain, &[Ask::Executable]),
    place("/etc/cron.monthly", "cron", Names::Plain, &[Ask::Executable]),
    place("/etc/update-motd.d", "the message of the day", Names::Plain, &[Ask::Executable]),
    place("/var/spool/cron/crontabs", "cron", Names::Any, &[Ask::Newline]),
    place("/etc/sudoers.d", "sudo", Names::NoDot, &[Ask::OnlyRoot]),
    place("/etc/logrotate.d", "logrotate", Names::Any, &[Ask::OnlyRoot]),
    place("/etc/sysctl.d", "sysctl", Names::Ends(&[".conf"]), &[]),
    place("/etc/modprobe.d", "modprobe", Names::Ends(&[".conf"]), &[]),
    place("/etc/modules-load.d", "systemd-modules-load", Names::Ends(&[".conf"]), &[]),
    place("/etc/tmpfiles.d", "systemd-tmpfiles", Names::Ends(&[".conf"]), &[]),
    place("/etc/sysusers.d", "systemd-sysusers", Names::Ends(&[".conf"]), &[]),
    place("/etc/ld.so.conf.d", "ldconfig", Names::Ends(&[".conf"]), &[]),
    place("/etc/security/limits.d", "pam_limits", Names::Ends(&[".conf"]), &[]),
    place("/etc/ssh/sshd_config.d", "sshd", Names::Ends(&[".conf"]), &[]),
    place("/etc/ssh/ssh_config.d", "ssh", Names::Ends(&[".conf"]), &[]),
    place("/etc/rsyslog.d", "rsyslog", Names::Ends(&[".conf"]), &[]),
    place("/etc/profile.d", "the login shell", Names::Ends(&[".sh"]), &[]),
    place("/etc/udev/rules.d", "udev", Names::Ends(&[".rules"]), &[]),
    place("/etc/systemd/network", "systemd-networkd", Names::Ends(&[".network", ".netdev", ".link"]), &[]),
    place("/etc/netplan", "netplan", Names::Ends(&[".yaml"]), &[]),
    place("/etc/apt/sources.list.d", "apt", Names::Ends(&[".list", ".sources"]), &[]),
    place("/etc/apt/apt.conf.d", "apt", Names::Ends(&[".conf", ""]), &[]),
    place("/etc/apt/preferences.d", "apt", Names::Ends(&[".pref", ""]), &[]),
    place("/etc/apt/trusted.gpg.d", "apt", Names::Ends(&[".gpg", ".asc"]), &[]),
    place("/etc/dpkg/dpkg.cfg.d", "dpkg", Names::Plain, &[]),
    place(
        "/etc/systemd/system",
        "systemd",
        Names::Ends(&[
            ".service",
            ".socket",
            ".target",
            ".mount",
            ".automount",
            ".swap",
            ".timer",
            ".path",
            ".slice",
        ]),
        &[Ask::Data],
    ),
];

const fn place(dir: &'static str, reader: &'static str, names: Names, asks: &'static [Ask]) -> Place {
    Place { dir, reader, names, asks }
}

/// Whether the last line of the file at `path` matters.
pub(super) fn needs_newline(path: &str) -> bool {
    asks_of(path).contains(&Ask::Newline)
}

/// Lists what keeps a program from reading the file at `path`. `text` is its content and
/// `mode` its mode, if they are known.
pub(super) fn ignored(path: &str, text: Option<&[u8]>, mode: Option<u32>, owner: &Owner) -> Vec<Ignored> {
    let mut found = Vec::new();
    let place = find(path);
    if let Some((place, name)) = &place
        && let Some(help) = place.names.refuse(name)
    {
        found.push(Ignored { message: format!("{} ignores a file with this name", place.reader), help });
    }
    let reader = place.map_or("cron", |(place, _)| place.reader);
    for ask in asks_of(path) {
        let found_one = match ask {
            Ask::Newline if text.is_some_and(|text| !text.is_empty() && !text.ends_with(b"\n")) => Some((
                format!("{reader} ignores this file: its last line does not end with a newline"),
                "end the text with `\\n`, or with an empty line before the closing `\"\"\"`".to_owned(),
            )),
            Ask::OnlyRoot if owner.user != "root" => Some((
                format!("{reader} ignores this file: it belongs to `{}`", owner.user),
                "leave out `owner=`".to_owned(),
            )),
            Ask::OnlyRoot => mode.filter(|mode| mode & 0o022 != 0).map(|mode| {
                let message = format!("{reader} ignores this file: others may write to it (mode {mode:04o})");
                (message, "use `mode=\"0644\"`, or a stricter one".to_owned())
            }),
            Ask::Executable => mode.filter(|mode| mode & 0o111 == 0).map(|mode| {
                let message = format!("{reader} ignores this file: it is not executable (mode {mode:04o})");
                (message, "add `mode=\"0755\"`".to_owned())
            }),
            Ask::Data => mode.filter(|mode| mode & 0o111 != 0).map(|mode| {
                let message =
                    format!("{reader} complains at each boot: the file is executable (mode {mode:04o})");
                (message, "add `mode=\"0644\"`".to_owned())
            }),
            Ask::Newline => None,
        };
        found.extend(found_one.map(|(message, help)| Ignored { message, help }));
    }
    found
}

/// Returns the place of a path, and the name in it.
fn find(path: &str) -> Option<(&'static Place, &str)> {
    let (dir, name) = path.rsplit_once('/')?;
    PLACES.iter().find(|place| place.dir == dir).map(|place| (place, name))
}

fn asks_of(path: &str) -> &'static [Ask] {
    match path {
        "/etc/crontab" => &[Ask::Newline, Ask::OnlyRoot],
        "/etc/sudoers" => &[Ask::OnlyRoot],
        _ => find(path).map_or(&[], |(place, _)| place.asks),
    }
}

impl Names {
    /// Says which names are right, if `name` is not.
    fn refuse(&self, name: &str) -> Option<String> {
        match self {
            Self::Ends(ends) => {
                let fits = |end: &&&str| match **end {
                    "" => !name.contains('.'),
                    end => name.ends_with(end) && name.len() > end.len(),
                };
                let ends_quoted = ends.iter().filter(|end| !end.is_empty()).map(|end| format!("`{end}`"));
                let plain = if ends.contains(&"") { ", or have no dot" } else { "" };
                let all = ends_quoted.collect::<Vec<_>>().join(" or ");
                if ends.iter().find(fits).is_some() {
                    None
                } else {
                    Some(format!("the name must end with {all}{plain}"))
                }
            }
            Self::Plain => {
                let plain = name.chars().all(|c| c.is_ascii_alphanumeric() || "-_".contains(c));
                let help = "use only letters, digits, `-` and `_`: no dot";
                if plain { None } else { Some(help.to_owned()) }
            }
            Self::NoDot => {
                let wrong = name.contains('.') || name.ends_with('~');
                wrong.then(|| "use a name without a dot, and without a `~` at the end".to_owned())
            }
            Self::Any => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The messages about a file of root with a good last line.
    fn about(path: &str, mode: u32) -> Vec<String> {
        let owner = Owner { user: "root".into(), group: "root".into() };
        ignored(path, Some(b"x\n"), Some(mode), &owner).into_iter().map(|one| one.message).collect()
    }

    #[test]
    fn good_files_are_not_mentioned() {
        for (path, mode) in [
            ("/etc/cron.d/tick", 0o644),
            ("/etc/cron.daily/clean", 0o755),
            ("/etc/sudoers.d/90-ada", 0o440),
            ("/etc/sysctl.d/99-own.conf", 0o644),
            ("/etc/apt/apt.conf.d/20auto-upgrades", 0o644),
            ("/etc/apt/apt.conf.d/90proxy.conf", 0o644),
            ("/etc/systemd/system/a@b.service", 0o644),
            ("/etc/systemd/system/a.service.d/own.conf", 0o755),
            ("/etc/anything/else.at.all", 0o777),
        ] {
            assert!(about(path, mode).is_empty(), "{path}: {:?}", about(path, mode));
        }
    }

    #[test]
    fn what_programs_skip_is_said() {
        for (path, mode, message) in [
            ("/etc/cron.d/tick.sh", 0o644, "cron ignores a file with this name"),
            ("/etc/cron.d/tick", 0o664, "others may write to it (mode 0664)"),
            ("/etc/cron.daily/clean", 0o644, "not executable"),
            ("/etc/sudoers.d/john.doe", 0o440, "sudo ignores a file with this name"),
            ("/etc/sysctl.d/99-own", 0o644, "sysctl ignores a file with this name"),
            ("/etc/sysctl.d/.conf", 0o644, "sysctl ignores a file with this name"),
            ("/etc/apt/apt.conf.d/90.proxy", 0o644, "apt ignores a file with this name"),
            ("/etc/systemd/system/own", 0o644, "systemd ignores a file with this name"),
            ("/etc/systemd/system/own.service", 0o755, "complains at each boot"),
            ("/etc/crontab", 0o666, "others may write to it"),
        ] {
            let found = about(path, mode);
            assert!(found.len() == 1 && found[0].contains(message), "{path}: {found:?}");
        }
    }
}

//! systemd: its units, by `systemctl`.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use super::manager::{Init, Observed, State, Verb};
use super::units::{Units, template};
use super::{first_boot, show};
use crate::command::{self, Output};
use crate::failure::Failure;
use crate::offline;

/// Where systemd's first process is, with a separate `/lib` and without.
const PROGRAMS: [&str; 2] = ["/usr/lib/systemd/systemd", "/lib/systemd/systemd"];
/// This directory exists while systemd runs (sd_booted(3)).
const RUNNING: &str = "/run/systemd/system";
/// The socket at which systemd answers `systemctl`, and how long it may take to create it
/// once the agent's port is there.
const SOCKET: &str = "/run/systemd/private";
const SOCKET_WAIT: Duration = Duration::from_secs(120);

/// Prefixes of services that sealing does not stop: the agent needs them, or they have no
/// files to close.
const KEPT: &[&str] = &[
    "vimg-agent",
    "dbus",
    "systemd-",
    "user@",
    "getty@",
    "serial-getty@",
    "console-getty",
    "kmod-static-nodes",
];

/// How long systemd and services may take for a change.
const CHANGE: Duration = Duration::from_secs(600);

/// systemd.
pub(super) struct Systemd;

impl Init for Systemd {
    fn name(&self) -> &'static str {
        "systemd"
    }

    fn is_installed(&self) -> bool {
        self.is_up() || PROGRAMS.iter().any(|path| Path::new(path).exists())
    }

    fn is_up(&self) -> bool {
        Path::new(RUNNING).is_dir()
    }

    fn wait_until_up(&self, limit: u64) -> Vec<String> {
        // The agent may be faster than systemd, which then refuses to answer.
        let start = Instant::now();
        while !Path::new(SOCKET).exists() && start.elapsed() < SOCKET_WAIT {
            std::thread::sleep(Duration::from_millis(20));
        }
        let mut wait = systemctl();
        wait.args(["is-system-running", "--wait", "--quiet"]);
        let _ = command::query(&mut wait, Duration::from_secs(limit));
        let mut failed = systemctl();
        failed.args(["list-units", "--state=failed", "--plain", "--no-legend", "--full"]);
        let Ok((_, text)) = command::query(&mut failed, command::QUESTION) else { return Vec::new() };
        names(&text).take(20).map(str::to_owned).collect()
    }

    fn power_off(&self) -> Result<(), Failure> {
        let mut off = systemctl();
        off.args(["--no-block", "poweroff"]);
        match command::query(&mut off, command::QUESTION)? {
            (true, _) => Ok(()),
            (false, text) => Err(Failure::new(text.trim())),
        }
    }

    fn is_going_off(&self) -> bool {
        // At the end, another program takes the place of the first process.
        let first = fs::read_to_string("/proc/1/comm").unwrap_or_default();
        let mut state = systemctl();
        state.arg("is-system-running");
        first.starts_with("systemd-shut")
            || command::query(&mut state, command::QUESTION).is_ok_and(|(_, text)| text.trim() == "stopping")
    }

    fn unit(&self, name: &str, file: bool) -> Result<String, Failure> {
        let units = Units::new();
        if let Some(real) = units.real(name) {
            return Ok(real);
        }
        let made = Units::is_made_at_boot(name);
        // A unit that exists only in memory; a mask does not need a unit.
        let lives =
            !offline::is() && !["not-found", "masked"].contains(&property(name, "LoadState")?.as_str());
        if !file && (lives || offline::is() && made) {
            return Ok(name.to_owned());
        }
        let help = match units.similar(name).as_slice() {
            _ if lives || made => "; if systemd makes it at each boot, for instance from /etc/fstab, change \
                                   that, or use `masked=#true`"
                .to_owned(),
            [] => "; which package or file has it, and does that come before this step?".to_owned(),
            near => format!("; did you mean {}?", near.join(" or ")),
        };
        Err(Failure::new(format!("the machine has no unit {name}{help}")))
    }

    fn set_at_boot(&self, unit: &str, enabled: bool, output: &Output) -> Result<(), Failure> {
        let verb = if enabled { "enable" } else { "disable" };
        let mut change = of_files();
        change.args([verb, "--", unit]);
        command::run(&mut change, CHANGE, output).map_err(|failure| named(verb, unit, failure))?;
        if !offline::is() {
            self.reload(output)?;
        }
        let (starts, word) = self.at_boot(unit)?;
        let help = match (word.as_str(), Units::new().trigger(unit)) {
            _ if !enabled && starts => {
                "a unit of its package starts it, which can't be changed: to keep it from starting, use \
                 `masked=#true`"
                    .to_owned()
            }
            ("static", Some(trigger)) if enabled && !starts => {
                format!("it has no [Install] section; {trigger} starts it, so enable that")
            }
            ("static", None) if enabled && !starts => {
                "it has no [Install] section that says when it starts; add one by a drop-in file, such as \
                 `WantedBy=multi-user.target`"
                    .to_owned()
            }
            _ => return Ok(()),
        };
        Err(Failure::new(format!("systemctl {verb} {unit} has no effect: {help}")))
    }

    fn at_boot(&self, unit: &str) -> Result<(bool, String), Failure> {
        let mut question = of_files();
        question.args(["is-enabled", "--", unit]);
        let (_, text) = command::query(&mut question, command::QUESTION)?;
        let word = text.trim();
        let starts = word.starts_with("enabled") || word == "static" && Units::new().is_wanted(unit);
        Ok((starts, word.to_owned()))
    }

    fn mask(&self, unit: &str, wanted: bool) -> Result<(PathBuf, bool), Failure> {
        let (units, link) = (Units::new(), Units::new().mask(unit));
        match units.masked_by(unit) {
            Some(file) if !wanted && file != link => {
                Err(Failure::new(format!("{unit} is masked by {}, which is not below /etc", file.display())))
            }
            None if wanted && fs::symlink_metadata(&link).is_ok_and(|meta| meta.is_file()) => {
                let why = "that is the unit's own file; remove it, or use `enabled=#false`";
                Err(Failure::new(format!("{unit} can't be masked by {}: {why}", link.display())))
            }
            masked => Ok((link, masked.is_some())),
        }
    }

    fn control(&self, verb: Verb, unit: &str, output: &Output) -> Result<(), Failure> {
        let verb = match verb {
            Verb::Start => "start",
            Verb::Stop => "stop",
            Verb::Restart => "restart",
            Verb::TryRestart => "try-restart",
            Verb::TryReload => "try-reload-or-restart",
        };
        act(verb, unit, output).map_err(|mut failure| {
            let masked = property(unit, "LoadState").is_ok_and(|state| state == "masked");
            if masked && Units::new().masked_by(unit).is_none() {
                failure.message = format!(
                    "{unit} is masked by the kernel's command line: vimg does that while it builds with units \
                     that change the disk. `enabled=#true` alone starts it in the finished image"
                );
            }
            failure
        })
    }

    fn stop_all(&self, units: &[String], output: &Output) -> Result<(), Failure> {
        if units.is_empty() {
            return Ok(());
        }
        let mut stop = systemctl();
        stop.args(["stop", "--"]).args(units);
        command::run(&mut stop, CHANGE, output).map_err(|mut failure| {
            failure.message = format!("systemctl stop {}: {}", units.join(" "), failure.message);
            failure
        })
    }

    /// Reloads systemd first if the file of the unit has changed: otherwise the old
    /// version would be used until the next boot.
    fn runs(&self, unit: &str, output: &Output) -> Result<bool, Failure> {
        let mut show = systemctl();
        show.args(["show", "--property=NeedDaemonReload,ActiveState", "--", unit]);
        let (_, text) = command::query(&mut show, command::QUESTION)?;
        if text.lines().any(|line| line == "NeedDaemonReload=yes") {
            self.reload(output)?;
        }
        Ok(text.lines().any(|line| ["ActiveState=active", "ActiveState=reloading"].contains(&line)))
    }

    fn is_active(&self, unit: &str) -> Result<bool, Failure> {
        let mut question = systemctl();
        question.args(["--quiet", "is-active", "--", unit]);
        Ok(command::query(&mut question, command::QUESTION)?.0)
    }

    fn observe(&self, unit: &str) -> Result<Observed, String> {
        let mut show = systemctl();
        show.args(["show", "--property", show::PROPERTIES, "--", unit]);
        let (_, text) = command::query(&mut show, command::QUESTION).map_err(|f| f.message)?;
        // Held back by the kernel's command line of this boot: without it, the unit starts if
        // it is enabled.
        if text.lines().any(|line| line == "LoadState=masked")
            && Units::new().masked_by(unit).is_none()
            && self.at_boot(unit).is_ok_and(|(starts, _)| starts)
        {
            let words = "it starts when the machine boots by itself".to_owned();
            return Ok(Observed { state: State::Stands, restarts: 0, words });
        }
        show::observed(&text, show::now())
    }

    fn moment(&self) -> Duration {
        let mut show = systemctl();
        show.args(["show", "--value", "--property=FinishTimestampMonotonic"]);
        let text = command::query(&mut show, command::QUESTION).map_or(String::new(), |(_, text)| text);
        show::moment(&text)
    }

    fn print_log(&self, unit: &str, output: &Output) {
        let mut journal = command::command("journalctl");
        journal.args(["--no-pager", "--lines=20", "--output=cat", "--unit", unit]);
        let _ = command::run(&mut journal, Duration::from_secs(60), output);
    }

    fn file_of(&self, unit: &str) -> String {
        template(unit).unwrap_or_else(|| unit.to_owned())
    }

    fn reads(&self, path: &str) -> bool {
        path.contains("/systemd/")
    }

    fn reload(&self, output: &Output) -> Result<(), Failure> {
        command::run(systemctl().arg("daemon-reload"), CHANGE, output)
    }

    fn units_among(&self, files: &str) -> Vec<String> {
        let units = files
            .lines()
            .map(Path::new)
            .filter(|p| p.parent().is_some_and(|d| d.ends_with("systemd/system")));
        let names = units.filter_map(|path| path.file_name()?.to_str());
        let run =
            |name: &&str| [".service", ".socket", ".timer", ".path"].iter().any(|end| name.ends_with(end));
        names.filter(run).map(|name| name.replace("@.", "@*.")).collect()
    }

    fn stop_services(&self) {
        let mut list = systemctl();
        list.args([
            "list-units",
            "--type=service,socket,timer",
            "--state=active",
            "--plain",
            "--no-legend",
            "--full",
        ]);
        let Ok((_, text)) = command::query(&mut list, command::QUESTION) else { return };
        let stopped = |unit: &&str| !KEPT.iter().any(|kept| unit.starts_with(kept));
        let units: Vec<&str> = names(&text).filter(stopped).collect();
        if !units.is_empty() {
            let _ = command::query(systemctl().arg("stop").arg("--").args(units), CHANGE);
        }
    }

    fn prepare_first_boot(&self, commands: &[&str]) -> io::Result<()> {
        first_boot::prepare(Path::new("/"), commands)
    }
}

fn systemctl() -> Command {
    command::command("systemctl")
}

/// Lists the units of a table that `systemctl list-units` printed.
fn names(table: &str) -> impl Iterator<Item = &str> {
    table.lines().filter_map(|line| line.split_whitespace().next())
}

/// `systemctl` that looks at files only, and not at the systemd that runs: what the kernel's
/// command line masks for this boot is not masked in the image.
fn of_files() -> Command {
    let mut systemctl = systemctl();
    systemctl.env("SYSTEMD_OFFLINE", "1").env("SYSTEMD_UNIT_PATH", Units::search_path(of_packages()));
    systemctl
}

/// Returns the directory with the units of packages, by the name that systemd was compiled
/// with. Debian's changed from `/lib` to `/usr/lib`.
fn of_packages() -> &'static str {
    static DIR: OnceLock<String> = OnceLock::new();
    DIR.get_or_init(|| {
        let mut path = command::command("systemd-path");
        path.arg("systemd-system-unit");
        match command::query(&mut path, command::QUESTION) {
            Ok((true, dir)) if dir.starts_with('/') => dir.trim().to_owned(),
            _ => "/usr/lib/systemd/system".to_owned(),
        }
    })
}

/// Asks for a property of a unit.
fn property(unit: &str, name: &str) -> Result<String, Failure> {
    let mut show = systemctl();
    show.args(["show", "--value", "--property", name, "--", unit]);
    Ok(command::query(&mut show, command::QUESTION)?.1.trim().to_owned())
}

fn named(verb: &str, unit: &str, mut failure: Failure) -> Failure {
    failure.message = format!("systemctl {verb} {unit}: {}", failure.message);
    failure
}

fn act(verb: &str, unit: &str, output: &Output) -> Result<(), Failure> {
    let mut systemctl = systemctl();
    systemctl.args([verb, "--", unit]);
    command::run(&mut systemctl, CHANGE, output).map_err(|failure| {
        // systemctl refers to the journal.
        Systemd.print_log(unit, output);
        named(verb, unit, failure)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_found_among_the_files_of_packages() {
        let files = "/lib/systemd/system/nginx.service\n/usr/lib/systemd/system/getty@.service\n\
                     /etc/nginx/nginx.service\n/lib/systemd/system/a.target\n/usr/lib/systemd/system/b.timer\n";
        assert_eq!(Systemd.units_among(files), ["nginx.service", "getty@*.service", "b.timer"]);
        assert!(Systemd.reads("/etc/systemd/system/a.service") && !Systemd.reads("/etc/a.service"));
    }
}

//! systemd: its units, by `systemctl`.

use std::fs;
use std::io;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use super::first_boot;
use super::manager::{Init, Verb};
use crate::command::{self, Output};
use crate::failure::Failure;

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

    fn unit(&self, name: &str) -> String {
        if name.contains('.') { name.to_owned() } else { format!("{name}.service") }
    }

    fn set_at_boot(&self, unit: &str, enabled: bool, output: &Output) -> Result<(), Failure> {
        act(if enabled { "enable" } else { "disable" }, unit, output)
    }

    fn at_boot(&self, unit: &str) -> Result<(bool, String), Failure> {
        let mut question = systemctl();
        question.args(["is-enabled", "--", unit]);
        let (enabled, text) = command::query(&mut question, command::QUESTION)?;
        Ok((enabled, text.trim().to_owned()))
    }

    fn control(&self, verb: Verb, unit: &str, output: &Output) -> Result<(), Failure> {
        let verb = match verb {
            Verb::Start => "start",
            Verb::Stop => "stop",
            Verb::Restart => "restart",
            Verb::TryRestart => "try-restart",
            Verb::TryReload => "try-reload-or-restart",
        };
        act(verb, unit, output)
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

    fn ask(&self, unit: &str) -> Result<(), String> {
        let mut show = systemctl();
        show.args(["show", "--property=LoadState,ActiveState,SubState,Result", "--", unit]);
        let (_, text) = command::query(&mut show, command::QUESTION).map_err(|f| f.message)?;
        let property = |name: &str| {
            let line = text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix('='));
            line.unwrap_or("unknown").to_owned()
        };
        match (property("ActiveState").as_str(), property("LoadState").as_str()) {
            ("active" | "reloading", _) => Ok(()),
            (_, "not-found") => Err("there is no such service".into()),
            (state, _) => Err(format!("it is {state} ({}, {})", property("SubState"), property("Result"))),
        }
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

fn act(verb: &str, unit: &str, output: &Output) -> Result<(), Failure> {
    let mut systemctl = systemctl();
    systemctl.args([verb, "--", unit]);
    command::run(&mut systemctl, CHANGE, output).map_err(|mut failure| {
        // Print the journal, because systemctl refers to it.
        let mut journal = command::command("journalctl");
        journal.args(["--no-pager", "--lines=20", "--output=cat", "--unit", unit]);
        let _ = command::run(&mut journal, Duration::from_secs(60), output);
        failure.message = format!("systemctl {verb} {unit}: {}", failure.message);
        failure
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
        assert_eq!((Systemd.unit("a"), Systemd.unit("a.socket")), ("a.service".into(), "a.socket".into()));
        assert!(Systemd.reads("/etc/systemd/system/a.service") && !Systemd.reads("/etc/a.service"));
    }
}

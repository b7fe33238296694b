//! Servers: starts, changes while they run, kills, and returns.

use std::time::Duration;

use super::machines::{Project, serves};

const RECIPE: &str = r#"
use "std/debian.vimg"
image "plain" { from "debian-12"; layer "apart"; layer "life" }
configuration "life" {
    on "first-boot" { run { script "echo first >>/life" } }
    on "each-boot" { run { script "echo boot >>/life; sync /life" } }
    on "decommission" { run { script "echo may I; test -e /may-go" } }
    operation "greet" { run user="nobody" { script "read -r line; echo $(id -un): $line $1; exit 4" } }
}
configuration "apart" { file "/apart" content="1" }
capability "page" { input "port" type="int"; check "there" { run "! test -e /srv/broken" } }
configuration "small" provides="page" {
    input "port" type="int" default=80
    file "/srv/page" content="one"
    file "/usr/local/bin/page" template="page.j2" mode="0755"
    file "/etc/systemd/system/page.service" content="[Service]\nExecStart=/usr/local/bin/page\n[Install]\nWantedBy=multi-user.target\n"
    service "page" enabled=#true state="restarted"
    sysctl "vm.swappiness" value=7
}
configuration "other" provides="page" { input "port" type="int"; file "/other" content="{{ port }}" }
configuration "blocked" provides="page" { input "port" type="int"; file "/usr" content="x" }
configuration "dead" provides="page" {
    input "port" type="int"
    file "/etc/systemd/system/dead.service" content="[Service]\nType=oneshot\nExecStart=/bin/false\n"
    service "dead" state="running"
}
configuration "hollow" provides="page" { input "port" type="int"; file "/srv/broken" content="x" }
configuration "missing" provides="page" { input "port" type="int"; package "no-such-package" }
configuration "note" { requires "page"; run { script "echo {{ port }} >>/note"; undo "rm /note" } }
server "staging" { image "plain"; forward host=PORT guest=80; layer "small"; layer "note" }
server "second" { image "plain"; forward host=PORT guest=80 }
"#;

const PAGE: &str = r#"#!/usr/bin/perl
use IO::Socket::INET;
my $s = IO::Socket::INET->new(LocalPort => {{ port }}, Listen => 5, ReuseAddr => 1) or die;
while (my $c = $s->accept) {
    while (<$c>) { last if $_ eq "\r\n" }
    open(my $f, "<", "/srv/page");
    my $page = <$f>;
    print $c "HTTP/1.1 200 OK\r\n\r\n$page\n";
    close $c;
}
"#;

/// Ends the servers of a test, also if it fails.
struct Servers(Project);

impl Drop for Servers {
    fn drop(&mut self) {
        for name in ["staging", "second"] {
            let _ = self.0.sh(&format!("$VIMG down --force --remove {name}"));
        }
    }
}

#[test]
fn servers_are_changed_while_they_run_and_found_again() {
    let port = crate::port::free().port();
    let project = Project::new("server");
    project.write("main.vimg", &RECIPE.replace("PORT", &port.to_string()));
    project.write("page.j2", PAGE);
    project.give_away();
    let servers = Servers(project);
    let project = &servers.0;
    let says = |args: &[&str]| {
        let done = project.vimg(args);
        assert_eq!(done.code, 0, "{args:?}: {}{}", done.stdout, done.stderr);
        done.stdout
    };
    let page = || serves(port, Duration::from_secs(60));
    project.vimg(&["up", "staging"]).says("staging is up");
    assert!(page().contains("one"));
    assert_eq!(says(&["exec", "staging", "--", "cat", "/apart", "/note"]), "180\n");
    let life = || says(&["exec", "staging", "--", "cat", "/life"]);
    assert_eq!(life(), "first\nboot\n");
    let greeting = project.sh("echo hello | $VIMG exec staging --operation greet -- you");
    assert_eq!((greeting.stdout.as_str(), greeting.code), ("nobody: hello you\n", 4), "{}", greeting.stderr);
    let unknown = project.vimg(&["exec", "staging", "--operation", "greed"]);
    unknown.says("there is no operation `greed`; this machine has: greet");
    // It has its own links to its disks, independent of the store.
    let links = project.sh("stat -c %h \"$VIMG_STORE\"/servers/*/staging/base-*.qcow2");
    assert_eq!(links.stdout, "2\n2\n2\n", "{}", links.stderr);
    // It can't reach the host or the host's network.
    let near = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let to = near.local_addr().unwrap().port();
    for address in ["10.0.2.2", "198.51.100.1", "169.254.169.254", "10.0.0.1"] {
        let ask = format!("exec 3<>/dev/tcp/{address}/{to}");
        let asked = project.vimg(&["exec", "staging", "--", "timeout", "20", "bash", "-c", &ask]);
        assert_ne!(asked.code, 0, "{address}");
    }
    near.set_nonblocking(true).unwrap();
    assert!(near.accept().is_err());
    let swappiness = || says(&["exec", "staging", "--", "cat", "/proc/sys/vm/swappiness"]);
    assert_eq!(swappiness(), "7\n");
    assert!(says(&["ps"]).contains("staging  running  plain"));
    project.vimg(&["up", "staging"]).says("is already running");

    // Its forwarded ports change while it runs.
    let other = crate::port::free().port();
    let (now, then) = (format!("host={port} guest=80; layer"), format!("host={other} guest=80; layer"));
    project.edit("main.vimg", &now, &then);
    says(&["apply", "staging"]);
    assert!(serves(other, Duration::from_secs(60)).contains("one"));
    assert!(std::net::TcpStream::connect(("127.0.0.1", port)).is_err());
    project.edit("main.vimg", &then, &now);
    says(&["apply", "staging"]);
    assert!(page().contains("one"));

    // vimg applies only parts that differ, and parts that require them.
    assert_eq!(says(&["apply", "staging"]), "nothing to apply\n");
    project.edit("main.vimg", "content=\"one\"", "content=\"two\"");
    let difference = "revert note\nrevert small\napply  small\napply  note\n";
    assert_eq!(says(&["apply", "staging", "--dry-run"]), difference);
    assert!(page().contains("one"));
    assert_eq!(says(&["apply", "staging"]), difference);
    assert!(page().contains("two"));

    // A failure leaves the server as it was: in packages, files, services and
    // checks of the new provider, in a part that requires it, and in a revert.
    let replace =
        |with: &str| ("layer \"note\" }", format!("layer \"note\"; replace \"page\" with=\"{with}\" }}"));
    let faults = [
        (replace("missing"), "package no-such-package failed"),
        (replace("blocked"), "file /usr failed: /usr is a directory"),
        (replace("dead"), "systemctl start dead.service"),
        (replace("hollow"), "check there: run failed: exit code 1"),
        (("echo {{ port }} >>/note", "echo oh; exit 3".to_owned()), "run failed: exit code 3"),
    ];
    for ((from, to), words) in &faults {
        project.edit("main.vimg", from, to);
        let failed = project.vimg(&["apply", "staging"]);
        assert_eq!(failed.code, 1, "{words}: {}", failed.stdout);
        failed.says(words);
        failed.says("booted from its disk as it was before");
        assert!(page().contains("two"));
        assert_eq!(says(&["exec", "staging", "--", "cat", "/note"]), "80\n");
        project.edit("main.vimg", to, from);
        assert_eq!(says(&["apply", "staging"]), "nothing to apply\n");
    }
    // So does a change that is stopped.
    let (from, to) = ("echo {{ port }} >>/note", "echo half >>/note; echo is half done; sleep 1000");
    project.edit("main.vimg", from, to);
    let mut stopped = project.start(&["apply", "staging", "--format", "json"]);
    stopped.waits_until_said("is half done");
    stopped.signal(rustix::process::Signal::TERM);
    let stopped = stopped.finish();
    assert_eq!(stopped.code, 130, "{}", stopped.stderr);
    assert!(
        stopped.stdout.contains("stopped; the server has booted from its disk as it was before"),
        "{}{}",
        stopped.stdout,
        stopped.stderr
    );
    assert!(page().contains("two"));
    assert_eq!(says(&["exec", "staging", "--", "cat", "/note"]), "80\n");
    project.edit("main.vimg", to, from);
    // Another size of the machine is of the next boot. vimg names the ports that
    // the server has.
    let size = ("image \"plain\" { from", "image \"plain\" { machine cpus=1; from");
    project.edit("main.vimg", size.0, size.1);
    let resized = "size   cpus=1, 1.0 GiB of memory, after `vimg restart staging`\n";
    assert_eq!(says(&["apply", "staging", "--dry-run"]), resized);
    assert_eq!(says(&["apply", "staging"]), resized);
    assert_eq!(says(&["apply", "staging"]), "nothing to apply\n");
    project.edit("main.vimg", &now, &then);
    project.vimg(&["up", "staging"]).says(&format!("127.0.0.1:{port} -> 80; `vimg apply staging` forwards"));
    project.edit("main.vimg", &then, &now);
    says(&["exec", "staging", "--", "chattr", "+i", "/note"]);
    project.edit("main.vimg", "content=\"two\"", "content=\"three\"");
    let stuck = project.vimg(&["apply", "staging"]);
    assert_eq!(stuck.code, 1, "{}", stuck.stderr);
    stuck.says("revert note#2 failed");
    assert!(page().contains("two"));
    // An agent of an older vimg is in its image: this one is of no use at all.
    let older = "mv /usr/lib/vimg/agent /root/; printf '#!/bin/sh\nexit 7\n' >/usr/lib/vimg/agent; \
                 chmod 755 /usr/lib/vimg/agent";
    // Sync the disk, because the server is killed below.
    says(&["exec", "staging", "--", "sh", "-c", &format!("chattr -i /note; {older}; sync")]);
    project.edit("main.vimg", "content=\"three\"", "content=\"two\"");

    // A killed server is off, and boots from its own disk.
    let port_taken = project.vimg(&["up", "second"]);
    assert_eq!(port_taken.code, 4, "{}", port_taken.stderr);
    port_taken.says(&format!("can't listen on port {port} of 127.0.0.1"));
    let line = RECIPE.lines().position(|line| line.starts_with("server \"second\"")).unwrap() + 1;
    port_taken.says(&format!("main.vimg:{line}:34"));
    // The kernel removes its command line before it closes its sockets.
    project.sh("p=$(pgrep -f '[s]ervers/.*staging/disk'); kill -9 $p; \
         while [ -n \"$(ls /proc/$p/fd 2>/dev/null)\" ]; do sleep 0.1; done");
    let killed = std::time::Instant::now();
    while !says(&["ps"]).contains("staging  off") {
        assert!(killed.elapsed() < Duration::from_secs(20), "it still runs");
        std::thread::sleep(Duration::from_millis(100));
    }
    let off = project.vimg(&["exec", "staging", "--", "true"]);
    off.says("it is switched off");
    // It stands on its own links, whatever happens to the states of its image.
    // The base is not touched: other tests use it.
    let removed = project.sh("grep -l '\"name\": \"plain@' \"$VIMG_STORE\"/states/*/record.json | \
         xargs dirname | xargs rm -rv | grep -c disk.qcow2");
    assert_eq!(removed.stdout, "2\n", "{}", removed.stderr);
    project.vimg(&["up", "staging"]).says("staging is back");
    assert!(page().contains("two"));

    // A replace in the server; then its removal.
    project.edit("main.vimg", "layer \"note\" }", "layer \"note\"; replace \"page\" with=\"other\" }");
    assert_eq!(says(&["apply", "staging"]), "revert note#2\nrevert small#2\napply  other\napply  note#2\n");
    assert_eq!(says(&["exec", "staging", "--", "sh", "-c", "cat /other; ls /usr/local/bin"]), "80");
    // The agent of this vimg has done that, and finds the operations.
    let greeting = project.sh("echo hello | $VIMG exec staging --operation greet -- again");
    assert_eq!(
        (greeting.stdout.as_str(), greeting.code),
        ("nobody: hello again\n", 4),
        "{}",
        greeting.stderr
    );
    says(&["exec", "staging", "--", "mv", "/root/agent", "/usr/lib/vimg/agent"]);
    let unit = project.vimg(&["exec", "staging", "--", "systemctl", "is-active", "page"]);
    assert_eq!(unit.stdout, "inactive\n", "{}", unit.stderr);
    assert_eq!(swappiness(), "60\n");
    let saved = says(&["save", "staging", "saved.qcow2"]);
    assert!(saved.starts_with("saved.qcow2 is the disk of staging."), "{saved}");
    assert!(says(&["restart", "staging"]).contains("staging is back"));
    // It booted at the start, after each failure and the stop, after the kill, and
    // now.
    assert_eq!(life(), format!("first\n{}", "boot\n".repeat(1 + faults.len() + 1 + 1 + 1 + 1)));
    assert_eq!(says(&["exec", "staging", "--", "nproc"]), "1\n");
    assert_eq!(says(&["exec", "staging", "--", "cat", "/note"]), "80\n");
    assert!(says(&["logs", "staging"]).contains("login:"));
    let stays = project.vimg(&["down", "staging", "--remove"]);
    assert_eq!(stays.code, 1);
    stays.says("`decommission` of the layer `life` failed: exit code 1; last output: line 1: exit code 1: test -e /may-go");
    let off = project.vimg(&["down", "staging"]);
    assert_eq!(off.code, 0, "{}", off.stderr);
    project.vimg(&["down", "staging", "--remove"]).says("it is off, and has hooks to run before");
    project.vimg(&["up", "staging"]).says("staging is back");
    says(&["exec", "staging", "--", "touch", "/may-go"]);
    assert_eq!(says(&["down", "staging", "--remove"]), "staging is off, and its disk is gone\n");
    assert_eq!(says(&["ps"]), "no server was started here\n");
    // Its companion process ends with it.
    let gone = project.sh("keeps() { pgrep -u \"$(id -u)\" -f '^vimg keep$'; }; \
         for n in $(seq 100); do keeps >/dev/null || break; sleep 0.1; done; keeps");
    assert_eq!((gone.code, gone.stdout.as_str()), (1, ""));
    let disk = saved.lines().nth(1).unwrap();
    project.append("main.vimg", &format!("image \"golden\" {{ {disk} }}\n"));
    assert_eq!(says(&["run", "golden", "--", "cat", "/note", "/other"]), "80\n80");
    assert_eq!(project.vimg(&["apply", "staging"]).code, 2);
    assert_eq!(project.vimg(&["up", "stagin"]).code, 2);
}

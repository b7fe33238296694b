//! Replacing the provider of a capability: real packages, real disks, and the
//! residue.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::machines::{Boot, Project, Tested, get, serves, serves_at};

/// One step of each kind, over existing files and beside them.
const EVERYTHING: &str = r#"
use "std/debian.vimg"
capability "k"
image "prep" { from "debian-12"; layer "prep" }
image "with" { from "prep"; layer "all"; layer "apart" }
image "without" { from "with"; remove "k" }
image "never" { from "prep"; layer "apart" }
image "over" { from "with"; layer "over"; remove "k" }
image "made-again" { from "with"; layer "over"; remove "k" by="rebuild" }
configuration "prep" {
    run { script """
        echo old >/etc/motd
        chgrp mail /etc/motd
        chmod 2640 /etc/motd
        # setxattr(2): the machine has no program for it.
        perl -e 'my ($file, $name, $value) = @ARGV; syscall(188, $file, $name, $value, 4, 0) == 0 or die $!' /etc/motd user.note kept
        mkdir -p /srv/tree
        echo before >/srv/tree/a
        useradd --uid 1700 --create-home old
        install -d -m 700 -o old -g old /home/old/.ssh
        echo 'ssh-rsa AAAAold laptop' >/home/old/.ssh/authorized_keys
        chmod 600 /home/old/.ssh/authorized_keys
        chown old: /home/old/.ssh/authorized_keys
        systemctl mask systemd-pstore.service
        """ }
}
configuration "apart" { file "/apart" content="1" }
configuration "over" { directory "/srv/tree" from="other" }
configuration "all" provides="k" {
    file "/etc/motd" content="mine" mode="0600"
    file "/new/deep/file" content="x"
    directory "/srv/tree" from="tree"
    directory "/etc/cron.d" mode="0700"
    symlink "/etc/issue" target="/etc/motd"
    archive "/etc" from="etc.tar" owner="root"
    group "crew" gid=1600
    user "mate" uid=1601 groups="crew"
    user "old" shell="/bin/false" groups="crew"
    authorized-key "old" key="ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIA000000000000000000000000000000000000000001"
    authorized-key "mate" key="ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIA000000000000000000000000000000000000000002"
    service "dpkg-db-backup.timer" enabled=#false
    service "dpkg-db-backup.service" masked=#true
    service "systemd-pstore" enabled=#true
    service "getty@tty9" enabled=#true
    sysctl "vm.swappiness" value=7
    kernel-module "overlay"
    kernel-parameter "quirk=1"
    run { script "echo 1 >/did"; undo "rm /did" }
}
"#;

/// Backups that shadow makes of its files before it changes them.
const BACKUPS: [&str; 6] =
    ["/etc/group-", "/etc/gshadow-", "/etc/passwd-", "/etc/shadow-", "/etc/subgid-", "/etc/subuid-"];

fn everything(name: &str) -> Project {
    let project = Project::new(name);
    project.write("main.vimg", EVERYTHING);
    project.write("tree/a", "a\n");
    project.write("tree/sub/b", "b\n");
    project.write("other/sub/b", "c\n");
    project.write("etc/host.conf", "hosts\n");
    project.write("etc/opt/z", "z\n");
    let made = project.sh("tar -C etc -cf etc.tar . && rm -r etc");
    assert!(project.path("etc.tar").exists(), "{}", made.stderr);
    project.give_away();
    project
}

/// Returns the names of the things that differ.
fn names(diff: &Tested) -> Vec<&str> {
    assert_eq!(diff.code, 0, "{}", diff.stderr);
    diff.stdout.lines().filter_map(|line| line.split_whitespace().nth(2)).collect()
}

#[test]
fn every_primitive_is_taken_back() {
    let project = everything("taken-back");
    project.vimg(&["build", "--no-output", "prep", "with", "without", "never"]).succeeds();
    let with = project.vimg(&["diff", "prep", "with"]);
    for changed in [
        "+ file     /did",
        "+ file     /etc/opt/z",
        "+ file     /home/mate  directory",
        "~ file     /etc/cron.d  mode 0755 -> 0700",
        "~ file     /etc/host.conf  size 9 -> 6",
        "~ file     /etc/issue  kind file -> link to /etc/motd, size 27 -> 0, mode 0644 -> 0777",
        "~ file     /etc/motd  content, mode 2640 -> 0600, owner 0:8 -> 0:0, no attributes user.note",
        "- unit     dpkg-db-backup.timer  by timers.target",
        "+ file     /etc/systemd/system/dpkg-db-backup.service  link to /dev/null",
        "- file     /etc/systemd/system/systemd-pstore.service  link to /dev/null",
        "+ file     /home/mate/.ssh  directory",
    ] {
        assert!(with.stdout.lines().any(|line| line == changed), "no {changed:?} in\n{}", with.stdout);
    }
    assert_eq!(names(&project.vimg(&["diff", "never", "without"])), BACKUPS);
    assert_eq!(names(&project.vimg(&["diff", "--residue", "without"])), BACKUPS);
    assert_eq!(project.vimg(&["diff", "with", "with"]).stdout, "no difference\n");
    // If a layer that stays has changed a file again, vimg refuses to revert
    // it.
    let over = project.vimg(&["build", "--no-output", "over"]);
    assert_eq!(over.code, 1, "{}", over.stderr);
    over.says("/srv/tree/sub/b was changed again by the layer `over`");
    over.says("this layer changed it");
    over.says("by=\"rebuild\"");
    project.vimg(&["build", "--no-output", "made-again"]).succeeds();
    let json = project.vimg(&["diff", "never", "made-again", "--format=json"]);
    let json: serde_json::Value = serde_json::from_str(&json.stdout).unwrap();
    assert_eq!(json["files"][0]["name"], "/srv/tree/sub");
    assert_eq!(json["files"][0]["how"]["added"], "directory");

    // A replace that fails leaves the store as it was, whichever step failed.
    let faults = [
        ("undo", "the revert", "exit code 7"),
        ("blocked", "the new provider", "/etc is a directory"),
        ("again", "the layer above", "exit code 9"),
    ];
    project.append("main.vimg", FAULTS);
    project.vimg(&["build", "--no-output", "stand", "tied"]).succeeds();
    let before = project.vimg(&["list"]).stdout;
    let failed = project.vimg(&["build", "--no-output", "--keep-going", "undo", "blocked", "again"]);
    assert_eq!(failed.code, 1);
    for (image, _, words) in faults {
        failed.says(words);
        let plan = project.vimg(&["plan", image]).stdout;
        let makes = |line: &&str| line.starts_with("build");
        assert_eq!(plan.lines().filter(makes).count(), 1, "{plan}");
    }
    assert_eq!(project.vimg(&["list"]).stdout, before);
}

/// Faults of a replace: in the old provider, in the new one, and in a layer
/// that requires it.
const FAULTS: &str = r#"
image "stand" { from "prep"; layer "one"; layer "on" }
image "tied" { from "prep"; layer "stuck" }
image "undo" { from "tied"; replace "k" with="two" }
image "blocked" { from "stand"; replace "k" with="wrong" }
image "again" { from "stand"; replace "k" with="two" }
configuration "one" provides="k" { file "/one" content="1" }
configuration "two" provides="k" { file "/two" content="2" }
configuration "stuck" provides="k" { run { script "true"; undo "exit 7" } }
configuration "wrong" provides="k" { file "/ok" content=""; file "/etc" content="x" }
configuration "on" { requires "k"; run { script "test -e /one || exit 9"; undo "true" } }
"#;

/// Removes the example's server, also if the test fails.
struct Staging<'a>(&'a dyn Fn(&[&str]) -> Tested);

impl Drop for Staging<'_> {
    fn drop(&mut self) {
        let _ = (self.0)(&["down", "--force", "--remove", "staging"]);
    }
}

/// The example: a replace in an image, and the same replace in a running
/// server.
#[test]
fn the_replace_example_serves_all_the_while() {
    let project = Project::copy_of("replace-example", "examples/replace");
    let port = crate::port::free().port();
    project.edit("main.vimg", "host=8080", &format!("host={port}"));
    let root = project.as_root();
    let vimg = |args: &[&str]| match &root {
        Some(root) => root(args),
        None => project.vimg(args),
    };
    vimg(&["build", "web"]).succeeds();

    // vimg builds only the replace, from the existing state.
    let light = vimg(&["build"]);
    light.succeeds();
    let built = light.built();
    assert!(built.contains(&"light@lighttpd".to_owned()), "{built:?}");
    assert!(built.iter().all(|node| node.starts_with("light")), "{built:?}");
    let machine = Boot::start(&project.path("light.qcow2"), None);
    let page = serves(machine.port, Duration::from_secs(600));
    assert!(page.contains("Still here") && page.contains("Server: lighttpd"), "{page}");
    let since = serves_at(machine.port, "/since.txt", Duration::from_secs(120));
    assert!(since.trim_end().ends_with('Z'), "{since}");
    drop(machine);

    let done = |args: &[&str]| {
        let done = vimg(args);
        assert_eq!(done.code, 0, "{args:?}: {}{}", done.stdout, done.stderr);
        done.stdout
    };
    let _staging = Staging(&vimg);
    done(&["up", "staging"]);
    assert!(serves(port, Duration::from_secs(60)).contains("Server: nginx"));
    done(&["exec", "staging", "--operation", "announce", "--", "lighttpd", "comes"]);
    assert!(serves_at(port, "/news.txt", Duration::from_secs(60)).contains("lighttpd comes"));
    project.edit("main.vimg", "// replace", "replace");
    let over = AtomicBool::new(false);
    let seen = std::thread::scope(|scope| {
        let client = scope.spawn(|| {
            let mut seen: Vec<Option<String>> = Vec::new();
            while !over.load(Ordering::Relaxed) {
                let page = get(port, "/");
                let server =
                    |page: String| Some(page.lines().find_map(|l| l.strip_prefix("Server: "))?.to_owned());
                let server = page.and_then(server);
                if seen.last() != Some(&server) {
                    seen.push(server);
                }
                std::thread::sleep(Duration::from_millis(20));
            }
            seen
        });
        // Ends the client also if the test fails here. Otherwise it would run
        // for ever.
        let ends = Ends(&over);
        let applied = done(&["apply", "staging"]);
        drop(ends);
        assert_eq!(applied, "revert site\nrevert nginx\napply  lighttpd\napply  site#2\n");
        client.join().unwrap()
    });
    // The old server stops, for a moment there is none, and the new one starts.
    let mut servers: Vec<_> = seen.iter().flatten().map(|s| s.split('/').next().unwrap()).collect();
    servers.dedup();
    assert_eq!(servers, ["nginx", "lighttpd"], "{seen:?}");
    assert!(serves(port, Duration::from_secs(60)).contains("Still here"));
    // Packages were installed before anything was stopped, and removed after
    // everything had started.
    let order = done(&["exec", "staging", "--", "sh", "-ec", ORDER]);
    let times: Vec<u64> = order.split_whitespace().map(|t| t.parse().unwrap()).collect();
    assert!(times.len() == 4 && times.is_sorted(), "{order}");
    let gone = "! dpkg -s nginx-common && test ! -e /etc/nginx && test ! -e /usr/sbin/policy-rc.d";
    done(&["exec", "staging", "--", "sh", "-c", gone]);
}

/// Ends a client when it is dropped.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Prints when lighttpd was installed, nginx stopped, lighttpd first started,
/// and nginx removed, in seconds.
const ORDER: &str = r#"
log() { date --date "$(grep " $1" /var/log/dpkg.log | $2 -n 1 | cut -d ' ' -f 1,2)" +%s; }
journal() { journalctl --unit "$1" --output short-unix | grep "$2" | $3 -n 1 | cut -d . -f 1; }
log 'status installed lighttpd:' tail
journal nginx Stopped tail
journal lighttpd Started head
log 'remove nginx-light' tail
"#;

const SERVERS: &str = r#"
use "std/debian.vimg"
use "std/nginx.vimg"
use "std/lighttpd.vimg"
image "web" { from "debian-12"; layer "nginx" port=81; layer "site"; layer "apart" }
image "light" { from "web"; replace "http-server" with="lighttpd" }
image "back" { from "light"; replace "http-server" with="nginx" }
configuration "site" {
    requires "http-server"
    file "{{ root }}/index.html" content="port {{ port }}" mode="0640" group="www-data"
    check "greets" { http "http://localhost:{{ port }}/" status=200 contains="port 81" }
}
configuration "apart" { user "deploy" uid=1500 }
image "box" { from "debian-12"; layer "plain" }
image "swapped" { from "box"; layer "static" }
image "returned" { from "swapped"; remove "shell-tools" }
capability "shell-tools"
configuration "plain" { package "busybox" }
configuration "static" provides="shell-tools" { package "busybox-static" }
"#;

/// The residue after a web server was replaced by another and came back.
/// `docs/reference/ledger.md` says why.
#[test]
fn web_servers_take_each_others_place() {
    let project = Project::new("servers");
    project.write("main.vimg", SERVERS);
    let root = project.as_root();
    let vimg = |args: &[&str]| match &root {
        Some(root) => root(args),
        None => project.vimg(args),
    };
    vimg(&["build", "--no-output"]).succeeds();
    let logs = ["/var/log/apt/history.log", "/var/log/apt/term.log", "/var/log/dpkg.log"];
    let light = vimg(&["diff", "--residue", "light"]);
    let backups = ["/var/cache/debconf/config.dat-old", "/var/cache/debconf/templates.dat-old"];
    let page = ["/var/www/html/index.nginx-debian.html"];
    assert_eq!(names(&light), [&backups[..], &logs, &page].concat());
    let back = vimg(&["diff", "web", "back"]);
    assert_eq!(names(&back), [&logs[..], &["/var/www/html/index.lighttpd.html"]].concat());
    // A package that was removed because of a conflict returns.
    let swapped = vimg(&["diff", "box", "swapped"]);
    let packages = |line: &&str| line.contains(" package ");
    let changed: Vec<&str> = swapped.stdout.lines().filter(packages).collect();
    assert_eq!(changed.len(), 2, "{}", swapped.stdout);
    assert!(changed[0].starts_with("+ package  busybox-static:amd64"), "{changed:?}");
    assert!(changed[1].starts_with("- package  busybox:amd64"), "{changed:?}");
    // The initial RAM disk contains the program, so it is built again, with a
    // new time in it.
    let returned = vimg(&["diff", "box", "returned"]);
    let (initrds, others): (Vec<String>, Vec<String>) = names(&returned)
        .into_iter()
        .map(String::from)
        .partition(|name| name.starts_with("/boot/initrd.img-"));
    assert_eq!(initrds.len(), 1, "{}", returned.stdout);
    assert_eq!(others, [&["/var/log/apt/eipp.log.xz"][..], &logs].concat());
    // The new server works. The image has the checks of all its layers, and
    // none of the replaced one.
    let tested = vimg(&["test", "light"]);
    tested.succeeds();
    let mut checked = tested.built();
    checked.sort();
    assert_eq!(checked, ["light:check/lighttpd/answers", "light:check/site#2/greets"]);
}

//! A functionality is taken out of a machine and another put in its place:
//! real packages, real disks, and what is left behind.

use super::machines::{Project, Tested};

/// One of each, over things that are there and beside them.
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
        perl -e 'syscall(188, "/etc/motd", "user.note", "kept", 4, 0) == 0 or die "$!"'
        mkdir -p /srv/tree
        echo before >/srv/tree/a
        useradd --uid 1700 --create-home old
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
    service "dpkg-db-backup.timer" enabled=#false
    sysctl "vm.swappiness" value=7
    kernel-module "overlay"
    run { script "echo 1 >/did"; undo "rm /did" }
}
"#;

/// What shadow keeps of its files as they were before their last change.
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

/// The names of what differs.
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
    ] {
        assert!(with.stdout.lines().any(|line| line == changed), "no {changed:?} in\n{}", with.stdout);
    }
    assert_eq!(names(&project.vimg(&["diff", "never", "without"])), BACKUPS);
    assert_eq!(names(&project.vimg(&["diff", "--residue", "without"])), BACKUPS);
    assert_eq!(project.vimg(&["diff", "with", "with"]).stdout, "no difference\n");
    // A file that a layer changed again which stays is left to nobody's guess.
    let over = project.vimg(&["build", "--no-output", "over"]);
    assert_eq!(over.code, 1, "{}", over.stderr);
    over.says("/srv/tree/sub/b was changed again by the layer `over`");
    over.says("by=\"rebuild\"");
    project.vimg(&["build", "--no-output", "made-again"]).succeeds();
    let json = project.vimg(&["diff", "never", "made-again", "--format=json"]);
    let json: serde_json::Value = serde_json::from_str(&json.stdout).unwrap();
    assert_eq!(json["files"][0]["name"], "/srv/tree/sub");
    assert_eq!(json["files"][0]["how"]["added"], "directory");
}

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
"#;

/// What is left once a web server was replaced by another and came back, and
/// why: `docs/ledger.md`.
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
    // It serves, with what it took over: the checks of all that is in it, and
    // of nothing that was taken out.
    let tested = vimg(&["test", "light"]);
    tested.succeeds();
    let mut checked = tested.built();
    checked.sort();
    assert_eq!(checked, ["light:check/lighttpd/answers", "light:check/site#2/greets"]);
}

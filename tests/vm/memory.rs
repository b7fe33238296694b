//! Memory snapshots: checks and booted layers in forks.

use std::collections::BTreeSet;
use std::time::{SystemTime, UNIX_EPOCH};

use super::machines::{Project, damage, newest_record};

/// A service that answers HTTP without any package, and a service that never
/// stops writing to the console.
const SERVED: &str = r##"
configuration "served" {
    file "/etc/systemd/system/hello.socket" content="[Socket]\nListenStream=8000\nAccept=yes\n[Install]\nWantedBy=sockets.target\n"
    file "/etc/systemd/system/hello@.service" content="[Service]\nStandardInput=socket\nExecStart=/usr/local/bin/hello\n"
    file "/usr/local/bin/hello" mode="0755" content="#!/bin/sh\nread -r method path rest\nwhile read -r line && [ ${#line} -gt 1 ]; do :; done\ncase $path in /) status=200;; *) status=404;; esac\nprintf 'HTTP/1.0 %s X\r\nX-Test: yes\r\n\r\nhello %s' $status $path\n"
    service "hello.socket" enabled=#true
    file "/etc/systemd/system/dies.service" content="[Service]\nExecStart=/bin/sh -c 'sleep 4; exit 1'\n"
    file "/etc/systemd/system/done.service" content="[Service]\nType=oneshot\nExecStart=/bin/true\n[Install]\nWantedBy=multi-user.target\n"
    service "done" enabled=#true
}
configuration "flood" {
    needs "booted"
    input "words" type="string" default="once"
    file "/etc/systemd/system/flood.service" content="[Service]\nExecStart=/bin/sh -c 'while :; do echo flood of words >/dev/console; done'\n[Install]\nWantedBy=multi-user.target\n"
    service "flood" enabled=#true state="running"
    run { script "echo {{ words }} >/words; systemctl is-active flood" }
}
"##;

fn project(name: &str, image: &str) -> Project {
    let project = Project::new(name);
    project.write(
        "main.vimg",
        &format!("use \"std/debian.vimg\"\nimage \"it\" {{\n    from \"debian-12\"\n{image}\n}}\n{SERVED}"),
    );
    project
}

/// Types into the console of a machine, as soon as it asks for it, and leaves.
const CONSOLE: &str = r#"
said() {
  n=0; until grep -aq -- "$1" typescript; do n=$((n+1)); test $n -lt 1500 || exit 1; sleep 0.2; done
  sleep 1
}
: >typescript
{ said 'root@debian'; printf 'sleep 1000\r'; said 'sleep 1000'
  printf '\003'; said '\^C'; printf 'echo is $((6*7)) of $(id -u)\r'; said 'is 42 of'
  printf '\035'; } | timeout 400 script -qefc "$VIMG console it" typescript
"#;

#[test]
fn forks_of_one_machine_are_no_twins() {
    // Draws random numbers right after the fork, while output floods the
    // console.
    let ask = "head -c 16 /dev/urandom | od -An -tx1; cat /proc/sys/kernel/random/uuid; mktemp -u; \
               date +%s.%N; cat /words";
    // Two equal checks would be one.
    let checks: String =
        (0..10).map(|n| format!("    check \"n{n}\" {{ run \"{ask}; : {n}\" }}\n")).collect();
    let project = project("twins", &format!("    layer \"flood\"\n{checks}"));
    project.vimg(&["build", "debian-12"]).succeeds();
    let store = project.own_store();
    let vimg = |args: &[&str]| project.vimg_in(&store, args);
    let said = |n: u32| -> Vec<String> {
        let log = vimg(&["log", &format!("it:check/n{n}")]).stdout;
        log.lines().filter(|l| !l.starts_with("==")).map(str::to_owned).collect()
    };
    let built = vimg(&["test"]);
    built.succeeds();
    assert_eq!(built.boots(), 2, "one for the layer, and one for all checks");
    let mut drawn = BTreeSet::new();
    for n in 0..10 {
        let lines = said(n);
        assert_eq!(lines.len(), 5, "{lines:?}");
        let time: f64 = lines[3].parse().unwrap();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
        // A clock that continued from the snapshot would be the same in all
        // forks. A correct one is before now, and after the test began.
        assert!(time < now + 1.0 && time > now - 600.0, "{time} is not {now}");
        assert_eq!(lines[4], "once");
        drawn.extend(lines[..4].iter().cloned());
    }
    assert_eq!(drawn.len(), 40, "two forks drew the same: {drawn:?}");

    // The changed layer forks the same snapshot as the previous one. The checks
    // retarget the earlier snapshot, because its boot has not read the words.
    project.edit("main.vimg", "default=\"once\"", "default=\"again\"");
    let edited = vimg(&["test"]);
    edited.succeeds();
    assert_eq!((edited.boots(), edited.built().len()), (0, 11));
    let mut drawn = BTreeSet::new();
    for n in 0..10 {
        let lines = said(n);
        assert_eq!(lines[4], "again");
        drawn.extend(lines[..4].iter().cloned());
    }
    assert_eq!(drawn.len(), 40, "two forks drew the same: {drawn:?}");
    let again = vimg(&["test"]);
    assert_eq!((again.boots(), again.built().len()), (0, 0));
}

#[test]
fn checks_say_what_was_seen_and_hold_outputs_back() {
    let good = r#"
    check "good" {
        http "http://localhost:8000/" contains="hello /" header="x-test: yes"
        http "http://127.0.0.1:8000/x" status=404
        port 8000
        run "systemctl is-active hello.socket; test -d /run/systemd/system"
        file "/etc/passwd" contains="root:x:0"
        service "hello.socket"
        package "systemd"
    }
    check "open" { port 8000 }
    check "listens" { service "hello.socket" }
    check "both" { port 8000; service "hello.socket" }
    check "done" { service "done" }
    check "spoils" { run "rm /usr/local/bin/hello; systemctl stop hello.socket" }"#;
    let bad = r#"
    check "status" { http "http://localhost:8000/x" within="1s" }
    check "body" { http "http://localhost:8000/" contains="bye" within="1s" }
    check "header" { http "http://localhost:8000/" header="X-Test: no" within="1s" }
    check "closed" { http "http://localhost:81/" within="1s" }
    check "port" { port 81 within="1s" }
    check "script" { run "echo seen; exit 3" }
    check "slow" { run "sleep 60" timeout="1s" }
    check "file" { file "/nothing" }
    check "content" { file "/etc/hostname" contains="other" }
    check "service" { service "nothing" within="1s" }
    check "dies" { run "systemctl start dies"; service "dies" }
    check "package" { package "nginx" }"#;
    let project = project(
        "checks",
        &format!("    layer \"served\"\n{good}\n{bad}\n    output \"raw\" path=\"it.img\""),
    );
    let built = project.vimg(&["test", "--junit", "report.xml"]);
    assert_eq!(built.code, 1, "{}", built.stderr);
    for words in [
        "http http://localhost:8000/x: status 404, expected a 2xx status: hello /x",
        "http http://localhost:8000/: `bye` is not in the response: hello /",
        "`no` is not in the header X-Test: yes",
        "127.0.0.1 port 81: Connection refused",
        "run: exit code 3",
        "seen",
        "it did not end within 1 s",
        "file /nothing: No such file",
        "`other` is not in the file: debian",
        "service nothing: the machine has no such unit",
        "service dies: it was up and did not stay up: it is failed",
        "package nginx: it is not installed",
        "main.vimg:21:",
    ] {
        built.says(words);
    }
    let mut passed = built.built();
    passed.retain(|node| node.contains(":check/"));
    passed.sort();
    assert_eq!(
        passed,
        [
            "it:check/both",
            "it:check/done",
            "it:check/good",
            "it:check/listens",
            "it:check/open",
            "it:check/spoils"
        ],
        "none is in another's way"
    );
    // The check failed in a shared fork, and then ran again in its own.
    let again = built.stdout.lines().filter(|line| line.contains("ask again, alone")).count();
    assert_eq!(again, 1, "{}", built.stdout);
    assert_eq!(built.boots(), 1);
    let report = std::fs::read_to_string(project.path("report.xml")).unwrap();
    assert!(report.contains("tests=\"18\" failures=\"12\" skipped=\"0\""), "{report}");

    // vimg writes no output without its checks, and only failed checks run
    // again.
    assert_eq!(project.vimg(&["build", "--keep-going"]).code, 1);
    assert!(!project.path("it.img").exists() && !project.path(".it.img.vimg-new").exists());
    project.edit("main.vimg", bad, "");
    let built = project.vimg(&["build"]);
    built.succeeds();
    assert!(project.path("it.img").exists());
    assert_eq!(built.boots(), 0);
}

#[test]
fn a_machine_that_can_not_be_forked_boots_to_the_same_files() {
    let digest = |n: u32| {
        format!(
            "    check \"files{n}\" {{ run \"find /etc /usr/local /opt /words -xdev -type f ! -name 'resolv*' | sort | \
             xargs sha256sum | sha256sum; : {n}\" }}"
        )
    };
    let project = project("unforked", &format!("    layer \"flood\"\n{}", digest(0)));
    project.vimg(&["build", "debian-12"]).succeeds();
    let store = project.own_store();
    let vimg = |args: &[&str]| project.vimg_in(&store, args);
    let said = |n: u32| vimg(&["log", &format!("it:check/files{n}")]).stdout;
    vimg(&["test"]).succeeds();
    let first = said(0);
    assert!(first.contains("  -"), "{first}");
    // If a snapshot does not start, vimg says so in one line.
    damage(&store, "snapshots");
    project.edit("main.vimg", &digest(0), &digest(1));
    let damaged = vimg(&["test"]);
    damaged.succeeds();
    assert_eq!(damaged.boots(), 1);
    let notices = damaged.notices();
    assert_eq!(notices.iter().filter(|n| n.contains("the machine boots")).count(), 1, "{notices:?}");
    assert_eq!(said(1), first);
    project.edit("main.vimg", &digest(1), &format!("{}\n{}", digest(2), digest(3)));
    let none = vimg(&["test", "--no-memory"]);
    none.succeeds();
    assert_eq!(none.boots(), 2, "each is asked of a machine of its own");
    assert_eq!((said(2), said(3)), (first.clone(), first));
}

/// A service that reads a file at boot, and a unit that watches a file.
const READS: &str = r##"
configuration "reads" {
    file "/srv/page" content="page one\n"
    file "/srv/read" content="read one\n"
    file "/srv/watched/file" content="watched one\n"
    file "/etc/systemd/system/reads.service" content="[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/bin/sh -c 'cat /srv/read >/run/was-read'\n[Install]\nWantedBy=multi-user.target\n"
    file "/etc/systemd/system/seen.service" content="[Service]\nExecStart=/bin/touch /run/seen\n"
    file "/etc/systemd/system/seen.path" content="[Path]\nPathModified=/srv/watched\n[Install]\nWantedBy=multi-user.target\n"
    service "reads" enabled=#true
    service "seen.path" enabled=#true
    check "tells" { run "cat /srv/page /srv/watched/file /run/was-read; ls -R /srv; ls /run/seen || true; stat -c '%n %s %a' /srv/*; stat -c %Y /srv/page; find /etc /srv -xdev -type f ! -name 'resolv*' ! -name machine-id | sort | xargs sha256sum | sha256sum" }
}
"##;

#[test]
fn a_kept_machine_is_given_only_what_no_boot_depends_on() {
    let project = Project::new("carried");
    project.write(
        "main.vimg",
        &format!("use \"std/debian.vimg\"\nimage \"it\" {{\n    from \"debian-12\"\n    layer \"reads\"\n}}\n{READS}"),
    );
    project.vimg(&["build", "debian-12"]).succeeds();
    let store = project.own_store();
    let vimg = |args: &[&str]| project.vimg_in(&store, args);
    let said = || vimg(&["log", "it:check/reads/tells"]).stdout;
    let has = |words: &[&str]| {
        let said = said();
        for words in words {
            assert!(said.contains(words), "{words} is not in {said}");
        }
    };
    let tested = |boots: u64, why: &str| {
        let tested = vimg(&["test"]);
        tested.succeeds();
        assert_eq!(tested.boots(), boots, "{}", tested.stdout);
        assert!(tested.stdout.contains(why), "nothing says {why}: {}", tested.stdout);
    };
    tested(1, "");
    has(&["page one\n", "watched one\n", "read one\n", "cannot access '/run/seen'"]);

    // A file that the boot has not read is written into a fork of the earlier
    // snapshot. The fork is then like a booted machine.
    project.edit("main.vimg", "page one", "page number two");
    let ran = vimg(&["run", "it", "--verbose", "--", "cat", "/srv/page"]);
    assert_eq!(ran.stdout, "page number two\n");
    assert!(
        ran.stderr.contains("it@reads: start") && !ran.stderr.contains("it@reads: boot"),
        "{}",
        ran.stderr
    );
    tested(0, "");
    has(&["page number two\n", "watched one\n", "read one\n"]);
    let carried = said();

    // While the layer is built, vimg prewarms a fork for its checks.
    project.edit("main.vimg", "page number two", "page number three");
    let ahead = vimg(&["test"]);
    ahead.succeeds();
    assert_eq!((ahead.boots(), ahead.built().len()), (0, 2), "{}", ahead.stdout);
    let starts = ahead.stdout.lines().filter(|l| l.contains(r#""phase":"start""#) && l.contains(":check/"));
    assert_eq!(starts.count(), 0, "{}", ahead.stdout);
    has(&["page number three\n", "watched one\n", "read one\n"]);
    project.edit("main.vimg", "page number three", "page number two");
    tested(0, "");
    project.edit("main.vimg", "sha256sum | sha256sum", "sha256sum |  sha256sum");
    let booted = vimg(&["test", "--no-memory"]);
    booted.succeeds();
    assert_eq!(booted.boots(), 1);
    let lines =
        |text: &str| text.lines().filter(|l| !l.starts_with("==")).map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(lines(&said()), lines(&carried), "a boot tells the same");

    // A file that the boot has read needs a boot.
    project.edit("main.vimg", "read one", "read two");
    tested(1, "the machine boots: /srv/read was opened during the boot");
    has(&["page number two\n", "read two\n"]);

    // A program that watches the file would notice.
    project.edit("main.vimg", "watched one", "watched two");
    tested(1, "the machine boots: a program watches /srv/watched/file");
    has(&["watched two\n", "cannot access '/run/seen'"]);

    // Programs may have looked at names without a trace.
    let page = "file \"/srv/page\"";
    project.edit("main.vimg", page, &format!("file \"/srv/more\" content=\"\"\n    {page}"));
    tested(1, "the machine boots: /srv/more is new");
}

const RAN: &str = r##"configuration "ran" {
    needs "booted"
    run {
        // one
        script "cat /srv/page >/srv/ran; test -e /run/was-read"
    }
}
"##;

#[test]
fn a_booted_layer_is_made_in_a_machine_that_was_carried_over() {
    let project = Project::new("carried-layer");
    let image = "image \"it\" {\n    from \"debian-12\"\n    layer \"reads\"\n    layer \"ran\"\n}\n";
    project.write("main.vimg", &format!("use \"std/debian.vimg\"\n{image}{READS}{RAN}"));
    project.vimg(&["build", "debian-12"]).succeeds();
    let store = project.own_store();
    let tested = |args: &[&str], boots: u64| {
        let tested = project.vimg_in(&store, &[&["test"], args].concat());
        tested.succeeds();
        assert_eq!(tested.boots(), boots, "{}", tested.stdout);
        project.vimg_in(&store, &["log", "it:check/reads/tells"]).stdout
    };
    // One boot for the layer, one for its result.
    tested(&[], 2);
    project.edit("main.vimg", "page one", "page number two");
    let carried = tested(&[], 0);
    assert!(carried.contains("page number two\n"), "{carried}");
    let below = || newest_record(&store, "it@ran")["disk"]["backing"][0].clone();
    let reads = newest_record(&store, "it@reads")["key"].clone();
    assert_ne!(below(), reads, "the disk below is the one that its machine booted from");
    // The same without snapshots: a boot of the disk below the layer, and a
    // boot of its result. Only the times differ.
    project.edit("main.vimg", "cat /srv/page >", "cat /srv/page  >");
    let booted = tested(&["--no-memory"], 2);
    assert_eq!(below(), reads);
    let lines = |text: &str| -> Vec<String> {
        let told = text.lines().filter(|l| !l.starts_with("==") && l.parse::<u64>().is_err());
        told.map(str::to_owned).collect()
    };
    assert_eq!(lines(&booted), lines(&carried));
    // The disk of a layer that fails in such a machine is kept with the disks
    // below it.
    project.edit("main.vimg", "page number two", "page number three");
    project.edit("main.vimg", "test -e /run/was-read", "echo broken >>/srv/ran; exit 3");
    let failed = project.vimg_in(&store, &["build", "--no-output"]);
    assert_eq!((failed.code, failed.boots()), (1, 0), "{}", failed.stdout);
    let script = "cat /srv/ran /srv/page";
    let enter = format!("echo '{script}' | VIMG_STORE={} $VIMG shell --failed it", store.display());
    let seen = project.sh(&enter);
    assert_eq!(seen.stdout, "page number three\nbroken\npage number three\n", "{}", seen.stderr);

    // A modification time that a layer has set on a file that the boot has read
    // matters: the layer would contain another time.
    project.edit("main.vimg", "echo broken >>/srv/ran; exit 3", "true");
    let service = "service \"reads\" enabled=#true";
    let chosen = "run { script \"touch -d 2020-01-01 /srv/read\" }";
    project.edit("main.vimg", service, &format!("{service}\n    {chosen}"));
    let booted = project.vimg_in(&store, &["build", "--no-output"]);
    booted.succeeds();
    assert_eq!(booted.boots(), 1, "{}", booted.stdout);
    let why = "was opened during the boot, and its modification time differs";
    assert!(booted.stdout.contains(why), "{}", booted.stdout);
}

#[test]
fn people_get_into_forks() {
    let project = project("people", "    layer \"served\"\n");
    let run = |layer: &str, script: &str| project.vimg(&["run", layer, "--", "sh", "-c", script]);
    let first = run("it", "echo out; echo err >&2; echo spoilt >/etc/hostname; exit 7");
    assert_eq!((first.code, first.stdout.as_str()), (7, "out\n"), "{}", first.stderr);
    assert!(first.stderr.ends_with("err\n"), "{}", first.stderr);
    let second = run("it", "cat /etc/hostname; kill -9 $$");
    assert_eq!((second.code, second.stdout.as_str()), (137, "debian\n"), "{}", second.stderr);
    let large = run("it@served", "head -c 3000000 /dev/zero | tr '\\0' x");
    assert_eq!(large.stdout.len(), 3_000_000);
    // Programs have fixed addresses only in emulated machines, where that saves
    // translation. The kernel's setting is the image's, and the clock needs no
    // device.
    let clock = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
    let seen = run(
        "it",
        &format!(
            "grep -c vimg.fixed /proc/cmdline; cat /proc/self/personality /proc/sys/kernel/randomize_va_space {clock}"
        ),
    );
    let seen: Vec<&str> = seen.stdout.lines().collect();
    let personality = if seen[0] == "1" { "00040000" } else { "00000000" };
    assert_eq!(seen[1..3], [personality, "2"], "{seen:?}");
    assert!(["tsc", "kvm-clock"].contains(&seen[3]), "{seen:?}");
    let nothing = project.vimg(&["run", "it", "--", "nothing"]);
    assert_eq!(nothing.code, 127);
    nothing.says("nothing: No such file");
    let other = project.vimg(&["shell", "itt"]);
    assert_eq!(other.code, 2);
    other.says("did you mean `it`?");

    // Input, a terminal with the right size, and Ctrl-D.
    let typed = "stty size; tty; test -t 2 && echo $TERM is all; exit 5\\n";
    let seen = project.sh(&format!(
        "printf '{typed}' | TERM=vt220 script -qec 'stty rows 33 cols 101; exec $VIMG shell it' /dev/null"
    ));
    assert_eq!(seen.code, 5, "{}{}", seen.stdout, seen.stderr);
    for words in ["33 101\r\n", "/dev/pts/0\r\n", "vt220 is all\r\n"] {
        assert!(seen.stdout.contains(words), "{}", seen.stdout);
    }
    // The console from the boot to root's shell, which gets all keys: Ctrl-C, too.
    let seen = project.sh(CONSOLE);
    assert_eq!(seen.code, 0, "{}{}", seen.stdout, seen.stderr);
    for words in ["Linux version 6.1", "Reached target", "(automatic login)", "^C", "is 42 of 0\r\n"] {
        assert!(seen.stdout.contains(words), "{words}: {}", seen.stdout);
    }
    assert_eq!(project.vimg(&["run", "it:check/x", "--", "true"]).code, 2);

    // The machine of a failed layer, with the changes that it had made.
    let broken = "    layer \"broken\"\n}\nconfiguration \"broken\" {\n    run { script \"echo half >/half; exit 3\" }\n}\n";
    project.edit("main.vimg", "    layer \"served\"\n\n}", &format!("    layer \"served\"\n{broken}"));
    assert_eq!(project.vimg(&["shell", "--failed", "it"]).code, 1, "nothing has failed yet");
    assert_eq!(project.vimg(&["build"]).code, 1);
    let entered = project.sh("echo 'cat /half; exit 4' | $VIMG shell --failed it");
    assert_eq!((entered.code, entered.stdout.as_str()), (4, "half\n"), "{}", entered.stderr);
    entered.says("it@broken: run failed: exit code 3");
    project.edit("main.vimg", "exit 3", "true");
    project.vimg(&["build"]).succeeds();
    let repaired = project.vimg(&["shell", "--failed", "it"]);
    assert_eq!(repaired.code, 1);
    repaired.says("there is no disk of a failed layer of it@broken");
    project.nothing_runs();
}

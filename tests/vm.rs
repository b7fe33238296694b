//! Real machines: bootstraps, boots, layers, faults, and disks that boot by
//! themselves. One base serves most of the tests, in a store that is new in
//! each run; each test has its own project.
//!
//! vimg does not run as root here. If the tests do, they run the program as the
//! user `vimg-test`, which `.ci/run` creates.

#![expect(clippy::unwrap_used, reason = "a test that can't go on fails")]

#[path = "vm/adding.rs"]
mod adding;
#[path = "vm/field.rs"]
mod field;
mod machines;
#[path = "vm/memory.rs"]
mod memory;
#[path = "vm/offline.rs"]
mod offline;
#[path = "common/port.rs"]
mod port;
#[path = "vm/replace.rs"]
mod replace;
#[path = "vm/runners.rs"]
mod runners;
#[path = "vm/same.rs"]
mod same;
#[path = "vm/secrets.rs"]
mod secrets;
#[path = "vm/server.rs"]
mod server;
#[path = "vm/strangers.rs"]
mod strangers;
#[path = "vm/tutorial.rs"]
mod tutorial;

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use machines::{Boot, Project, Tested, all_fail, newest_record, ovmf, serves, serves_at, with_layer};

/// A layer below the web server. When the written disk has booted, it serves what
/// people look for on a disk of their distribution.
const SHIPPED: &str = r#"
configuration "shipped" {
    package "ssl-cert"
    file "/etc/ssh/ssh_host_ed25519_key" content="declared\n" mode="0600"
    file "/var/lib/cloud/seed/nocloud/user-data" content="declared\n"
    file "/var/log/app/README" content="declared\n"
    file "/etc/systemd/system/once.service" content="[Unit]\nConditionFirstBoot=yes\n[Service]\nExecStart=/bin/true\nRemainAfterExit=yes\n[Install]\nWantedBy=multi-user.target\n"
    file "/etc/systemd/system/off.service" content="[Service]\nExecStart=/bin/true\nRemainAfterExit=yes\n[Install]\nWantedBy=multi-user.target\n"
    file "/etc/systemd/system/instances.service" content="[Unit]\nWants=instances@7.service\n[Service]\nExecStart=/bin/true\n[Install]\nWantedBy=multi-user.target\n"
    file "/etc/systemd/system/instances@.service" content="[Service]\nExecStart=/bin/true\nRemainAfterExit=yes\n"
    file "/etc/systemd/system/report.service" content="[Unit]\nAfter=network-online.target once.service\nWants=network-online.target\n[Service]\nType=oneshot\nExecStart=/bin/sh /srv/report.sh\n[Install]\nWantedBy=multi-user.target\n"
    file "/srv/report.sh" from="report.sh"
    service "once" enabled=#true
    service "instances" enabled=#true
    service "report" enabled=#true
}
"#;
const REPORT: &str = r#"
exec >/srv/report.txt 2>&1
ask() { echo "$1: $(shift; "$@" | tr '\n' ' ')"; }
ask timers systemctl is-enabled apt-daily.timer apt-daily-upgrade.timer fstrim.timer e2scrub_all.timer
ask network systemctl is-enabled systemd-networkd-wait-online
ask route sh -c "ip -4 route show default | grep -c ."
ask clock systemctl is-active systemd-timesyncd
ask declared cat /etc/ssh/ssh_host_ed25519_key /var/lib/cloud/seed/nocloud/user-data /var/log/app/README
ask keys sh -c "ls /etc/ssl/private/ssl-cert-snakeoil.key"
ask first systemctl is-active once
ask off systemctl is-enabled off
ask order sh -c "systemctl show -p After nginx instances@7 | grep -c vimg-first-boot.service"
ask size sh -c "df --output=size --block-size=1G / | tail -n 1 | tr -d ' '"
mkdir -p /srv/www && mv /srv/report.txt /srv/www/report.txt
"#;
/// The right values, and why.
const RIGHT: [&str; 10] = [
    // As on any Debian (F2).
    "timers: enabled enabled enabled enabled ",
    // A unit after network-online.target has an address (F5).
    "network: enabled ",
    "route: 1 ",
    "clock: active ",
    // What the recipe declares is there, also where sealing looks (F8).
    "declared: declared declared declared ",
    "keys: /etc/ssl/private/ssl-cert-snakeoil.key ",
    // It was a first boot, and nothing was enabled by that.
    "first: active ",
    "off: disabled ",
    // Instances of templates wait for keys, too (F18).
    "order: 2 ",
    // The root filesystem grew to the disk (F11).
    "size: 10 ",
];

#[test]
fn the_web_example_is_built_served_and_rebuilt_only_where_it_changed() {
    let project = Project::copy_of("web", "examples/web");
    project.edit("main.vimg", "layer \"nginx\"", "layer \"shipped\"\n    layer \"nginx\"");
    project.edit("main.vimg", "path=\"web.qcow2\"", "path=\"web.qcow2\" size=\"10GiB\"");
    project.edit("main.vimg", "// The pages:", &format!("{SHIPPED}\n// The pages:"));
    project.write("report.sh", REPORT);
    let states = project.vimg(&["build", "--no-output"]);
    states.succeeds();
    assert_eq!(states.boots(), 0, "no layer needs a booted machine");
    // Checks run in the machine of the image: it boots once, and they fork it.
    let first = project.vimg(&["build"]);
    first.succeeds();
    assert!(first.boots() <= 1, "{}", first.stdout);

    let second = project.vimg(&["build"]);
    second.succeeds();
    assert_eq!((second.boots(), second.built()), (0, vec![]), "a second build does nothing");

    // Files of a built image are read without a machine, and commands run without
    // a boot.
    let page = project.vimg(&["cp", "web:/etc/nginx/sites-enabled/default", "-"]);
    assert!(page.code == 0 && page.stdout.contains("listen"), "{}{}", page.stdout, page.stderr);
    let read = project.vimg(&["run", "--no-boot", "web", "--", "cat", "/etc/nginx/sites-enabled/default"]);
    assert!(read.stdout.contains(&page.stdout), "{}{}", read.stdout, read.stderr);
    assert_eq!(read.code, 0, "{}", read.stderr);
    let all =
        project.sh("$VIMG cp web@nginx:/usr/share copied && du -s copied && find copied -type l | wc -l");
    assert_eq!(all.code, 0, "{}", all.stderr);
    let write = ["run", "--no-boot", "web", "--", "sh", "-c", "rm /etc/hostname; exit 7"];
    assert_eq!(project.vimg(&write).code, 7);
    assert_eq!(project.vimg(&["cp", "web:/etc/hostname", "-"]).code, 0);

    // The disk boots by itself and serves, from BIOS and from UEFI.
    let disk = project.path("web.qcow2");
    for firmware in [None, Some(ovmf())] {
        let machine = Boot::start(&disk, firmware.as_deref());
        let page = serves(machine.port, Duration::from_secs(600));
        assert!(page.contains("<h1>It works</h1>"), "{page}");
        assert!(page.contains("/posts/layers.html"), "{page}");
        let report = serves_at(machine.port, "/report.txt", Duration::from_secs(600));
        for right in RIGHT {
            assert!(report.lines().any(|line| line == right), "{right:?} is not in {report}");
        }
        // The kernel's parameters come from files of `update-grub`.
        assert!(machine.serial().contains("net.ifnames=0"), "{}", machine.serial());
    }

    // A container gives the same files, also sealed ones. `replace.rs` tests
    // that its disk boots.
    let apart = project.path("made-in-a-container");
    let build = ["build", "--output", apart.to_str().unwrap()];
    offline::a_container_makes_the_same(&project, &build, &["web:seal"]);

    // A comment changes nothing. A file of the site changes its layer and all
    // above.
    project.edit("main.vimg", "// The pages:", "//   These are the pages:");
    let comment = project.vimg(&["build"]);
    assert_eq!((comment.boots(), comment.built()), (0, vec![]));
    project.edit("site/404.html", "Not here", "Nothing here");
    let plan = project.vimg(&["plan"]);
    let why = plan.stdout.lines().find(|line| line.contains("web@site")).unwrap_or_default();
    assert!(why.starts_with("build") && why.ends_with("file site/404.html changed"), "{}", plan.stdout);
    let edited = project.vimg(&["build"]);
    edited.succeeds();
    let sorted = |tested: &Tested| {
        let mut built = tested.built();
        built.sort();
        built
    };
    assert_eq!(
        sorted(&edited),
        [
            "web:check/nginx/answers",
            "web:check/site/greets",
            "web:qcow2-10240MiB",
            "web:seal",
            "web@site",
            "web@tuning"
        ]
    );
    let said = format!("{}{}", edited.stdout, edited.stderr);
    assert_eq!(edited.boots(), 0, "no program reads the page before the check: {said}");

    // A script that fails stops the build at its layer. After its repair, the
    // build continues there.
    project.edit("tune.sh", "nginx -t", "echo on the way; nginx -t; exit 7");
    let broken = project.vimg(&["build"]);
    assert_eq!(broken.code, 1);
    broken.says("run tune.sh failed: exit code 7");
    broken.says("on the way");
    broken.says("main.vimg:");
    broken.says("vimg log web@tuning");
    let log = project.vimg(&["log", "web@tuning"]);
    assert!(log.stdout.contains("on the way"), "{}", log.stdout);
    project.edit("tune.sh", "; exit 7", "");
    let repaired = project.vimg(&["build", "--no-output"]);
    repaired.succeeds();
    assert_eq!(sorted(&repaired), ["web@tuning"]);
}

#[test]
fn a_fleet_shares_what_is_the_same() {
    let project = Project::copy_of("fleet", "examples/fleet");
    let images = ["common", "bastion", "static", "web", "web-canary"];
    let build = [&["build", "--no-output"], &images[..]].concat();
    let built = project.vimg(&build);
    built.succeeds();
    // Five images of two shared layers and seven layers of their own. One instance
    // builds the shared layers and continues with one branch; the others start
    // from there.
    let mut nodes = built.built();
    nodes.retain(|node| node != "debian-12:base");
    nodes.sort();
    assert_eq!(
        nodes,
        [
            "bastion@motd",
            "common@openssh",
            "common@operators",
            "static@lighttpd",
            "static@site",
            "web-canary@motd",
            "web@nginx",
            "web@site",
        ]
    );
    assert_eq!(built.boots(), 0, "{:?}", built.notices());
    offline::a_container_makes_the_same(
        &project,
        &build,
        &["common@operators", "bastion@motd", "static@site", "web@site", "web-canary@motd"],
    );
    // A parameter that only some images read rebuilds only those.
    let canary = project.vimg(&[&build[..], &["--set", "domain=example.net"]].concat());
    canary.succeeds();
    let mut nodes = canary.built();
    nodes.sort();
    assert_eq!(nodes, ["bastion@motd", "web-canary@motd"]);
    let again = project.vimg(&build);
    assert_eq!((again.boots(), again.built()), (0, vec![]), "going back costs nothing");
    // The checks of the layers pass in the image, which boots once.
    let tested = project.vimg(&["test", "static"]);
    tested.succeeds();
    assert_eq!(tested.boots(), 1);
    let mut checks = tested.built();
    checks.sort();
    assert_eq!(checks, ["static:check/lighttpd/answers", "static:check/openssh/listens"]);
}

#[test]
#[ignore = "it installs PostgreSQL, which takes 5 minutes where machines are emulated: tests/long/database"]
fn a_database_is_installed_while_it_runs() {
    let project = Project::copy_of("database", "examples/fleet");
    project.vimg(&["build", "debian-12"]).succeeds();
    let built = project.vimg(&["build", "--no-output", "database"]);
    built.succeeds();
    assert_eq!(built.boots(), 1, "only the database is asked while it runs: {:?}", built.notices());
    let tested = project.vimg(&["test", "database"]);
    tested.succeeds();
    assert_eq!(tested.boots(), 1);
    let mut checks = tested.built();
    checks.sort();
    assert_eq!(checks, ["database:check/openssh/listens", "database:check/postgresql/listens"]);
}

#[test]
fn every_primitive_is_applied_and_idempotent() {
    let project = Project::new("primitives");
    let body = "
        package \"tree\" \"file\"
        group \"crew\" gid=3000
        group \"deck\"
        user \"kim\" uid=3001 group=\"crew\" groups=\"deck\" home=\"/home/kim\" shell=\"/bin/bash\" comment=\"Kim\"
        user \"robot\" system=#true
        file \"/etc/one\" content=\"one {{ greeting }}\\n\" mode=\"0640\" owner=\"kim\" group=\"crew\"
        file \"/etc/two\" from=\"two\"
        file \"/etc/three\" template=\"three.j2\"
        file \"/etc/systemd/system/ticker.service\" content=\"[Service]\\nExecStart=/bin/sleep infinity\\n[Install]\\nWantedBy=multi-user.target\\n\"
        directory \"/opt/empty\" mode=\"1777\"
        directory \"/opt/tree\" from=\"tree\" owner=\"kim\" group=\"crew\"
        symlink \"/opt/link\" target=\"tree/a\"
        archive \"/opt/unpacked\" from=\"some.tar.gz\" strip=1 owner=\"kim\" group=\"crew\"
        sysctl \"vm.swappiness\" value=7
        kernel-module \"overlay\"
        kernel-parameter \"quirk=1\"
        service \"ticker\" enabled=#true state=\"running\"
    ";
    let test = "
        run { script \"\"\"
            test \"$(cat /etc/one)\" = 'one hello'
            test \"$(stat -c '%a %U %G' /etc/one)\" = '640 kim crew'
            test \"$(stat -c %a /etc/two)\" = 755
            test \"$(cat /etc/three)\" = 'hello'
            test \"$(stat -c %a /opt/empty)\" = 1777
            test \"$(stat -c '%a %U' /opt/tree/a)\" = '644 kim'
            test \"$(readlink /opt/tree/to-a)\" = a
            test -d /opt/tree/sub/empty
            test \"$(cat /opt/link)\" = tree-a
            test \"$(stat -c %U /opt/unpacked/inner)\" = kim
            test \"$(cat /opt/unpacked/inner)\" = packed
            test \"$(cat /proc/sys/vm/swappiness)\" = 7
            test -d /sys/module/overlay
            grep -qw quirk=1 /proc/cmdline
            systemctl is-enabled --quiet ticker
            systemctl is-active --quiet ticker
            test \"$(id -u kim) $(id -gn kim)\" = '3001 crew'
            id -nG kim | grep -qw deck
            getent passwd robot
            tree --version
            \"\"\"
        }
        run user=\"kim\" workdir=\"/opt/tree\" { script \"\"\"
            #!/bin/bash
            set -euo pipefail
            test \"$(id -un)\" = kim
            test \"$HOME\" = /home/kim
            test \"$PWD\" = /opt/tree
            test \"$COLOUR\" = 'blue green'
            test -z \"${DISPLAY-}\"
            \"\"\"; env COLOUR=\"blue green\" }
    ";
    project.write(
        "main.vimg",
        &format!(
            "use \"std/debian.vimg\"\nparam \"greeting\" default=\"hello\"\n\
             image \"it\" {{ from \"debian-12\"; layer \"all\"; layer \"all\"; layer \"test\" }}\n\
             configuration \"all\" {{ needs \"booted\"\n{body}}}\nconfiguration \"test\" {{ needs \"booted\"\n{test}}}\n"
        ),
    );
    project.write("two", "two\n");
    project.mode("two", 0o755);
    project.write("three.j2", "{{ greeting }}\n");
    project.write("tree/a", "tree-a\n");
    project.mode("tree/a", 0o600);
    project.write("tree/sub/b", "b");
    std::fs::create_dir(project.path("tree/sub/empty")).unwrap();
    std::os::unix::fs::symlink("a", project.path("tree/to-a")).unwrap();
    project.write("top/inner", "packed\n");
    let tar = Command::new("tar").args(["-czf", "some.tar.gz", "top"]).current_dir(project.root()).status();
    assert!(tar.unwrap().success());
    project.give_away();
    project.vimg(&["build"]).succeeds();
    // The second time, nothing changes but the layer's own line of kernel parameters.
    let log = project.vimg(&["log", "it@all#2"]).stdout;
    let so = log.lines().filter(|l| l.ends_with(": unchanged")).count();
    assert_eq!(so, 16, "{log}");
}

/// Each of these faults gives its own message. No state is stored, and vimg
/// survives. They are images of one project, so that they boot in parallel.
#[test]
fn faults_have_names_and_leave_nothing() {
    let faults = [
        (
            "panic",
            "echo 1 >/proc/sys/kernel/sysrq; echo c >/proc/sysrq-trigger; sleep 60",
            "the machine's kernel panicked",
        ),
        ("off", "systemctl poweroff --force --force; sleep 60", "the machine switched itself off"),
        ("agent", "kill -9 $PPID; sleep 60", "the agent in the machine died"),
        ("full", "dd if=/dev/urandom of=/big bs=1M", "the machine's disk is full"),
        ("endless", "echo waiting; sleep infinity", "it did not end within 5 s"),
        (
            "chatty",
            "{ yes 0123456789012345678901234567890123456789 || true; } | head -c 1000000000; echo the end; exit 3",
            "exit code 3",
        ),
    ];
    let (project, built) = all_fail("faults", "needs \"booted\"", &faults);
    built.says("the end");
    // The log of a gigabyte of output has its head and its tail.
    let log = project.vimg(&["log", "chatty"]).stdout;
    assert!(log.contains("bytes of output left out") && log.len() < 10 << 20, "{} bytes", log.len());
    assert!(built.peak_memory < 200 << 20, "vimg itself took {} bytes", built.peak_memory);
    project.nothing_runs();
}

#[test]
fn killed_programs_leave_nothing_and_the_next_build_goes_on() {
    let project = with_layer(
        "kills",
        "needs \"booted\"\nrun { script \"echo work begins; sleep 5\" }\nrun { script \"echo done\" }",
    );
    project.vimg(&["build", "debian-12"]).succeeds();
    // QEMU is killed: an error says so. The test waits until the fork has
    // resumed, because before that vimg would boot a machine instead.
    let mut running = project.start(&["build"]);
    let qemu = running.machine_that_said("work begins");
    rustix::process::kill_process(qemu, rustix::process::Signal::KILL).unwrap();
    let killed: Tested = running.finish();
    assert_eq!(killed.code, 4, "{}", killed.stderr);
    killed.says("QEMU was killed or crashed");
    // vimg is killed: its machine ends with it.
    let mut running = project.start(&["build"]);
    running.machine_that_said("work begins");
    running.kill();
    project.nothing_runs();
    // Ctrl-C: vimg says so and cleans up.
    let mut running = project.start(&["build"]);
    running.machine_that_said("work begins");
    running.interrupt();
    let stopped = running.finish();
    assert_eq!(stopped.code, 130, "{}", stopped.stderr);
    project.nothing_runs();
    let done = project.vimg(&["build"]);
    done.succeeds();
    assert_eq!(done.built(), ["it@it"]);
    assert_eq!(project.abandoned_staging(), Vec::<String>::new(), "the next build reaps what the dead left");
}

#[test]
fn two_builds_of_one_store_make_a_state_once() {
    let project = with_layer("twice", "needs \"booted\"\nrun { script \"sleep 3; date +%s%N >/stamp\" }");
    project.vimg(&["build", "debian-12"]).succeeds();
    // Without memory snapshots, so that each start counts as a boot.
    let start = || project.start(&["build", "--no-memory"]);
    let (a, b) = (start(), start());
    let (a, b) = (a.finish(), b.finish());
    a.succeeds();
    b.succeeds();
    assert_eq!(a.boots() + b.boots(), 1, "{}\n{}", a.stderr, b.stderr);
}

/// Few hosts of tests have a KVM that works, so its test machine is emulated here.
#[test]
fn the_machine_that_tests_kvm_speaks() {
    let project = Project::new("probe");
    project.write("main.vimg", "use \"std/debian.vimg\"\n");
    project.vimg(&["build", "--no-output", "debian-12"]).succeeds();
    let kernel = newest_record(&Project::common_store(), "debian-12:base")["boot"]["kernel"].clone();
    let kernel = Project::common_store().join("blobs").join(kernel["digest"].as_str().unwrap());
    let initrd = project.path("initrd");
    std::fs::write(&initrd, vimg::agent::initramfs(&[])).unwrap();
    let said = |line: &str| {
        let mut qemu = Command::new("timeout");
        qemu.args(["300", "qemu-system-x86_64", "-accel", "tcg", "-m", "256M", "-nographic", "-no-reboot"]);
        qemu.arg("-kernel").arg(&kernel).arg("-initrd").arg(&initrd).args(["-append", line]);
        String::from_utf8_lossy(&qemu.output().unwrap().stdout).into_owned()
    };
    let line = vimg::agent::probe_line();
    let spoke = said(&line);
    assert!(spoke.contains("vimg-probe-hello") && !spoke.contains("vimg-init:"), "{spoke}");
    // An image with an emptied initial RAM disk is no such test.
    let empty = said(&line.replace(" vimg.probe", ""));
    assert!(empty.contains("vimg-init: the initial RAM disk of the image has no /init"), "{empty}");
    assert!(empty.contains("Kernel panic"), "{empty}");
}

#[test]
fn a_long_chain_is_joined_and_a_big_tree_arrives() {
    let project = Project::new("chain");
    let mut text = "use \"std/debian.vimg\"\nimage \"it\" {\n from \"debian-12\"\n".to_owned();
    for n in 0..20 {
        text.push_str(&format!("layer \"mark\" n={n}\n"));
    }
    text.push_str("layer \"tree\"\nlayer \"test\"\n}\n");
    text.push_str("configuration \"mark\" { input \"n\" type=\"int\"; file \"/marks/{{ n }}\" content=\"{{ n }}\\n\" }\n");
    text.push_str("configuration \"tree\" { directory \"/srv/many\" from=\"many\" }\n");
    text.push_str(
        "configuration \"test\" { run { script \"test $(ls /marks | wc -l) = 20; \
         test $(find /srv/many -type f | wc -l) = 10000; test \\\"$(cat /srv/many/42/42)\\\" = 'file 42 42'\" } }\n",
    );
    project.write("main.vimg", &text);
    for a in 0..100 {
        for b in 0..100 {
            project.write(&format!("many/{a}/{b}"), &format!("file {a} {b}\n"));
        }
    }
    project.give_away();
    let built = project.vimg(&["build"]);
    built.succeeds();
    assert_eq!(built.boots(), 0);
    // A machine can start from such a state, too.
    project.edit("main.vimg", "{ run { script \"test $(ls", "{ needs \"booted\"; run { script \"test $(ls");
    let again = project.vimg(&["build"]);
    again.succeeds();
    assert_eq!(again.built(), ["it@test"]);
}

#[test]
fn trixie_is_bootstrapped_and_a_disk_can_be_imported() {
    let project = Project::new("trixie");
    project.write(
        "main.vimg",
        "image \"base\" { bootstrap \"debian\" suite=\"trixie\" { package \"tree\" }; machine disk=\"3GiB\" }\n\
         image \"it\" { from \"base\"; layer \"mark\"; output \"qcow2\" path=\"it.qcow2\"; output \"raw\" path=\"it.img\" }\n\
         configuration \"mark\" { file \"/mark\" content=\"here\\n\"; run { script \"tree --version; . /etc/os-release; test $VERSION_CODENAME = trixie\" } }\n",
    );
    project.vimg(&["build"]).succeeds();
    let raw = std::fs::metadata(project.path("it.img")).unwrap();
    use std::os::unix::fs::MetadataExt;
    assert!(raw.len() == 3 << 30 && raw.blocks() * 512 < 2 << 30, "the raw disk is not sparse");

    // An exported disk contains the agent, so it can be imported as a base.
    let sha256 = machines::sha256(&project.path("it.qcow2"));
    let import = Project::new("import");
    import.take(&project.path("it.qcow2"), "it.qcow2");
    let recipe = |sum: &str| {
        format!(
            "image \"base\" {{ disk \"it.qcow2\" sha256=\"{sum}\" }}\nimage \"it\" {{ from \"base\"; layer \"test\" }}\n\
             configuration \"test\" {{ run {{ script \"test $(cat /mark) = here; test -s /etc/machine-id\" }} }}\n"
        )
    };
    import.write("main.vimg", &recipe(&"0".repeat(64)));
    let wrong = import.vimg(&["build"]);
    assert_eq!(wrong.code, 4);
    wrong.says(&sha256);
    import.write("main.vimg", &recipe(&sha256));
    import.vimg(&["build"]).succeeds();
}

#[test]
fn a_missing_qemu_has_a_name_and_a_remedy() {
    let project = with_layer("no-qemu", "file \"/x\" content=\"\"");
    project.vimg(&["build", "debian-12"]).succeeds();
    let empty = tempfile::tempdir().unwrap();
    let missing = project.vimg_with(&["build"], |command| {
        command.env("PATH", Path::new(empty.path()));
    });
    assert_eq!(missing.code, 4, "{}", missing.stderr);
    missing.says("`qemu-system-x86_64` is not installed");
    missing.says("apt-get install qemu-system-x86");
}

#[test]
fn a_layer_boots_its_machine_again_where_it_says_so() {
    let project = with_layer(
        "again",
        "run { script \"cat /proc/sys/kernel/random/boot_id >/before; echo once >>/times; touch /run/gone\" }\n\
         reboot\n\
         run { script \"cmp /before /proc/sys/kernel/random/boot_id && exit 3; test ! -e /run/gone; touch /initrd.img\" }\n\
         reboot\n\
         run { script \"test $(wc -l </times) = 1; echo $(systemctl is-system-running); journalctl --list-boots | wc -l\" }\n",
    );
    project.vimg(&["build", "debian-12"]).succeeds();
    let store = project.own_store();
    let built = project.vimg_in(&store, &["build"]);
    built.succeeds();
    assert_eq!(built.boots(), 3, "one boot before the layer, and two in it");
    let log = project.vimg_in(&store, &["log", "it@it"]).stdout;
    assert_eq!(log.matches("== reboot").count(), 2, "{log}");
    // It is one layer, and its result boots.
    let asked = project.vimg_in(
        &store,
        &["run", "it", "--", "sh", "-c", "ls /var/lib/vimg/ledger | grep -c it$; cat /times"],
    );
    assert_eq!((asked.code, asked.stdout.as_str()), (0, "1\nonce\n"), "{}", asked.stderr);
    // If a script reboots by itself, the error mentions the step.
    project.edit("main.vimg", "touch /initrd.img", "systemctl reboot; sleep 100");
    let failed = project.vimg_in(&store, &["build"]);
    assert_eq!(failed.code, 1);
    failed.says("Use the step `reboot` instead");
}

//! Layers that need no booted machine: in an appliance as an ordinary user, and
//! in a container as root, if root runs the tests.

use super::machines::{Project, Tested, all_fail, damage, files_of, newest_record, root_base, with_layer};

/// The result of an offline layer: units are enabled, settings are written,
/// nothing is started, and there is no trace of the runner. Then the machine
/// boots, and the settings are in effect.
const DECLARED: &str = "
    package \"nginx-light\"
    sysctl \"vm.swappiness\" value=7
    kernel-module \"overlay\"
    file \"/etc/systemd/system/ticker.service\" content=\"[Service]\\nExecStart=/bin/sleep infinity\\n[Install]\\nWantedBy=multi-user.target\\n\"
    service \"ticker\" enabled=#true state=\"running\"
    run { script \"\"\"
        test ! -d /run/systemd/system
        test ! -e /dev/vda
        test ! -d /sys/module/overlay
        test \"$(cat /proc/sys/vm/swappiness)\" != 7
        test -e /usr/sbin/policy-rc.d
        systemctl is-enabled --quiet ticker
        test \"$(hostname)\" = debian
        date +%s >/made-at
        \"\"\" }
    run network=#true { script \"grep -q nameserver /etc/resolv.conf\" }
    run { script \"! grep -q nameserver /etc/resolv.conf\" }
";
const BOOTED: &str = "
    needs \"booted\"
    run { script \"\"\"
        test ! -e /usr/sbin/policy-rc.d
        test -L /etc/resolv.conf
        test -d /sys/module/overlay
        systemctl is-active --quiet ticker
        systemctl is-active --quiet nginx
        test \"$(cat /proc/sys/vm/swappiness)\" = 7
        test $(($(date +%s) - $(cat /made-at))) -lt 3600
        \"\"\" }
";

fn declared(name: &str) -> Project {
    let project = Project::new(name);
    project.write(
        "main.vimg",
        &format!(
            "use \"std/debian.vimg\"\nimage \"it\" {{ from \"debian-12\"; layer \"off\"; layer \"on\" }}\n\
             configuration \"off\" {{{DECLARED}}}\nconfiguration \"on\" {{{BOOTED}}}\n"
        ),
    );
    project
}

#[test]
fn what_is_applied_offline_holds_once_the_machine_boots() {
    let project = declared("offline");
    project.vimg(&["build", "debian-12"]).succeeds();
    let store = project.own_store();
    let built = project.vimg_in(&store, &["build"]);
    built.succeeds();
    assert_eq!((built.built().len(), built.boots()), (2, 1));
    let record = newest_record(&store, "it@off");
    let way = record["provider"].as_str().unwrap();
    assert!(way.contains("appliance") && !way.contains("cold boot"), "{way}");
    assert_eq!(record["trusted_filesystem"], false, "another kernel than the host's has written to it");

    // A snapshot only saves time: without it, the appliance boots.
    project.write("main.vimg", MARKED);
    project.vimg_in(&store, &["build"]).succeeds();
    damage(&store, "appliances");
    project.edit("main.vimg", "one", "two");
    let again = project.vimg_in(&store, &["build"]);
    again.succeeds();
    let way = newest_record(&store, "it@mark")["provider"].as_str().unwrap().to_owned();
    assert!(way.contains("cold boot"), "{way}");
}

const MARKED: &str = "use \"std/debian.vimg\"\nimage \"it\" { from \"debian-12\"; layer \"mark\" }\n\
    configuration \"mark\" { file \"/mark\" content=\"one\" }\n";

#[test]
fn a_script_that_misses_a_running_system_is_told_what_to_say() {
    let project = with_layer("not-booted", "run { script \"bash -c 'echo >/dev/tcp/127.0.0.1/80'\" }");
    let failed = project.vimg(&["build"]);
    assert_eq!(failed.code, 1, "{}", failed.stderr);
    failed.says("Connection refused");
    failed.says("needs \"booted\"");
}

#[test]
fn a_container_that_is_not_allowed_is_refused() {
    let project = with_layer("refused", "file \"/x\" content=\"\"");
    project.vimg(&["build", "debian-12"]).succeeds();
    let refused = project.vimg(&["build", "--provider", "container"]);
    assert_eq!(refused.code, 4, "{}", refused.stderr);
    refused.says("containers don't work here: only root may mount filesystems");
    refused.says("--provider auto");
    let Some(_) = as_root(&project) else { return };
    // Each layer needs a fixed limit of open files, and root without
    // CAP_SYS_RESOURCE can't raise it.
    let few = project.sh_as_root(
        "exec setpriv --bounding-set=-sys_resource prlimit --nofile=2048:2048 $VIMG build --provider container",
    );
    assert_eq!(few.code, 4, "{}", few.stderr);
    few.says("containers don't work here: this process may open only 2048 files");
    few.says("ulimit -Hn 4096");
}

#[test]
fn faults_of_an_appliance_have_names_and_leave_nothing() {
    let faults = [
        ("full", "dd if=/dev/urandom of=/big bs=1M", "the machine's disk is full"),
        ("endless", "sleep infinity", "it did not end within 5 s"),
        ("orphan", "sleep 600 & exit 3", "exit code 3"),
        // A script can't reach anything outside its root directory.
        (
            "raw",
            "mknod /tmp/vda b 254 0 || unshare -Urm true || mount -t tmpfs none /mnt || echo 0 >/proc/sys/kernel/printk || exit 4",
            "exit code 4",
        ),
    ];
    let (project, built) = all_fail("offline-faults", "", &faults);
    assert_eq!(built.boots(), 0);
    project.nothing_runs();
}

/// The EFI system partition is mounted if the image has a directory for it, and
/// files there end up in the partition.
#[test]
fn the_efi_system_partition_is_part_of_the_machine() {
    let project = Project::new("esp");
    project.write(
        "main.vimg",
        "use \"std/debian.vimg\"\n\
         image \"it\" { from \"debian-12\"; layer \"place\"; output \"raw\" path=\"it.img\" }\n\
         configuration \"place\" { directory \"/boot/efi\" }\n",
    );
    project.vimg(&["build", "--no-output"]).succeeds();
    project.edit("main.vimg", "layer \"place\";", "layer \"place\"; layer \"loader\"; layer \"more\";");
    project.append(
        "main.vimg",
        "configuration \"loader\" { file \"/boot/efi/EFI/vimg/one.txt\" content=\"one\" }\n\
         configuration \"more\" { file \"/boot/efi/EFI/vimg/two.txt\" content=\"two\" }\n",
    );
    project.vimg(&["build"]).succeeds();
    let image = format!("{}@@{}", project.path("it.img").display(), 2048 * 512);
    for (name, text) in [("one.txt", "one"), ("two.txt", "two")] {
        let path = format!("::/EFI/vimg/{name}");
        let output = std::process::Command::new("mtype").args(["-i", &image, &path]).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout), text, "{output:?}");
    }
}

/// Other root filesystems that a distribution may use. For each, a disk with a
/// small tree takes the place of the base's disk.
#[test]
fn other_filesystems_are_worked_on_as_well() {
    const MARK: &str = "this is the mark that a layer leaves";
    let project = with_layer("filesystems", &format!("file \"/etc/mark\" content=\"{MARK}\""));
    project.vimg(&["build", "debian-12"]).succeeds();
    let tree = tempfile::tempdir().unwrap();
    for dir in ["dev", "etc", "proc", "root", "run", "sys", "tmp", "usr", "var"] {
        std::fs::create_dir(tree.path().join(dir)).unwrap();
    }
    for (name, text) in [("passwd", "root:x:0:0:root:/root:/bin/sh\n"), ("group", "root:x:0:\n")] {
        std::fs::write(tree.path().join("etc").join(name), text).unwrap();
    }
    for kind in ["btrfs", "xfs"] {
        let disk = project.path(&format!("{kind}.raw"));
        std::fs::File::create(&disk).unwrap().set_len(1 << 30).unwrap();
        let mut mkfs = std::process::Command::new(format!("mkfs.{kind}"));
        if kind == "btrfs" {
            mkfs.arg("--rootdir").arg(tree.path());
        } else {
            std::fs::write(project.path("proto"), proto(tree.path())).unwrap();
            mkfs.arg("-p").arg(project.path("proto"));
        }
        let output = mkfs.arg(&disk).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        let (built, raw) = project.vimg_on_disk(&disk, "it@it");
        assert_eq!((built.built(), built.boots()), (vec!["it@it".to_owned()], 0), "{kind}");
        let disk = std::fs::read(raw).unwrap();
        let found = disk.windows(MARK.len()).any(|w| w == MARK.as_bytes());
        assert!(found, "the file is not on the {kind} disk");
    }
}

/// Returns the description of a tree for `mkfs.xfs`.
fn proto(tree: &std::path::Path) -> String {
    let mut out = "/\n0 0\nd--755 0 0\n".to_owned();
    for entry in std::fs::read_dir(tree).unwrap().flatten() {
        out.push_str(&format!("{} d--755 0 0\n", entry.file_name().to_str().unwrap()));
        for file in std::fs::read_dir(entry.path()).unwrap().flatten() {
            let name = file.file_name();
            out.push_str(&format!("{} ---644 0 0 {}\n", name.to_str().unwrap(), file.path().display()));
        }
        out.push_str("$\n");
    }
    out + "$\n"
}

/// Returns a function that runs vimg as root, where it uses containers.
fn as_root(project: &Project) -> Option<impl Fn(&[&str]) -> Tested> {
    let root = project.as_root();
    if root.is_none() {
        #[expect(clippy::print_stdout, reason = "the test says what it skips")]
        {
            println!("containers were not tested: these tests are not root's");
        }
    }
    root
}

/// Tries to see and to change things outside of a container from inside. Each
/// line must fail, or the layer fails.
const ESCAPES: &str = r#"
no() { if "$@" >/tmp/said 2>&1; then echo "possible: $*"; cat /tmp/said; exit 9; fi; }
no test -e SECRET
no test -e /proc/1/root/SECRET
no grep -q "[v]img-test-host" /proc/*/cmdline
no test "$(ls /proc | grep -c '^[0-9]')" -gt 20
no grep -q "SECRE[T]" /proc/self/mountinfo
no mount -t tmpfs none /mnt
no mount --bind / /mnt
no umount /proc
no mount -o remount,rw /proc/sys
no mknod /tmp/sda b 8 0
no mknod /tmp/mem c 1 1
no sh -c 'echo x >/proc/sys/kernel/hostname'
no sh -c 'echo x >/proc/sys/kernel/core_pattern'
no sh -c 'echo 61 >/proc/sys/vm/swappiness'
no sh -c 'echo 1 >/proc/sys/net/ipv4/ip_forward'
no grep -q HOST_TOKEN /proc/1/environ
no sh -c 'ls -l /proc/self/fd | grep socket'
no sh -c 'echo h >/proc/sysrq-trigger'
no sh -c 'ls /sys/* | grep .'
no dmesg
no unshare --user true
no unshare --mount true
no unshare --net true
no nsenter --target 1 --mount true
no chroot /proc/1/root/.. test -e SECRET
no date -s '2001-01-01'
no hostname other
no sh -c 'echo 1 >/proc/1/oom_score_adj && echo -1000 >/proc/self/oom_score_adj'
no ls -l /dev/loop-control /dev/fuse /dev/kvm /dev/vda /dev/mem
grep -q '^Seccomp:.2' /proc/self/status
grep -q '^NoNewPrivs:.1' /proc/self/status
test "$(id -u)" = 0
chown daemon /tmp/said && chmod 4755 /tmp/said
setpriv --reuid=daemon --regid=daemon --clear-groups id -un | grep -qx daemon
"#;

#[test]
fn a_container_sees_and_changes_nothing_of_the_host() {
    let project = Project::new("escape");
    let Some(vimg) = as_root(&project) else { return };
    let secret = tempfile::NamedTempFile::with_prefix("vimg-test-host-secret").unwrap();
    let script = ESCAPES.replace("SECRET", secret.path().to_str().unwrap());
    project.write("escape.sh", &script);
    project.write(
        "main.vimg",
        "use \"std/debian.vimg\"\nimage \"it\" { from \"debian-12\"; layer \"escape\"; layer \"quiet\" }\n\
         configuration \"escape\" { run \"escape.sh\" }\n\
         configuration \"quiet\" { file \"/quiet\" content=\"\" }\n",
    );
    let kernel = || {
        ["kernel/hostname", "kernel/core_pattern", "vm/swappiness", "net/ipv4/ip_forward"]
            .map(|name| std::fs::read_to_string(format!("/proc/sys/{name}")).unwrap())
    };
    let before = kernel();
    vimg(&["build", "--provider", "container"]).succeeds();
    assert_eq!(kernel(), before);
    let record = project.root_record("it@escape");
    assert!(record["provider"].as_str().unwrap().contains("container"));
    assert_eq!(record["trusted_filesystem"], true);
    project.nothing_is_mounted();
}

#[test]
fn killed_containers_leave_nothing() {
    let project = with_layer("kill-container", "run { script \"sleep 60\" }");
    let Some(vimg) = as_root(&project) else { return };
    vimg(&["build", "debian-12"]).succeeds();
    for signal in [rustix::process::Signal::KILL, rustix::process::Signal::INT] {
        let running = project.start_as_root(&["build", "--provider", "container"]);
        running.wait_for("bwrap");
        running.signal(signal);
        drop(running.finish());
        project.nothing_runs();
        project.nothing_is_mounted();
    }
}

/// The only example image with a booted layer. Both runners must give the same
/// files below and above it.
#[test]
#[ignore = "it installs PostgreSQL once more, which takes 10 minutes where machines are emulated: tests/long/database"]
fn a_container_makes_the_same_database() {
    let project = Project::copy_of("same-database", "examples/fleet");
    project.vimg(&["build", "--no-output", "database"]).succeeds();
    a_container_makes_the_same(&project, &["build", "--no-output", "database"], &["database@motd"]);
}

/// Builds nodes of a project in a container, which an appliance built in the
/// common store, and checks that their files are the same. Does nothing if root
/// does not run the tests.
pub(crate) fn a_container_makes_the_same(project: &Project, build: &[&str], nodes: &[&str]) {
    if as_root(project).is_none() {
        return;
    }
    let name = project.root().file_name().unwrap();
    let store = root_base().join(name);
    let vimg = project.as_root_apart(&store).unwrap();
    vimg(&[build, &["--provider", "container"]].concat()).succeeds();
    for node in nodes {
        let record = newest_record(&store, node);
        // The host's kernel must not mount a disk with a booted layer.
        let booted = node.starts_with("database");
        assert_eq!(record["provider"].as_str().unwrap().contains("container"), !booted, "{record}");
        let key = record["key"].as_str().unwrap();
        let (ours, begun) = files_of(&Project::common_store(), key);
        let (theirs, _) = files_of(&store, key);
        let names: std::collections::BTreeSet<&String> = ours.keys().chain(theirs.keys()).collect();
        let mut differ: Vec<_> = names.into_iter().filter(|n| ours.get(*n) != theirs.get(*n)).collect();
        differ.retain(|name| !(goes_with_the_seal(name) || booted && is_drawn(name)));
        if begun / 86_400 != today() {
            // These contain the day on which an account was created.
            differ.retain(|n| !["etc/shadow", "etc/shadow-"].contains(&n.as_str()));
        }
        assert!(differ.is_empty(), "{node}: {differ:?}");
        assert!(ours.len() > 10_000, "{} files are no system", ours.len());
    }
}

/// Whether sealing removes a file: the image's own keys, and files with build
/// times.
fn goes_with_the_seal(name: &str) -> bool {
    ["etc/ssh/ssh_host_", "var/log/", "var/cache/ldconfig/"].iter().any(|start| name.starts_with(start))
}

/// Whether a file differs between any two machines with this database: the
/// certificate that `ssl-cert` signs with a random key, and files that contain
/// PostgreSQL's random system identifier (control file, write-ahead log,
/// caches, statistics).
fn is_drawn(name: &str) -> bool {
    let cluster = name.strip_prefix("var/lib/postgresql/15/main/");
    name == "etc/ssl/certs/ssl-cert-snakeoil.pem"
        || cluster.is_some_and(|name| {
            name == "global/pg_control"
                || name.starts_with("pg_wal/")
                || name.starts_with("pg_stat/")
                || name.ends_with("/pg_internal.init")
        })
}

/// Returns the days since 1970.
fn today() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    now.as_secs() / 86_400
}

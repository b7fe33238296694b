//! Isolation: a guest reaches neither the host nor its network, and a stopped
//! bootstrap leaves nothing behind.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::machines::{Project, root_base};

/// Connects to everything nearby, which must fail, and to a server on the
/// internet.
const ASKS: &str = r#"#!/bin/bash
asks() { timeout 20 bash -c "exec 3<>/dev/tcp/$1/$2" 2>/dev/null; }
# The host's loopback as QEMU and pasta have it, by all names; a cloud's
# credentials; private networks; the host's own addresses.
for near in 127.0.0.1 10.0.2.2 10.0.2.3 198.51.100.1 198.51.100.2 169.254.169.254 192.168.0.1 host.vimg.internal OWN; do
    if asks $near PORT; then echo "reached $near"; exit 1; fi
done
getent hosts deb.debian.org
asks deb.debian.org 80
"#;

const NETWORK: &str = r#"
use "std/debian.vimg"
image "off" { from "debian-12"; layer "asks" }
image "it" { from "off"; layer "asks-booted"; layer "silent" }
configuration "asks" { run "asks.sh" network=#true; check "asks-none" { run "true" } }
configuration "asks-booted" { needs "booted"; run "asks.sh" network=#true }
// A script without `network=#true` has no network, even in a machine with an
// interface.
configuration "silent" { needs "booted"; run { script "! timeout 5 bash -c 'exec 3<>/dev/tcp/deb.debian.org/80'" } }
"#;

/// Returns the addresses of this host except loopback addresses.
fn own_addresses() -> String {
    let output = Command::new("ip").args(["-4", "-o", "addr", "show", "scope", "global"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let address = |line: &str| Some(line.split_whitespace().nth(3)?.split('/').next()?.to_owned());
    text.lines().filter_map(address).collect::<Vec<_>>().join(" ")
}

#[test]
fn a_guest_reaches_the_internet_and_nothing_nearer() {
    let listener = TcpListener::bind("0.0.0.0:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let project = Project::new("strangers");
    project.write("main.vimg", NETWORK);
    let script = ASKS.replace("PORT", &port.to_string()).replace("OWN", &own_addresses());
    project.write("asks.sh", &script);
    project.give_away();
    // The machine boots for a check without a network. Its forks have a
    // network.
    project.vimg(&["test", "off"]).succeeds();
    project.vimg(&["build"]).succeeds();
    if let Some(vimg) = project.as_root() {
        vimg(&["build", "off", "--provider", "container"]).succeeds();
        let record = project.root_record("off@asks");
        assert!(record["provider"].as_str().unwrap().contains("container"), "{record}");
    }
    listener.set_nonblocking(true).unwrap();
    assert!(listener.accept().is_err(), "the listener got a connection");

    // `--network-allow` opens the host's address, which is the same for all
    // runners.
    let script = format!(
        "use \"std/debian.vimg\"\nimage \"off\" {{ from \"debian-12\"; layer \"off\" }}\nimage \"it\" {{ from \"off\"; layer \"on\" }}\n\
         configuration \"off\" {{ run network=#true {{ script \"bash -c 'exec 3<>/dev/tcp/host.vimg.internal/{port}'\" }} }}\n\
         configuration \"on\" {{ needs \"booted\"; run network=#true {{ script \"bash -c 'exec 3<>/dev/tcp/host.vimg.internal/{port}'\" }} }}\n"
    );
    project.write("main.vimg", &script);
    let came = || {
        let mut came = 0;
        while listener.accept().is_ok() {
            came += 1;
        }
        came
    };
    project.vimg(&["build", "--network-allow", "host"]).succeeds();
    assert_eq!(came(), 2);
    if let Some(vimg) = project.as_root() {
        vimg(&["build", "off", "--provider", "container", "--network-allow", "host"]).succeeds();
        assert_eq!(came(), 1);
    }
}

/// A proxy that runs for as long as a test.
struct Proxy(Child);

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_proxy_of_the_users_is_used_and_leaves_no_trace() {
    let project = Project::new("proxy");
    let port = crate::port::free().port();
    let log = project.path("proxy.log");
    project.write(
        "proxy.conf",
        &format!(
            "Port {port}\nListen 127.0.0.1\nTimeout 60\nAllow 127.0.0.1\nLogFile \"{}\"\nLogLevel Connect\n",
            log.display()
        ),
    );
    project.write(
        "main.vimg",
        &format!(
            "use \"std/debian.vimg\"\nimage \"it\" {{ from \"debian-12\"; layer \"off\"; layer \"seen\" }}\n\
             configuration \"off\" {{ package \"jq\"; run network=#true {{ script \"test \\\"$http_proxy\\\" != ''\" }} }}\n\
             configuration \"seen\" {{ run {{ script \"test -z \\\"${{http_proxy-}}\\\"; found=$(grep -rl ':{port}' /etc /var /root /home /usr/lib/vimg || true); test -z \\\"$(printf %s \\\"$found\\\" | grep -v ^/var/lib/vimg/tmp/ || true)\\\"\" }} }}\n"
        ),
    );
    project.give_away();
    project.vimg(&["build", "debian-12"]).succeeds();
    let conf = project.path("proxy.conf");
    let proxy =
        Command::new("tinyproxy").args(["-d", "-c"]).arg(&conf).stdout(Stdio::null()).spawn().unwrap();
    let _proxy = Proxy(proxy);
    let start = Instant::now();
    while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
        assert!(start.elapsed() < Duration::from_secs(30), "the proxy does not start");
        std::thread::sleep(Duration::from_millis(50));
    }
    let requests = || {
        let said = std::fs::read_to_string(&log).unwrap();
        said.lines().filter(|line| line.contains("Request") && line.contains("deb.debian.org")).count()
    };
    let env = [("http_proxy", format!("http://127.0.0.1:{port}")), ("no_proxy", "example.org".into())];
    let built = project.vimg_with(&["build"], |command| {
        command.envs(env.clone());
    });
    built.succeeds();
    let first = requests();
    assert!(first > 0, "no request reached the proxy");
    if project.as_root().is_some() {
        let running = project.start_as_root_with(&["build", "--provider", "container"], |command| {
            command.envs(env.clone());
        });
        running.finish().succeeds();
        assert!(requests() > first, "the container sent the proxy no request");
    }
}

/// Returns the size of the files below a directory, in bytes. Root can read
/// files of all users, and if the user is not root, all files are the user's.
fn left(dir: &Path) -> u64 {
    walkdir::WalkDir::new(dir).into_iter().flatten().filter_map(|e| e.metadata().ok()).map(|m| m.len()).sum()
}

#[test]
fn a_bootstrap_that_is_stopped_leaves_nothing() {
    let project = Project::new("stopped");
    project.write("main.vimg", "use \"std/debian.vimg\"\nimage \"it\" { from \"debian-12\" }\n");
    project.give_away();
    let temporary = || {
        let names = std::fs::read_dir(std::env::temp_dir()).unwrap().flatten();
        names.filter(|e| e.file_name().to_string_lossy().starts_with("mmdebstrap")).count()
    };
    let before = temporary();
    for root in [false, true] {
        if root && project.as_root().is_none() {
            continue;
        }
        let store = if root { root_base().join("stopped") } else { project.empty_store() };
        let in_staging = || -> Vec<PathBuf> {
            let entries = std::fs::read_dir(store.join("staging")).into_iter().flatten().flatten();
            entries.map(|entry| entry.path()).collect()
        };
        // A killed vimg leaves its directory, which the next run removes. One
        // that is asked to stop leaves none.
        for signal in [Signal::KILL, Signal::INT] {
            let what = format!("{signal:?}, root: {root}");
            let in_store = |command: &mut Command| {
                command.env("VIMG_STORE", &store);
            };
            let dead = in_staging();
            let running = match root {
                true => project.start_as_root_with(&["build"], in_store),
                false => project.start_with(&["build"], in_store),
            };
            let start = Instant::now();
            // The directory of the killed vimg is gone, and that of this one is
            // large.
            let unpacked = || {
                let mut dirs = in_staging().into_iter().filter(|path| path.is_dir());
                let own = dirs.next();
                own.is_some_and(|own| !dead.contains(&own) && left(&own) > 50 << 20) && dirs.next().is_none()
            };
            while !unpacked() {
                assert!(start.elapsed() < Duration::from_secs(120), "{what}: nothing is unpacked");
                std::thread::sleep(Duration::from_millis(100));
            }
            running.signal(signal);
            drop(running.finish());
            let marker = store.to_string_lossy().into_owned();
            let mounts = || std::fs::read_to_string("/proc/self/mountinfo").unwrap().contains(&*marker);
            let start = Instant::now();
            while mounts() || runs_in(&store) {
                assert!(start.elapsed() < Duration::from_secs(20), "{what}: something still runs");
                std::thread::sleep(Duration::from_millis(100));
            }
            assert_eq!(temporary(), before, "{what}");
        }
        assert_eq!(in_staging(), Vec::<PathBuf>::new(), "root: {root}");
        std::fs::remove_dir_all(&store).unwrap();
    }
}

/// Whether a process runs in a directory, or names it on its command line.
fn runs_in(dir: &Path) -> bool {
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let marker = dir.to_string_lossy().into_owned();
    processes.filter(|e| e.file_name().to_string_lossy().parse::<u32>().is_ok()).any(|entry| {
        let cwd = std::fs::read_link(entry.path().join("cwd")).unwrap_or_default();
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        cwd.starts_with(dir) || String::from_utf8_lossy(&line).contains(&marker)
    })
}

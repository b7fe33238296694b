//! Projects, runs of the program, and disks that boot by themselves.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use rustix::process::Pid;

mod disks;

use disks::convert;
pub(crate) use disks::files_of;

/// The user that runs the program if root runs the tests.
const USER: &str = "vimg-test";

struct Account {
    uid: u32,
    gid: u32,
}

fn account() -> Option<&'static Account> {
    static ACCOUNT: OnceLock<Option<Account>> = OnceLock::new();
    ACCOUNT
        .get_or_init(|| {
            if !rustix::process::geteuid().is_root() {
                return None;
            }
            let passwd = std::fs::read_to_string("/etc/passwd").unwrap();
            let line = passwd.lines().find(|l| l.starts_with(&format!("{USER}:"))).unwrap_or_else(|| {
                panic!("as root these tests need a user: useradd -m {USER}, with 65536 subordinate ids")
            });
            let fields: Vec<&str> = line.split(':').collect();
            Some(Account { uid: fields[2].parse().unwrap(), gid: fields[3].parse().unwrap() })
        })
        .as_ref()
}

/// Returns the directory of projects and the common store: temporary, but not
/// in memory.
fn base() -> &'static Path {
    static BASE: OnceLock<PathBuf> = OnceLock::new();
    BASE.get_or_init(|| {
        let dir = match account() {
            None => PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("vm"),
            Some(_) => std::env::temp_dir().join("vimg-test"),
        };
        // States of an earlier run would be reused, and these tests count what
        // is built.
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir).unwrap();
        // The user may have no access to the directory of cargo's builds.
        std::fs::copy(env!("CARGO_BIN_EXE_vimg"), dir.join("vimg.new")).unwrap();
        std::fs::rename(dir.join("vimg.new"), dir.join("vimg")).unwrap();
        own(&dir);
        dir
    })
}

fn own(path: &Path) {
    if let Some(account) = account() {
        for entry in walkdir::WalkDir::new(path).max_depth(20) {
            let entry = entry.unwrap();
            if entry.path().starts_with(path.join("store")) {
                continue;
            }
            std::os::unix::fs::lchown(entry.path(), Some(account.uid), Some(account.gid)).unwrap();
        }
    }
}

/// Creates a project that builds `it` from Debian 12 with one layer of `body`.
pub(crate) fn with_layer(name: &str, body: &str) -> Project {
    let project = Project::new(name);
    project.write(
        "main.vimg",
        &format!(
            "use \"std/debian.vimg\"\nimage \"it\" {{ from \"debian-12\"; layer \"it\" }}\n\
             configuration \"it\" {{\n{body}\n}}\n"
        ),
    );
    project
}

/// Builds an image for each fault: its name, the script that causes it, and
/// words of the message. All must fail, and no state may be stored. They are
/// images of one project, so that they are built in parallel.
pub(crate) fn all_fail(project: &str, needs: &str, faults: &[(&str, &str, &str)]) -> (Project, Tested) {
    let project = Project::new(project);
    let mut text = "use \"std/debian.vimg\"\nimage \"small\" { bootstrap \"debian\" suite=\"bookworm\"; machine disk=\"2GiB\" memory=\"512MiB\" }\n".to_owned();
    for (name, script, _) in faults {
        let timeout = if *name == "endless" { "timeout=\"5s\"" } else { "" };
        text.push_str(&format!(
            "image \"{name}\" {{ from \"small\"; layer \"{name}\" }}\n\
             configuration \"{name}\" {{\n{needs}\nrun {timeout} {{ script {script:?} }}\n}}\n"
        ));
    }
    project.write("main.vimg", &text);
    let built = project.vimg(&["build", "--keep-going", "--jobs", "2"]);
    assert_eq!(built.code, 1, "{}", built.stderr);
    for (name, _, words) in faults {
        built.says(words);
        let why = project.vimg(&["why", name]).stdout;
        assert!(why.contains(&format!("build  {name}@{name}")), "{name} was kept: {why}");
    }
    (project, built)
}

/// A project in its own directory. All projects share one store.
pub(crate) struct Project {
    root: PathBuf,
}

impl Project {
    pub(crate) fn new(name: &str) -> Self {
        let root = base().join("projects").join(name);
        let _ = std::fs::remove_dir_all(&root);
        std::fs::create_dir_all(&root).unwrap();
        own(&root);
        Self { root }
    }

    pub(crate) fn copy_of(name: &str, from: &str) -> Self {
        let project = Self::new(name);
        let from = Path::new(env!("CARGO_MANIFEST_DIR")).join(from);
        let status = Command::new("cp").arg("-a").arg(from.join(".")).arg(&project.root).status();
        assert!(status.unwrap().success());
        own(&project.root);
        project
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    pub(crate) fn write(&self, name: &str, text: &str) {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
    }

    pub(crate) fn mode(&self, name: &str, mode: u32) {
        std::fs::set_permissions(self.path(name), std::fs::Permissions::from_mode(mode)).unwrap();
    }

    pub(crate) fn edit(&self, name: &str, from: &str, to: &str) {
        let text = std::fs::read_to_string(self.path(name)).unwrap();
        assert!(text.contains(from), "{name} has no {from:?}");
        std::fs::write(self.path(name), text.replace(from, to)).unwrap();
    }

    pub(crate) fn take(&self, from: &Path, name: &str) {
        std::fs::copy(from, self.path(name)).unwrap();
        own(&self.root);
    }

    /// Makes the user the owner of the files that the test wrote.
    pub(crate) fn give_away(&self) {
        own(&self.root);
    }

    pub(crate) fn vimg(&self, args: &[&str]) -> Tested {
        self.vimg_with(args, |_| {})
    }

    pub(crate) fn vimg_with(&self, args: &[&str], change: impl FnOnce(&mut Command)) -> Tested {
        self.spawn(args, change).finish()
    }

    pub(crate) fn start(&self, args: &[&str]) -> Running {
        self.spawn(args, |_| {})
    }

    /// Runs the program as root with root's own store, if root runs the tests.
    pub(crate) fn as_root(&self) -> Option<impl Fn(&[&str]) -> Tested> {
        account()?;
        Some(|args: &[&str]| self.start_as_root(args).finish())
    }

    pub(crate) fn start_as_root(&self, args: &[&str]) -> Running {
        self.start_as_root_with(args, |_| {})
    }

    pub(crate) fn start_as_root_with(&self, args: &[&str], change: impl FnOnce(&mut Command)) -> Running {
        self.spawn(args, |command| {
            command.uid(0).gid(0).env("VIMG_STORE", root_store()).env("HOST_TOKEN", "secret");
            change(command);
        })
    }

    pub(crate) fn start_with(&self, args: &[&str], change: impl FnOnce(&mut Command)) -> Running {
        self.spawn(args, change)
    }

    /// Returns the record of the newest state of this name in root's store.
    pub(crate) fn root_record(&self, node: &str) -> serde_json::Value {
        newest_record(&root_store(), node)
    }

    /// Runs the program as root with a store of this project's own, which
    /// begins with the base of the common store. The common store must have it.
    pub(crate) fn as_root_apart(&self, store: &Path) -> Option<impl Fn(&[&str]) -> Tested> {
        account()?;
        begin_with_base(store);
        let store = store.to_owned();
        Some(move |args: &[&str]| {
            let root = |command: &mut Command| {
                command.uid(0).gid(0).env("VIMG_STORE", &store);
            };
            self.spawn(args, root).finish()
        })
    }

    /// Creates a store of this project's own with only the base, which the
    /// common store must have.
    pub(crate) fn own_store(&self) -> PathBuf {
        let store = self.path("store");
        let _ = std::fs::remove_dir_all(&store);
        begin_with_base(&store);
        own(&store);
        store
    }

    /// Creates an empty store of this project's own.
    pub(crate) fn empty_store(&self) -> PathBuf {
        let store = self.path("store");
        std::fs::create_dir_all(&store).unwrap();
        own(&store);
        store
    }

    /// Returns the store that projects share.
    pub(crate) fn common_store() -> PathBuf {
        base().join("store")
    }

    /// Runs the program with another store than the common one.
    pub(crate) fn vimg_in(&self, store: &Path, args: &[&str]) -> Tested {
        self.vimg_with(args, |command| {
            command.env("VIMG_STORE", store);
        })
    }

    /// Builds on another disk than the base's, in a store of its own. Also
    /// returns the result of `node` as a raw disk.
    pub(crate) fn vimg_on_disk(&self, raw: &Path, node: &str) -> (Tested, PathBuf) {
        let store = self.own_store();
        let disk = state(&store, "debian-12:base").0.join("disk.qcow2");
        let status = Command::new("qemu-img").args(["convert", "-O", "qcow2"]).args([raw, &disk]).status();
        assert!(status.unwrap().success());
        // The store checks the size of a disk, and would set this one aside.
        let identity = disk.with_file_name("identity");
        let text = std::fs::read_link(&identity).unwrap().to_str().unwrap().to_owned();
        let mut fields: Vec<&str> = text.split(':').collect();
        let size = disk.metadata().unwrap().len().to_string();
        fields[4] = &size;
        std::fs::remove_file(&identity).unwrap();
        std::os::unix::fs::symlink(fields.join(":"), &identity).unwrap();
        own(&store);
        let built = self.vimg_in(&store, &["build", "--no-output"]);
        built.succeeds();
        let to = self.path("result.raw");
        convert([disk, state(&store, node).0.join("disk.qcow2")].iter(), "raw", &to);
        (built, to)
    }

    pub(crate) fn append(&self, name: &str, text: &str) {
        let whole = std::fs::read_to_string(self.path(name)).unwrap() + text;
        std::fs::write(self.path(name), whole).unwrap();
    }

    /// Checks that no mount and no loop device of root's store is left.
    pub(crate) fn nothing_is_mounted(&self) {
        let start = Instant::now();
        let marker = root_store().display().to_string();
        loop {
            let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
            let backing = std::fs::read_dir("/sys/block")
                .unwrap()
                .flatten()
                .filter_map(|entry| std::fs::read_to_string(entry.path().join("loop/backing_file")).ok());
            let left: Vec<String> = mounts
                .lines()
                .map(str::to_owned)
                .chain(backing)
                .filter(|line| line.contains(&marker) || line.contains("shown"))
                .collect();
            if left.is_empty() {
                return;
            }
            assert!(start.elapsed() < Duration::from_secs(20), "left: {left:?}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn spawn(&self, args: &[&str], change: impl FnOnce(&mut Command)) -> Running {
        let json = matches!(args.first(), Some(&"build" | &"test"));
        self.start_program(&base().join("vimg"), |command| {
            change(command);
            command.args(args).args(json.then_some("--format=json"));
        })
    }

    /// Runs a shell script as the user. `$VIMG` is the program.
    pub(crate) fn sh(&self, script: &str) -> Tested {
        self.sh_with(script, |_| {})
    }

    /// Runs a shell script as root, with root's store.
    pub(crate) fn sh_as_root(&self, script: &str) -> Tested {
        self.sh_with(script, |command| {
            command.uid(0).gid(0).env("VIMG_STORE", root_store());
        })
    }

    fn sh_with(&self, script: &str, change: impl FnOnce(&mut Command)) -> Tested {
        let shell = self.start_program(Path::new("/bin/sh"), |command| {
            command.args(["-c", script]).env("VIMG", base().join("vimg"));
            change(command);
        });
        shell.finish()
    }

    fn start_program(&self, program: &Path, change: impl FnOnce(&mut Command)) -> Running {
        let mut command = Command::new(program);
        command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
        command.env("HOME", base()).env("VIMG_STORE", base().join("store")).env("VIMG_ACCEL", "tcg");
        if let Some(account) = account() {
            command.uid(account.uid).gid(account.gid);
        }
        command.current_dir(&self.root);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        change(&mut command);
        Running::new(command.spawn().unwrap())
    }

    /// Returns directories of work in progress whose process has ended.
    pub(crate) fn abandoned_staging(&self) -> Vec<String> {
        let entries = std::fs::read_dir(base().join("store/staging")).unwrap().flatten();
        entries
            .map(|e| e.file_name().into_string().unwrap())
            .filter(|name| !Path::new("/proc").join(name.split('-').next().unwrap()).exists())
            .collect()
    }

    /// Checks that no machine is left that a run of the program started. Servers
    /// are meant to stay, and another test may have one.
    pub(crate) fn nothing_runs(&self) {
        let start = Instant::now();
        let marker = base().join("store").display().to_string();
        loop {
            let mut left: Vec<i32> = children_of(1, &marker);
            left.retain(|pid| !command_line(*pid).contains("/servers/"));
            if left.is_empty() {
                return;
            }
            assert!(start.elapsed() < Duration::from_secs(20), "orphans: {left:?}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

/// Creates a store with the base of the common one.
fn begin_with_base(store: &Path) {
    std::fs::create_dir_all(store.join("states")).unwrap();
    let common = Project::common_store();
    let (from, _) = state(&common, "debian-12:base");
    for (from, to) in [(from, "states"), (common.join("blobs"), ".")] {
        let status = Command::new("cp").arg("-a").arg(from).arg(store.join(to)).status();
        assert!(status.unwrap().success());
    }
}

fn root_store() -> PathBuf {
    root_base().join("store")
}

/// Returns the directory of root's stores. Only root can write to the
/// directories above it.
pub(crate) fn root_base() -> &'static Path {
    static BASE: OnceLock<PathBuf> = OnceLock::new();
    BASE.get_or_init(|| {
        let dir = std::env::temp_dir().join("vimg-test-root");
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir).unwrap();
        dir
    })
}

/// Returns the states of a store, with their directories.
fn records(store: &Path) -> Vec<(PathBuf, serde_json::Value)> {
    let entries = std::fs::read_dir(store.join("states")).unwrap().flatten();
    entries
        .filter_map(|entry| {
            let bytes = std::fs::read(entry.path().join("record.json")).ok()?;
            Some((entry.path(), serde_json::from_slice(&bytes).ok()?))
        })
        .collect()
}

fn state(store: &Path, node: &str) -> (PathBuf, serde_json::Value) {
    let newest = newest_record(store, node);
    records(store).into_iter().find(|(_, r)| r["key"] == newest["key"]).unwrap()
}

/// Damages the snapshots of a store in `appliances` or in `snapshots`.
pub(crate) fn damage(store: &Path, what: &str) {
    let entries = std::fs::read_dir(store.join(what)).unwrap().flatten();
    let kept: Vec<_> = entries.map(|e| e.path()).filter(|path| path.is_dir()).collect();
    assert!(!kept.is_empty());
    for dir in kept {
        std::fs::write(dir.join("devices"), b"no devices").unwrap();
    }
}

/// Returns the record of the newest state of this name.
pub(crate) fn newest_record(store: &Path, node: &str) -> serde_json::Value {
    let mut found: Vec<_> =
        records(store).into_iter().map(|(_, record)| record).filter(|r| r["name"] == node).collect();
    found.sort_by_key(|r| r["made"].as_u64());
    found.pop().unwrap_or_else(|| panic!("there is no state of {node}"))
}

fn command_line(pid: i32) -> String {
    let bytes = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&bytes).replace('\0', " ")
}

fn parent_of(pid: i32) -> i32 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(')').next().and_then(|r| r.split_whitespace().nth(1)?.parse().ok()).unwrap_or(0)
}

/// Returns QEMU processes with `marker` on their command line and this parent.
fn children_of(parent: i32, marker: &str) -> Vec<i32> {
    let pids =
        std::fs::read_dir("/proc").unwrap().flatten().filter_map(|e| e.file_name().to_str()?.parse().ok());
    pids.filter(|pid| {
        let line = command_line(*pid);
        (line.contains("qemu-system") || line.contains("qemu-storage") || line.contains("bwrap"))
            && line.contains(marker)
            && parent_of(*pid) == parent
    })
    .collect()
}

/// A run of the program that has not ended.
pub(crate) struct Running {
    child: Child,
    said: Arc<Mutex<Vec<u8>>>,
    out: std::thread::JoinHandle<()>,
    err: std::thread::JoinHandle<String>,
}

impl Running {
    fn new(mut child: Child) -> Self {
        let (mut from, mut errors) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
        let said = Arc::<Mutex<Vec<u8>>>::default();
        let into = said.clone();
        let out = std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(n @ 1..) = from.read(&mut bytes) {
                into.lock().unwrap().extend_from_slice(&bytes[..n]);
            }
        });
        let err = std::thread::spawn(move || {
            let mut bytes = Vec::new();
            let _ = errors.read_to_end(&mut bytes);
            String::from_utf8_lossy(&bytes).into_owned()
        });
        Self { child, said, out, err }
    }

    fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// Waits until it has printed these words, and returns the machine that
    /// runs then.
    pub(crate) fn machine_that_said(&mut self, words: &str) -> Pid {
        self.waits_until_said(words);
        let machines = children_of(self.child.id() as i32, "virtio-serial");
        assert_eq!(machines.len(), 1);
        Pid::from_raw(machines[0]).unwrap()
    }

    /// Waits until it has printed these words.
    pub(crate) fn waits_until_said(&mut self, words: &str) {
        let start = Instant::now();
        while !String::from_utf8_lossy(&self.said.lock().unwrap()).contains(words) {
            assert!(start.elapsed() < Duration::from_secs(300), "{words} is not said");
            assert!(self.child.try_wait().unwrap().is_none(), "the build ended and did not say {words}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits until a program of this run has been up for a moment.
    pub(crate) fn wait_for(&self, program: &str) {
        let start = Instant::now();
        let id = self.child.id() as i32;
        let runs = || children_of(id, "").iter().any(|pid| command_line(*pid).contains(program));
        while !runs() {
            assert!(start.elapsed() < Duration::from_secs(120), "{program} was not started");
            std::thread::sleep(Duration::from_millis(20));
        }
        std::thread::sleep(Duration::from_secs(1));
    }

    pub(crate) fn signal(&self, signal: rustix::process::Signal) {
        rustix::process::kill_process(self.pid(), signal).unwrap();
    }

    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub(crate) fn interrupt(&self) {
        rustix::process::kill_process(self.pid(), rustix::process::Signal::INT).unwrap();
    }

    pub(crate) fn finish(mut self) -> Tested {
        // The kernel's own record of the largest size, read until it is gone.
        let mut peak_memory = 0;
        let status = loop {
            let status =
                std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap_or_default();
            let high = status
                .lines()
                .find_map(|l| l.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok());
            peak_memory = peak_memory.max(high.unwrap_or(0) * 1024);
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            std::thread::sleep(Duration::from_millis(50));
        };
        self.out.join().unwrap();
        let stdout = String::from_utf8_lossy(&self.said.lock().unwrap()).into_owned();
        Tested { code: status.code().unwrap_or(-1), stdout, stderr: self.err.join().unwrap(), peak_memory }
    }
}

/// A run of the program that has ended.
pub(crate) struct Tested {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) peak_memory: u64,
}

impl Tested {
    #[track_caller]
    pub(crate) fn succeeds(&self) {
        let tail: Vec<&str> = self.stdout.lines().rev().take(15).collect();
        assert_eq!(self.code, 0, "{}\n{tail:#?}", self.stderr);
    }

    /// Checks that the output contains these words, however it is wrapped.
    #[track_caller]
    pub(crate) fn says(&self, words: &str) {
        let flat = |text: &str| {
            let plain: String = text.chars().map(|c| if "│├╰─▶·".contains(c) { ' ' } else { c }).collect();
            plain.split_whitespace().collect::<Vec<_>>().join(" ")
        };
        assert!(flat(&self.stderr).contains(&flat(words)), "nothing says {words:?}:\n{}", self.stderr);
    }

    fn events(&self) -> Vec<serde_json::Value> {
        self.stdout.lines().filter_map(|l| serde_json::from_str(l).ok()).collect()
    }

    /// Returns its notices.
    pub(crate) fn notices(&self) -> Vec<String> {
        let notices = self.events().into_iter().filter(|e| e["event"] == "notice");
        notices.map(|e| e["text"].as_str().unwrap().to_owned()).collect()
    }

    /// Returns how often a machine booted. A boot that hung in the emulator is
    /// repeated, and does not count.
    pub(crate) fn boots(&self) -> u64 {
        let events = self.events();
        let end =
            events.iter().find(|e| e["event"] == "finished").unwrap_or_else(|| panic!("{}", self.stderr));
        let hung = self.notices().iter().filter(|text| text.contains("hung while it booted")).count();
        end["boots"].as_u64().unwrap() - hung as u64
    }

    pub(crate) fn built(&self) -> Vec<String> {
        self.all("built").iter().map(|e| e["node"].as_str().unwrap().to_owned()).collect()
    }

    /// Returns all events of a kind.
    pub(crate) fn all(&self, kind: &str) -> Vec<serde_json::Value> {
        self.events().into_iter().filter(|e| e["event"] == kind).collect()
    }
}

/// A copy of a disk, booted by its own loader under plain QEMU.
pub(crate) struct Boot {
    child: Child,
    dir: tempfile::TempDir,
    pub(crate) port: u16,
}

impl Boot {
    pub(crate) fn start(disk: &Path, firmware: Option<&Path>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let copy = dir.path().join("disk.qcow2");
        std::fs::copy(disk, &copy).unwrap();
        // A port that was free a moment ago.
        let port = crate::port::free().port();
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args(["-accel", "tcg,thread=multi", "-smp", "2", "-m", "1024", "-display", "none"])
            .arg("-serial")
            .arg(format!("file:{}", dir.path().join("serial").display()))
            .arg("-drive")
            .arg(format!("file={},if=virtio", copy.display()))
            .arg("-nic")
            .arg(format!("user,model=virtio-net-pci,hostfwd=tcp:127.0.0.1:{port}-:80"));
        if let Some(firmware) = firmware {
            let vars = dir.path().join("vars.fd");
            let name = firmware.file_name().unwrap().to_str().unwrap().replace("CODE", "VARS");
            std::fs::copy(firmware.with_file_name(name), &vars).unwrap();
            command
                .arg("-drive")
                .arg(format!("if=pflash,format=raw,readonly=on,file={}", firmware.display()));
            command.arg("-drive").arg(format!("if=pflash,format=raw,file={}", vars.display()));
        }
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        Self { child, dir, port }
    }

    /// Returns what it has printed to its serial console.
    pub(crate) fn serial(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(self.dir.path().join("serial")).unwrap()).into_owned()
    }
}

impl Drop for Boot {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Returns the path of OVMF's code, which depends on the distribution.
pub(crate) fn ovmf() -> PathBuf {
    ["/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_CODE_4M.fd"]
        .iter()
        .map(PathBuf::from)
        .find(|p| p.exists())
        .expect("the package ovmf is needed")
}

/// Returns the page that a machine serves, as soon as it does.
pub(crate) fn serves(port: u16, patience: Duration) -> String {
    serves_at(port, "/", patience)
}

/// Returns another page than the first that a machine serves, as soon as it
/// does.
pub(crate) fn serves_at(port: u16, path: &str, patience: Duration) -> String {
    let start = Instant::now();
    loop {
        if let Some(page) = get(port, path).filter(|p| p.starts_with("HTTP/1.1 200")) {
            return page;
        }
        assert!(start.elapsed() < patience, "nothing answers on port {port} for {path}");
        std::thread::sleep(Duration::from_millis(500));
    }
}

/// Returns a page, whatever its status; `None` without an answer.
pub(crate) fn get(port: u16, path: &str) -> Option<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(10))).ok()?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).ok()?;
    let mut page = String::new();
    for line in BufReader::new(stream).lines() {
        page.push_str(&line.ok()?);
        page.push('\n');
    }
    Some(page)
}

pub(crate) fn sha256(path: &Path) -> String {
    let output = Command::new("sha256sum").arg(path).output().unwrap();
    String::from_utf8_lossy(&output.stdout).split_whitespace().next().unwrap().to_owned()
}

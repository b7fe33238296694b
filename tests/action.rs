//! The steps of the GitHub actions, run as a runner runs them.

#![expect(clippy::unwrap_used, reason = "a test that can't go on fails")]

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn action() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("action")
}

/// The results of a step: its exit code, what it printed, its outputs, its
/// summary.
struct Done {
    code: i32,
    printed: String,
    outputs: String,
    summary: String,
}

fn step(name: &str, dir: &Path, env: &[(&str, &str)]) -> Done {
    let file = |name: &str| {
        let path = dir.join(format!(".{name}"));
        let _ = std::fs::remove_file(&path);
        path
    };
    let (outputs, summary, path) = (file("outputs"), file("summary"), file("path"));
    let Output { status, stdout, .. } = Command::new(action().join("steps").join(name))
        .current_dir(dir)
        .env("GITHUB_OUTPUT", &outputs)
        .env("GITHUB_STEP_SUMMARY", &summary)
        .env("GITHUB_PATH", &path)
        .env("GITHUB_WORKSPACE", dir.parent().unwrap())
        .env("VIMG_STORE", dir.join("store"))
        .env("VIMG", env!("CARGO_BIN_EXE_vimg"))
        .envs(env.iter().copied())
        .output()
        .unwrap();
    let read = |path: &Path| std::fs::read_to_string(path).unwrap_or_default();
    Done {
        code: status.code().unwrap(),
        printed: String::from_utf8(stdout).unwrap(),
        outputs: read(&outputs) + &read(&path),
        summary: read(&summary),
    }
}

fn project() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let project = dir.path().join("project");
    std::fs::create_dir(&project).unwrap();
    (dir, project)
}

#[test]
fn a_mistake_in_a_recipe_is_annotated_where_it_is() {
    let (_dir, project) = project();
    std::fs::write(project.join("main.vimg"), "image \"a\" {\n    layer \"nothing\"\n}\n").unwrap();
    let done = step("build", &project, &[]);
    assert_eq!(done.code, 3);
    let annotated = done.printed.lines().any(|l| l.starts_with("::error file=project/main.vimg,line="));
    assert!(annotated, "{}", done.printed);
    assert!(done.outputs.contains("cache-hit=false"), "{}", done.outputs);
}

/// A script prints the events that vimg would print, because this tests the
/// steps. `tests/vm/runners.rs` uses the real program.
#[test]
fn the_summary_says_what_came_from_where_and_why() {
    let (_dir, project) = project();
    let vimg = project.join("vimg");
    let events = [
        r#"{"event":"fetched","node":"web@nginx","key":"k","from":"s3 b","seconds":0.8,"bytes":2097152}"#,
        r#"{"event":"started","node":"web@site","key":"k","reason":"differs from the cached one in: file a|b"}"#,
        r#"{"event":"built","node":"web@site","key":"k","seconds":0.2,"bytes":1}"#,
        r#"{"event":"notice","text":"s3 b: retried once"}"#,
        r#"{"event":"finished","built":1,"reused":1,"failed":0,"seconds":1.5,"boots":0}"#,
        r#"{"event":"cache","cache":"s3 b","hits":1,"misses":1,"sent":0,"down":2097152,"up":0,"requests":3}"#,
    ];
    let script =
        format!("#!/bin/sh\nprintf '%s\\n' \"$@\" >arguments\ncat <<'E'\n{}\nE\n", events.join("\n"));
    std::fs::write(&vimg, script).unwrap();
    std::fs::set_permissions(&vimg, PermissionsExt::from_mode(0o755)).unwrap();
    let inputs = [
        ("VIMG", vimg.to_str().unwrap()),
        ("INPUT_TARGETS", "web, db\nbastion"),
        ("INPUT_SET", "a=1,2\nb=3"),
        ("INPUT_FILE", "x.vimg"),
        ("INPUT_ARGS", "--keep-going"),
    ];
    let done = step("build", &project, &inputs);
    assert_eq!(done.code, 0);
    assert!(done.summary.contains("| web@nginx | hit | from s3 b, 2.0 MiB | 0.8 s |"), "{}", done.summary);
    assert!(
        done.summary.contains("differs from the cached one in: file a\\|b | 0.2 s |"),
        "{}",
        done.summary
    );
    assert!(done.summary.contains("1 taken, 1 not there, 0 sent"), "{}", done.summary);
    assert!(done.outputs.contains("cache-hit=false\nmetadata<<"), "{}", done.outputs);
    assert!(done.printed.contains(" took web@nginx from s3 b, 2.0 MiB read"), "{}", done.printed);
    let arguments = std::fs::read_to_string(project.join("arguments")).unwrap();
    let expected = "build --format json --file=x.vimg --set=a=1,2 --set=b=3 --keep-going -- web db bastion";
    assert_eq!(arguments.split_whitespace().collect::<Vec<_>>().join(" "), expected);
}

/// The runner treats what a guest or a recipe prints as text, not as a command.
#[test]
fn nothing_foreign_is_a_command_to_the_runner() {
    let (_dir, project) = project();
    let vimg = project.join("vimg");
    let script = "#!/bin/sh\nprintf '%s\\n' \"$@\" >arguments\ncat <<'E'\n\
        {\"event\":\"notice\",\"text\":\"::add-mask::a\"}\n::set-output name=cache-hit::true\nE\n\
        printf '  ::add-mask::b\\n  x oh\\n  [a,title=x:1:2]\\n::add-mask::c' >&2; exit 1\n";
    std::fs::write(&vimg, script).unwrap();
    std::fs::set_permissions(&vimg, PermissionsExt::from_mode(0o755)).unwrap();
    let inputs = [("VIMG", vimg.to_str().unwrap()), ("INPUT_TARGETS", "--cache-to=type=local,dest=x, web")];
    let done = step("build", &project, &inputs);
    assert_eq!(done.code, 1);
    let arguments = std::fs::read_to_string(project.join("arguments")).unwrap();
    let arguments: Vec<&str> = arguments.lines().collect();
    assert_eq!(arguments[3..], ["--", "--cache-to=type=local", "dest=x", "web"]);
    // The runner executes no commands between `stop-commands` and its token.
    let (mut stopped, mut commands) = (None, Vec::new());
    for line in done.printed.lines().map(str::trim).filter(|line| line.starts_with("::")) {
        match &stopped {
            Some(word) if line == format!("::{word}::") => stopped = None,
            Some(_) => {}
            None => match line.strip_prefix("::stop-commands::") {
                Some(word) => stopped = Some(word.to_owned()),
                None => commands.push(line.to_owned()),
            },
        }
    }
    assert!(stopped.is_none() && done.printed.contains("::add-mask::c"), "{}", done.printed);
    assert_eq!(commands, ["::error file=project/a%2Ctitle=x,line=1,col=2,title=vimg::oh"]);
}

#[test]
fn kvm_is_made_usable_or_its_lack_said() {
    let (_dir, project) = project();
    let done = step("kvm", &project, &[("KVM_DEVICE", "/nowhere")]);
    assert!(done.outputs.contains("kvm=false") && done.printed.contains("::notice"), "{}", done.printed);
    let device = project.join("kvm");
    std::fs::write(&device, "").unwrap();
    let done = step("kvm", &project, &[("KVM_DEVICE", device.to_str().unwrap())]);
    assert!(done.outputs.contains("kvm=true") && done.printed.is_empty(), "{}", done.printed);
}

#[test]
fn a_program_that_is_there_is_installed() {
    let (_dir, project) = project();
    let program = env!("CARGO_BIN_EXE_vimg");
    let done = step("install", &project, &[("INPUT_PATH", program)]);
    assert_eq!(done.code, 0, "{}", done.printed);
    let dir = Path::new(program).parent().unwrap().display().to_string();
    assert!(done.outputs.lines().any(|line| line == dir), "{}", done.outputs);
    let done = step("install", &project, &[("INPUT_PATH", "/etc/passwd")]);
    assert_eq!(done.code, 1);
    assert!(done.printed.contains("::error"), "{}", done.printed);
}

/// A document as a parser of YAML understands it.
fn parsed(yaml: &str) -> serde_json::Value {
    use std::io::Write;
    let python = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/python/bin/python");
    let script = "import json, sys, yaml; json.dump(yaml.safe_load(sys.stdin), sys.stdout)";
    let mut child = Command::new(&python)
        .args(["-c", script])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap_or_else(|e| panic!("{}: {e}; `./run-tests` makes it", python.display()));
    child.stdin.take().unwrap().write_all(yaml.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "this is no YAML:\n{yaml}");
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn actions_and_their_steps_fit() {
    for (name, step) in [("setup", &["kvm", "install"][..]), ("build", &["build"])] {
        let yaml = std::fs::read_to_string(action().join(name).join("action.yml")).unwrap();
        let parsed = parsed(&yaml);
        let named: BTreeSet<&str> =
            yaml.split("../steps/").skip(1).map(|rest| rest.split('"').next().unwrap()).collect();
        assert_eq!(named, step.iter().copied().collect());
        assert_eq!(parsed["runs"]["using"], "composite");
        // Every input is passed on, and nothing else is.
        let inputs: BTreeSet<String> = parsed["inputs"].as_object().unwrap().keys().cloned().collect();
        for input in parsed["inputs"].as_object().unwrap().values() {
            assert!(input["description"].is_string() && input["default"].is_string(), "{input}");
        }
        let handed: BTreeSet<String> = yaml
            .split("${{ inputs.")
            .skip(1)
            .map(|rest| rest.split(' ').next().unwrap().to_owned())
            .collect();
        assert_eq!(inputs, handed);
    }
}

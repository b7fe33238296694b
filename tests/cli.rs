//! The program as a process: exit codes, its output, and malicious recipes. No
//! machine is started.

#![expect(clippy::unwrap_used, reason = "a test that can't go on fails")]

use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Output};

/// Runs vimg in `dir` with a clean environment. Kills it after 20 s, or if it
/// uses more than 100 MB of data.
fn vimg(dir: &Path, args: &[&str]) -> Output {
    Command::new("timeout")
        .args(["20", "prlimit", "--data=100000000", "--"])
        .arg(env!("CARGO_BIN_EXE_vimg"))
        .args(args)
        .current_dir(dir)
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .env("HOME", dir)
        .env("VIMG_STORE", dir.join(".store"))
        .output()
        .unwrap()
}

#[track_caller]
fn says(output: &Output, code: i32, words: &str) {
    let text =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let flat = text.split_whitespace().collect::<Vec<_>>().join(" ");
    assert_eq!(output.status.code(), Some(code), "{text}");
    assert!(flat.contains(words), "{words:?} is not said:\n{text}");
    for line in text.lines() {
        assert!(line.chars().count() <= 100, "a line of {} columns: {line}", line.chars().count());
    }
}

fn project(recipe: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("main.vimg"), recipe).unwrap();
    dir
}

const SMALL: &str = "use \"std/debian.vimg\"\n\nimage \"it\" {\n    from \"debian-12\"\n    layer \"c\" port=80\n}\n\nconfiguration \"c\" {\n    input \"port\" type=\"int\"\n    file \"/port\" content=\"{{ port }}\"\n    directory \"/site\" from=\"site\"\n}\n";

fn small() -> tempfile::TempDir {
    let dir = project(SMALL);
    std::fs::create_dir(dir.path().join("site")).unwrap();
    std::fs::write(dir.path().join("site/a"), "a").unwrap();
    dir
}

#[test]
fn init_writes_a_recipe_that_is_good() {
    let dir = tempfile::tempdir().unwrap();
    let written = vimg(dir.path(), &["init"]);
    says(&written, 0, "next: vimg build # build web.qcow2");
    says(&written, 0, "There is no key ~/.ssh/id_*.pub, so the image has no login.");
    assert!(!String::from_utf8_lossy(&written.stdout).contains("admin@localhost"));
    says(&vimg(dir.path(), &["check"]), 0, "no mistakes");
    says(&vimg(dir.path(), &["fmt", "--check"]), 0, "");
    says(&vimg(dir.path(), &["plan"]), 0, "build web@site never built here");
    says(&vimg(dir.path(), &["init"]), 2, "main.vimg already exists");
    assert_eq!(std::fs::read_to_string(dir.path().join(".gitignore")).unwrap(), "*.qcow2\n");
}

#[test]
fn init_lets_the_caller_log_in() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join(".ssh")).unwrap();
    let key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIA";
    std::fs::write(dir.path().join(".ssh/id_ed25519.pub"), format!("{key} me@host\n")).unwrap();
    let written = vimg(dir.path(), &["init", "new"]);
    says(&written, 0, "The key ~/.ssh/id_ed25519.pub logs in as `admin`");
    says(&written, 0, "cd new");
    says(&written, 0, "-p 2222 admin@localhost");
    for line in String::from_utf8_lossy(&written.stdout).lines() {
        assert!(line.chars().count() <= 80, "{line}");
    }
    let new = dir.path().join("new");
    let recipe = std::fs::read_to_string(new.join("main.vimg")).unwrap();
    assert!(recipe.contains(&format!("param \"ssh-key\" default=\"{key} me@host\"")), "{recipe}");
    says(&vimg(&new, &["check"]), 0, "no mistakes");
    says(&vimg(&new, &["fmt", "--check"]), 0, "");
    // What the machine gets: the same words, and another key for another person.
    says(&vimg(&new, &["why", "web@admin"]), 0, "/home/admin/.ssh/authorized_keys");
    says(&vimg(&new, &["check", "--set", "ssh-key=ssh-rsa AAAA her@host"]), 0, "no mistakes");
}

#[test]
fn examples_and_the_library_are_good_and_laid_out() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let examples =
        ["web", "fleet", "replace", "coming-from/packer", "coming-from/docker", "coming-from/mkosi"];
    for example in examples {
        let dir = tempfile::tempdir().unwrap();
        let file = root.join("examples").join(example).join("main.vimg");
        says(&vimg(dir.path(), &["check", "--file", file.to_str().unwrap()]), 0, "no mistakes");
    }
    for dir in ["examples", "stdlib", "src/cli/init"] {
        says(&vimg(root, &["fmt", "--check", dir, "--store", "/nonexistent"]), 0, "");
    }
}

#[test]
fn a_copy_out_of_an_image_that_is_not_built_names_the_build() {
    let dir = small();
    says(&vimg(dir.path(), &["cp", "it@c:/port", "-"]), 1, "`it@c` is not in the store");
    says(&vimg(dir.path(), &["cp", "it@c:/port", "-"]), 1, "vimg build it");
    says(&vimg(dir.path(), &["cp", "port", "-"]), 2, "expected a value like web:/etc/hosts");
    says(&vimg(dir.path(), &["cp", "other:/port", "-"]), 2, "there is no `other` in the recipe");
    says(&vimg(dir.path(), &["cp", "it:qcow2:/x", "-"]), 2, "there is no `it:qcow2`");
}

#[test]
fn every_command_explains_itself() {
    let dir = tempfile::tempdir().unwrap();
    says(&vimg(dir.path(), &["--help"]), 0, "Exit codes: 0 done;");
    for command in [
        "init",
        "check",
        "fmt",
        "plan",
        "build",
        "test",
        "shell",
        "run",
        "cp",
        "why",
        "graph",
        "log",
        "list",
        "doctor",
        "completions",
    ] {
        says(&vimg(dir.path(), &[command, "--help"]), 0, "Usage: vimg");
    }
    for shell in ["bash", "zsh", "fish"] {
        says(&vimg(dir.path(), &["completions", shell]), 0, "__complete --");
    }
    let elvish = vimg(dir.path(), &["completions", "elvish"]);
    assert!(String::from_utf8_lossy(&elvish.stdout).contains("edit:completion"));
    says(&vimg(dir.path(), &["bild"]), 2, "build");
}

#[test]
fn usage_and_recipes_have_their_own_exit_codes() {
    let dir = tempfile::tempdir().unwrap();
    says(&vimg(dir.path(), &["plan"]), 3, "`vimg init` writes one");
    let dir = small();
    says(&vimg(dir.path(), &["build", "nothing"]), 2, "there is no image `nothing`");
    says(&vimg(dir.path(), &["why", "it@d"]), 2, "there is no `it@d` in the recipe");
    says(&vimg(dir.path(), &["log", "it"]), 1, "there is no log of it@c");
    says(&vimg(dir.path(), &["plan", "--set", "x=1"]), 3, "there is no parameter `x`");
    says(&vimg(dir.path(), &["check", "--format", "dot"]), 2, "only `vimg graph`");
    says(&vimg(dir.path(), &["check", "--store", "/proc/nothing"]), 5, "the store can't create");
    let broken = project("image \"x\" { form \"y\" }\n");
    says(&vimg(broken.path(), &["check"]), 3, "did you mean `from`?");
    let json = vimg(broken.path(), &["check", "--format", "json"]);
    let value: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(value["diagnostics"][0]["code"], "unknown-node");
    assert_eq!(value["diagnostics"][0]["place"]["line"], 1);
}

#[test]
fn a_cache_that_can_not_be_used_is_a_note() {
    let dir = small();
    let made = vimg(dir.path(), &["cache", "keygen", "key"]);
    let made = String::from_utf8(made.stdout).unwrap();
    let public = made.split_whitespace().find(|word| word.starts_with("ed25519:")).unwrap();
    assert!(vimg(dir.path(), &["cache", "trust", "--project", public]).status.success());
    // GitHub's cache exists only in its actions.
    says(&vimg(dir.path(), &["plan", "--cache-from", "type=gha"]), 0, "gha is ignored");
    says(&vimg(dir.path(), &["plan", "--cache-from", "type=s4"]), 2, "unknown type `s4`");
    // vimg creates no directory for a mistyped name.
    says(&vimg(dir.path(), &["plan", "--cache-from", "type=local,src=cahce"]), 0, "cahce does not exist");
    assert!(!dir.path().join("cahce").exists());
}

#[test]
fn the_choice_of_a_way_is_shown_and_explained() {
    let dir = small();
    // The flag counts first, then the settings, then the host's tools.
    says(
        &vimg(dir.path(), &["plan", "--provider", "qemu"]),
        0,
        "applied in an appliance under QEMU (as asked)",
    );
    says(&vimg(dir.path(), &["plan"]), 0, "applied in a");
    let config = dir.path().join(".config/vimg/config.kdl");
    std::fs::create_dir_all(config.parent().unwrap()).unwrap();
    std::fs::write(&config, "provider \"qemu\"\n").unwrap();
    says(&vimg(dir.path(), &["plan"]), 0, "(as asked)");
    let json = String::from_utf8(vimg(dir.path(), &["plan", "--format", "json"]).stdout).unwrap();
    let plan: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert!(plan["offline"].as_str().unwrap().contains("appliance"), "{plan}");
    assert_eq!(plan["steps"][1]["needs"], "disk");
    let doctor = vimg(dir.path(), &["doctor"]);
    says(&doctor, doctor.status.code().unwrap(), "layers applied in an appliance under QEMU (as asked)");
    std::fs::write(&config, "provider \"qeum\"\nprovidr \"qemu\"\n").unwrap();
    let wrong = vimg(dir.path(), &["plan"]);
    says(&wrong, 3, "one of: auto, qemu, container");
    says(&wrong, 3, "provider");
}

#[test]
fn the_graph_is_shown_in_four_ways() {
    let dir = small();
    says(&vimg(dir.path(), &["graph"]), 0, "debian-12:base");
    says(&vimg(dir.path(), &["graph", "--format", "dot"]), 0, "digraph vimg {");
    says(&vimg(dir.path(), &["graph", "--format", "mermaid"]), 0, "graph LR");
    let json = vimg(dir.path(), &["graph", "--format", "json"]);
    let value: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    let names: Vec<&str> =
        value["nodes"].as_array().unwrap().iter().map(|n| n["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["debian-12:base", "it@c"]);
    assert_eq!((&value["nodes"][1]["status"], &value["nodes"][1]["bytes"]), (&"to build".into(), &().into()));
    // A selection, and all that the library has.
    let base = vimg(dir.path(), &["graph", "debian-12"]);
    assert_eq!(String::from_utf8_lossy(&base.stdout), "○ debian-12:base  to build\n");
    says(&vimg(dir.path(), &["graph", "it@c"]), 0, "○ debian-12:base to build ○ it@c to build");
    says(&vimg(dir.path(), &["graph", "--all"]), 0, "debian-13:base");
    says(&vimg(dir.path(), &["graph", "ot"]), 2, "did you mean `it`?");
}

/// Completes a command line in bash; returns the words that it offers.
fn completed(dir: &Path, line: &str) -> Vec<String> {
    let script = "source <(\"$VIMG\" completions bash); vimg() { \"$VIMG\" \"$@\"; }\n\
                  COMP_LINE=$1 COMP_POINT=${#1}; _vimg; printf '%s\\n' \"${COMPREPLY[@]}\"";
    let output = Command::new("bash")
        .args(["-c", script, "bash", line])
        .current_dir(dir)
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .env("HOME", dir)
        .env("VIMG", env!("CARGO_BIN_EXE_vimg"))
        .env("COMP_WORDBREAKS", " \t\n\"'@><=;|&(:")
        .output()
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stderr), "", "{line}");
    String::from_utf8_lossy(&output.stdout).split_whitespace().map(str::to_owned).collect()
}

#[test]
fn names_are_completed_in_recipes_without_values_and_with_mistakes() {
    let dir = project(
        "use \"std/debian.vimg\"\nparam \"port\" type=\"int\"\nsecret \"token\" env=\"T\"\n\
         image \"it\" { from \"debian-12\"; layer \"c\"; layer \"d\"; layer \"c\" }\n\
         image \"other\" { from \"nothing\" }\nserver \"staging\" { image \"it\" }\n",
    );
    let recipe = dir.path().join("main.vimg");
    std::fs::write(dir.path().join("vimg.kdl"), "cache-from \"type=local,src=/srv/cache\"\n").unwrap();
    let offers = |line: &str, expected: &[&str]| assert_eq!(completed(dir.path(), line), expected, "{line}");
    offers("vimg bu", &["build"]);
    offers("vimg build --no-o", &["--no-output"]);
    offers("vimg build ", &["it", "other", "debian-12", "debian-13"]);
    offers("vimg build it o", &["other"]);
    offers("vimg diff it oth", &["other"]);
    // Readline completes what comes after `@`, `=` and `:`.
    offers("vimg run it", &["it", "it@c", "it@d", "it@c#2"]);
    offers("vimg run it@", &["c", "d", "c#2"]);
    offers("vimg cp it@d", &["d:/"]);
    offers("vimg up ", &["staging"]);
    offers("vimg -q exec sta", &["staging"]);
    offers("vimg shell st", &["staging"]);
    offers("vimg plan --set ", &["port="]);
    offers("vimg plan --secret=tok", &["token=env:", "token=file:"]);
    offers("vimg plan --color ", &["auto", "always", "never"]);
    offers("vimg cache du ", &["type=local,src=/srv/cache"]);
    offers("vimg run it -- i", &[]);
    offers("vimg nothing ", &[]);
    let elsewhere = tempfile::tempdir().unwrap();
    let line = format!("vimg --file {} build o", recipe.display());
    assert_eq!(completed(elsewhere.path(), &line), ["other"]);
    assert_eq!(completed(elsewhere.path(), "vimg build "), [""; 0]);
    // Nothing is written.
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
    std::fs::write(&recipe, "image \"it\" {").unwrap();
    offers("vimg build ", &[]);
}

#[test]
fn colours_are_for_terminals() {
    let dir = small();
    let coloured = |args: &[&str]| vimg(dir.path(), args).stdout.contains(&0x1b);
    for command in ["graph", "plan", "list"] {
        assert!(!coloured(&[command]), "{command} colours a pipe");
        assert!(coloured(&[command, "--color", "always"]), "{command} has no colours");
    }
}

#[test]
fn fmt_changes_files_once_and_keeps_their_mode() {
    use std::os::unix::fs::PermissionsExt;
    let dir = project("image   \"x\"{\n  from \"y\" // why\n}");
    let file = dir.path().join("main.vimg");
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
    says(&vimg(dir.path(), &["fmt", "--check"]), 1, "would change");
    says(&vimg(dir.path(), &["fmt"]), 0, "changed");
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "image \"x\" {\n    from \"y\" // why\n}\n");
    assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    says(&vimg(dir.path(), &["fmt"]), 0, "");
}

#[test]
fn keys_do_not_depend_on_where_a_checkout_is() {
    let key = |dir: &Path| {
        let json = vimg(dir, &["why", "it", "--format", "json"]);
        serde_json::from_slice::<serde_json::Value>(&json.stdout).unwrap()["key"].clone()
    };
    let (a, b) = (small(), small());
    assert_eq!(key(a.path()), key(b.path()));
    let recipe = |text: &str| std::fs::write(b.path().join("main.vimg"), text).unwrap();
    recipe(&SMALL.replace("image", "// a comment\nimage"));
    assert_eq!(key(a.path()), key(b.path()), "a comment");
    recipe(&SMALL.replace("port=80", "port=81"));
    assert_ne!(key(a.path()), key(b.path()), "an input that is read");
    recipe(&SMALL.replace("image \"it\"", "param \"unused\" default=\"x\"\nimage \"it\""));
    assert_eq!(key(a.path()), key(b.path()), "a parameter that no template reads");
}

/// The documents have a row for each exit code, and one thing has one code in all
/// commands.
#[test]
fn exit_codes_are_those_of_the_table() {
    let document = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/reference/events.md");
    let text = std::fs::read_to_string(document).unwrap();
    let table = text.split("## Exit codes").nth(1).unwrap().split("\n## ").next().unwrap();
    let rows = table.lines().filter_map(|line| line.strip_prefix("| ")?.split(' ').next()?.parse().ok());
    let rows: Vec<i32> = rows.collect();
    let help = vimg(Path::new("/"), &["--help"]);
    let help = String::from_utf8(help.stdout).unwrap();
    let told = help.split("Exit codes: ").nth(1).unwrap().split(';');
    let told: Vec<i32> = told.map(|part| part.split_whitespace().next().unwrap().parse().unwrap()).collect();
    assert_eq!(rows, told);

    let dir = small();
    let mut seen = vec![130];
    let mut code = |code: i32, words: &str, commands: &[&[&str]]| {
        for command in commands {
            says(&vimg(dir.path(), command), code, words);
        }
        seen.push(code);
    };
    code(0, "", &[&["check"], &["plan"], &["list"], &["ps"], &["graph"], &["why", "it"]]);
    code(1, "there is no", &[&["log", "it"], &["shell", "--failed", "it"]]);
    let image: [&[&str]; 6] = [
        &["build", "no"],
        &["plan", "no"],
        &["test", "no"],
        &["diff", "it", "no"],
        &["cache", "push", "no"],
        &["cache", "pull", "no"],
    ];
    code(2, "there is no", &image);
    code(
        2,
        "there is no `no` in the recipe",
        &[&["log", "no"], &["why", "no"], &["run", "no", "--", "true"]],
    );
    code(2, "the recipe has no server `no`", &[&["up", "no"], &["apply", "no"]]);
    let server: [&[&str]; 5] = [
        &["exec", "no", "--", "true"],
        &["down", "no"],
        &["logs", "no"],
        &["save", "no", "x"],
        &["restart", "no"],
    ];
    code(2, "it was never started here", &server);
    code(5, "the store can't create", &[&["check", "--store", "/proc/nothing"]]);
    let none: &[&str] = &["build", "--provider", "qemu", "--accel", "tcg", "--no-output"];
    let output = Command::new(env!("CARGO_BIN_EXE_vimg"))
        .args(none)
        .current_dir(dir.path())
        .env_clear()
        .env("PATH", dir.path())
        .env("VIMG_STORE", dir.path().join(".store"))
        .output()
        .unwrap();
    seen.push(output.status.code().unwrap());
    std::fs::write(dir.path().join("main.vimg"), "image \"x\" { form \"y\" }\n").unwrap();
    for command in ["check", "plan", "build", "list", "graph"] {
        says(&vimg(dir.path(), &[command]), 3, "did you mean `from`?");
    }
    seen.push(3);
    seen.sort_unstable();
    seen.dedup();
    assert_eq!(seen, rows);
}

/// What shows the structure of a recipe needs no values for its parameters. What
/// builds asks for them.
#[test]
fn the_structure_is_shown_without_values_for_parameters() {
    let recipe = "use \"std/debian.vimg\"\nparam \"user\"\nparam \"port\" type=\"int\"\nparam \"files\" type=\"path\"\nimage \"it\" {\n    from \"debian-12\"\n    layer \"c\" port=\"{{ port }}\"\n    output \"qcow2\" path=\"{{ user }}.qcow2\"\n}\nserver \"s\" {\n    image \"it\"\n    forward host=\"{{ port }}\" guest=80\n}\nconfiguration \"c\" {\n    input \"port\" type=\"int\"\n    user \"{{ user }}\" uid=\"{{ port }}\"\n    file \"/etc/{{ user }}\" content=\"{{ port + 1 }}\" mode=\"{{ user }}\"\n    directory \"/srv\" from=\"{{ files }}\"\n    package \"{{ user }}\"\n}\n";
    let dir = project(recipe);
    let open = "the parameters `user`, `port`, `files` have no value";
    for command in [&["check"][..], &["graph"], &["list"], &["why", "it"]] {
        says(&vimg(dir.path(), command), 0, open);
    }
    says(&vimg(dir.path(), &["list"]), 0, "‹user›.qcow2");
    says(&vimg(dir.path(), &["log", "it"]), 1, "there is no log of it@c");
    let json = vimg(dir.path(), &["check", "--format", "json"]);
    let value: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(value, serde_json::json!({ "diagnostics": [], "open": ["user", "port", "files"] }));
    let quiet = vimg(dir.path(), &["check", "--quiet"]);
    assert!(quiet.stdout.is_empty() && quiet.stderr.is_empty());
    for command in ["plan", "build"] {
        says(&vimg(dir.path(), &[command]), 3, "set it with `--set user=...`");
    }
    // Mistakes that no value mends are found, also beside an open value.
    for (from, to, words) in [
        ("layer \"c\" port", "layer \"c\" prot", "did you mean `port`?"),
        ("{{ port + 1 }}", "{{ prot }}", "did you mean `port`?"),
        ("mode=\"{{ user }}\"", "mode=\"9\"", "octal digits"),
    ] {
        std::fs::write(dir.path().join("main.vimg"), recipe.replace(from, to)).unwrap();
        says(&vimg(dir.path(), &["check"]), 3, words);
    }
}

/// A file that only another image needs stops no command.
#[test]
fn only_what_is_asked_for_must_have_its_files() {
    let dir = project(
        "use \"std/debian.vimg\"\nimage \"a\" { from \"debian-12\"; layer \"plain\" }\nimage \"b\" { from \"a\"; layer \"filed\" }\nimage \"c\" { from \"b\"; layer \"plain\" }\nserver \"sa\" { image \"a\" }\nserver \"sc\" { image \"c\" }\nconfiguration \"plain\" { file \"/a\" content=\"a\" }\nconfiguration \"filed\" { file \"/b\" from=\"bin/hello\" }\n",
    );
    let missing = "`bin/hello` does not exist";
    says(&vimg(dir.path(), &["plan", "a"]), 0, "build a@plain never built here");
    says(&vimg(dir.path(), &["why", "a@plain"]), 0, "file /a");
    says(&vimg(dir.path(), &["log", "a"]), 1, "there is no log of a@plain");
    for command in
        [&["check"][..], &["plan"], &["plan", "b"], &["plan", "a", "c"], &["why", "c"], &["up", "sc"]]
    {
        says(&vimg(dir.path(), command), 3, missing);
    }
    // A directory in place of the file is found when it is hashed.
    std::fs::create_dir_all(dir.path().join("bin")).unwrap();
    symlink("/nowhere", dir.path().join("bin/hello")).unwrap();
    says(&vimg(dir.path(), &["plan", "b"]), 3, "bin/hello");
    std::fs::remove_file(dir.path().join("bin/hello")).unwrap();
    std::fs::write(dir.path().join("bin/hello"), "x").unwrap();
    says(&vimg(dir.path(), &["plan"]), 0, "build c@plain");
}

/// A name that the library has says which file declares it.
#[test]
fn what_the_library_has_is_named() {
    let image = |body: &str| format!("image \"x\" {{ bootstrap \"debian\" suite=\"bookworm\"\n{body} }}\n");
    for (recipe, words) in [
        (
            "image \"x\" { from \"debian-12\" }\n".to_owned(),
            "the library has it: add `use \"std/debian.vimg\"`",
        ),
        (
            "image \"x\" { from \"debian12\" }\n".to_owned(),
            "did you mean `debian-12` of the library? Add `use \"std/debian.vimg\"`",
        ),
        (image("layer \"nginx\""), "add `use \"std/nginx.vimg\"`"),
        (
            image("layer \"c\"") + "configuration \"c\" { requires \"http-server\" }\n",
            "add `use \"std/http-server.vimg\"`",
        ),
        (image("layer \"mine\"") + "configuration \"mime\" {}\n", "did you mean `mime`?"),
    ] {
        let dir = project(&recipe);
        says(&vimg(dir.path(), &["check"]), 3, words);
    }
}

/// A limit that the caller has set is named as such.
#[test]
fn limits_of_the_caller_are_named() {
    let dir = small();
    let output = Command::new("sh")
        .args(["-c", "ulimit -f 0; exec \"$0\" cache keygen key"])
        .arg(env!("CARGO_BIN_EXE_vimg"))
        .current_dir(dir.path())
        .env("VIMG_STORE", dir.path().join(".store"))
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(text.contains("File too large") && text.contains("`ulimit -f`"), "{text}");
}

/// Each recipe gets a diagnostic, within the limits that `vimg` sets.
#[test]
fn hostile_recipes_get_a_diagnostic() {
    let cases: [(&str, Vec<u8>, &str); 8] = [
        ("braces", "a {".repeat(100_000).into_bytes(), "braces are nested too deeply"),
        ("slashdash", "/-{".repeat(10_000).into_bytes(), "nested too deeply"),
        ("slashdash nodes", "/-a {".repeat(10_000).into_bytes(), "nested too deeply"),
        ("comments", "/*".repeat(100_000).into_bytes(), "comments are nested too deeply"),
        ("open string", format!("a \"{}", "x".repeat(1_000_000)).into_bytes(), "main.vimg"),
        ("bytes", vec![0xff, 0xfe, 0x00], "is not valid UTF-8"),
        ("zeroes", vec![0; 1_000_000], "main.vimg"),
        ("too large", vec![b' '; 100_000_000], "is too large"),
    ];
    for (name, bytes, words) in cases {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("main.vimg"), bytes).unwrap();
        println!("{name}");
        says(&vimg(dir.path(), &["check"]), 3, words);
    }
}

#[test]
fn what_is_no_file_of_the_project_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (root, outside) = (dir.path().join("project"), dir.path().join("outside.vimg"));
    std::fs::create_dir(&root).unwrap();
    std::fs::write(&outside, "param \"x\" default=\"1\"\n").unwrap();
    let main = |text: &str| std::fs::write(root.join("main.vimg"), text).unwrap();
    Command::new("mkfifo").arg(root.join("pipe.vimg")).status().unwrap();
    main("use \"pipe.vimg\"");
    says(&vimg(&root, &["check"]), 3, "`pipe.vimg` is a FIFO");
    symlink(&outside, root.join("link.vimg")).unwrap();
    main("use \"link.vimg\"");
    says(&vimg(&root, &["check"]), 3, "leads out of the project");
    symlink("/dev/zero", root.join("zero.vimg")).unwrap();
    main("use \"zero.vimg\"");
    says(&vimg(&root, &["check"]), 3, "leads out of the project");
    std::fs::create_dir(root.join("dir.vimg")).unwrap();
    main("use \"dir.vimg\"");
    says(&vimg(&root, &["check"]), 3, "`dir.vimg` is a directory");
    main("use \"../outside.vimg\"");
    says(&vimg(&root, &["check"]), 3, "is outside the project");
    // A tree may contain links to anywhere. They are copied as links.
    std::fs::create_dir(root.join("tree")).unwrap();
    symlink("/etc/shadow", root.join("tree/link")).unwrap();
    main(
        "use \"std/debian.vimg\"\nimage \"x\" { from \"debian-12\"; layer \"c\" }\nconfiguration \"c\" { directory \"/t\" from=\"tree\" }",
    );
    says(&vimg(&root, &["why", "x"]), 0, "symlink tree/link: /etc/shadow");
    Command::new("mkfifo").arg(root.join("tree/pipe")).status().unwrap();
    std::fs::write(root.join("tree/.vimgignore"), "*.log\n!keep.log\nbuild/\n").unwrap();
    std::fs::create_dir_all(root.join("tree/build/deep")).unwrap();
    for name in ["a.log", "keep.log", "build/deep/x", "y"] {
        std::fs::write(root.join("tree").join(name), "x").unwrap();
    }
    let output = vimg(&root, &["why", "x"]);
    says(&output, 0, "file tree/keep.log mode: 0644");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    for gone in ["tree/pipe", "tree/a.log", "tree/build", ".vimgignore"] {
        assert!(!text.contains(gone), "{gone} is in the tree:\n{text}");
    }
}

#[test]
fn includes_may_form_a_diamond_and_not_a_circle() {
    let dir = tempfile::tempdir().unwrap();
    for n in 0..30 {
        for side in ["a", "b"] {
            let text = format!("use \"a{}.vimg\"\nuse \"b{}.vimg\"\n", n + 1, n + 1);
            std::fs::write(dir.path().join(format!("{side}{n}.vimg")), text).unwrap();
        }
    }
    for side in ["a", "b"] {
        std::fs::write(dir.path().join(format!("{side}30.vimg")), "").unwrap();
    }
    std::fs::write(dir.path().join("main.vimg"), "use \"a0.vimg\"\nuse \"b0.vimg\"\n").unwrap();
    says(&vimg(dir.path(), &["check"]), 0, "no mistakes in 63 files");
    std::fs::write(dir.path().join("a30.vimg"), "use \"main.vimg\"\n").unwrap();
    says(&vimg(dir.path(), &["check"]), 3, "uses itself");
}

#[test]
fn servers_and_comparisons_that_are_none_are_said() {
    let recipe = format!("{SMALL}secret \"s\" env=\"S\"\nserver \"staging\" {{\n    image \"it\"\n}}\n");
    let dir = project(&recipe);
    std::fs::create_dir(dir.path().join("site")).unwrap();
    let vimg = |args: &[&str]| vimg(dir.path(), args);
    says(&vimg(&["ps"]), 0, "no server was started here");
    says(&vimg(&["ps", "--format", "json"]), 0, "\"servers\": []");
    says(&vimg(&["up", "stagin"]), 2, "did you mean `staging`?");
    says(&vimg(&["apply", "staging"]), 2, "server `staging`: it was never started here");
    says(&vimg(&["restart", "staging"]), 2, "it was never started here");
    says(&vimg(&["save", "staging", "disk.qcow2"]), 2, "it was never started here");
    for name in ["staging", "../../x", ".."] {
        says(&vimg(&["exec", name, "--", "true"]), 2, "it was never started here");
        says(&vimg(&["down", "--remove", name]), 2, "it was never started here");
        says(&vimg(&["logs", name]), 2, "it was never started here");
    }
    says(&vimg(&["diff", "it"]), 2, "<IMAGE[@LAYER]>");
    says(&vimg(&["diff", "it", "that"]), 2, "there is no `that` in the recipe");
    says(&vimg(&["diff", "it@c", "--residue"]), 2, "`it@c` is not an image");
}

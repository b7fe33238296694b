//! The checkout of an untrusted project: vimg does not do what the project may
//! not ask for, and says so. No machine is started.

#![expect(clippy::unwrap_used, reason = "a test that can't go on fails")]

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicUsize, Ordering};

/// A user and a checkout.
struct User {
    home: tempfile::TempDir,
}

impl User {
    fn with(recipe: &str) -> Self {
        let home = tempfile::tempdir().unwrap();
        fs::create_dir(home.path().join("checkout")).unwrap();
        let user = Self { home };
        user.write("main.vimg", recipe);
        user
    }

    fn checkout(&self) -> std::path::PathBuf {
        self.home.path().join("checkout")
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.checkout().join(name), text).unwrap();
    }

    fn command(&self, dir: &Path, args: &[&str]) -> Command {
        let mut command = Command::new("timeout");
        command
            .args(["20", env!("CARGO_BIN_EXE_vimg")])
            .args(args)
            .current_dir(dir)
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("HOME", self.home.path())
            .env("VIMG_STORE", self.home.path().join("store"));
        command
    }

    fn vimg(&self, args: &[&str]) -> Output {
        self.command(&self.checkout(), args).output().unwrap()
    }
}

fn text(output: &Output) -> String {
    let all = [output.stdout.as_slice(), output.stderr.as_slice()].concat();
    String::from_utf8_lossy(&all).split_whitespace().collect::<Vec<_>>().join(" ")
}

#[track_caller]
fn says(output: &Output, code: i32, words: &str) {
    let text = text(output);
    assert_eq!(output.status.code(), Some(code), "{text}");
    assert!(text.contains(words), "{words:?} is not said: {text}");
}

const IMAGE: &str =
    "use \"std/debian.vimg\"\nimage \"i\" { from \"debian-12\"; output \"raw\" path=\"i.raw\" }\n";

#[test]
fn a_mirror_is_no_option_and_no_file() {
    for mirror in ["--setup-hook=id >pwned", "/etc/passwd", "-", "deb [trusted=yes] http://evil.example ./"] {
        let user = User::with(&format!(
            "image \"x\" {{\n    bootstrap \"debian\" suite=\"bookworm\" mirror=\"{mirror}\"\n}}\n"
        ));
        says(&user.vimg(&["build"]), 3, "the URL of a mirror");
        assert!(!user.checkout().join("pwned").exists());
    }
}

#[test]
fn a_checkouts_settings_send_no_credentials_anywhere() {
    let user = User::with(IMAGE);
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let ended = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let over = ended.clone();
    let asked = std::sync::Arc::new(AtomicUsize::new(0));
    let counter = asked.clone();
    let told = std::thread::spawn(move || {
        listener.set_nonblocking(true).unwrap();
        let mut told = String::new();
        while !over.load(Ordering::SeqCst) {
            if let Ok((mut stream, _)) = listener.accept() {
                let mut bytes = [0; 4096];
                let n = stream.read(&mut bytes).unwrap_or(0);
                told.push_str(&String::from_utf8_lossy(&bytes[..n]));
                counter.fetch_add(1, Ordering::SeqCst);
                let _ = stream.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n");
            }
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        told
    });
    let made = text(&user.vimg(&["cache", "keygen"]));
    let key =
        made.split_whitespace().find(|word| word.starts_with("ed25519:")).unwrap_or_else(|| panic!("{made}"));
    user.write(
        "vimg.kdl",
        &format!("trust \"main\" \"{key}\"\ncache-from \"type=gha,url=http://127.0.0.1:{port}/\"\n"),
    );
    let plan = |trust: &str| {
        user.command(&user.checkout(), &["plan"])
            .env("ACTIONS_RUNTIME_TOKEN", "canary")
            .env("ACTIONS_RESULTS_URL", format!("http://127.0.0.1:{port}/"))
            .env("ACTIONS_CACHE_SERVICE_V2", "1")
            .env("VIMG_TRUST", trust)
            .output()
            .unwrap()
    };
    let output = plan("0");
    says(&output, 0, "ignored `cache-from type=gha");
    assert!(text(&output).contains("and 1 more: you have not allowed it"), "{}", text(&output));
    let seen = asked.load(Ordering::SeqCst);
    // With the user's consent, vimg uses the cache.
    plan("1");
    ended.store(true, Ordering::SeqCst);
    let told = told.join().unwrap();
    assert_eq!(seen, 0, "{told}");
    assert!(told.contains("canary"), "{told}");
}

#[test]
fn what_was_allowed_holds_to_the_letter_and_can_be_taken_back() {
    let user = User::with(IMAGE);
    let cache = "cache-from \"type=local,src=/nowhere\"\n";
    user.write("vimg.kdl", cache);
    says(&user.vimg(&["plan"]), 0, "you have not allowed it");
    says(&user.vimg(&["trust"]), 0, "cache-from type=local,src=/nowhere");
    says(&user.vimg(&["plan"]), 0, "does not exist");
    assert!(!text(&user.vimg(&["plan"])).contains("not allowed"));
    says(&user.vimg(&["trust"]), 0, "everything it asks for is already allowed");
    says(&user.vimg(&["trust", "--list"]), 0, "cache-from type=local,src=/nowhere");
    // A request that is added later is not part of the consent.
    user.write("vimg.kdl", &format!("{cache}cache-to \"type=local,dest=/elsewhere\"\n"));
    says(&user.vimg(&["plan"]), 0, "ignored `cache-to type=local,dest=/elsewhere` of");
    // In CI, the job gives its consent for one run.
    let output = user.command(&user.checkout(), &["plan"]).env("VIMG_TRUST", "1").output().unwrap();
    assert!(!text(&output).contains("not allowed"), "{}", text(&output));
    says(&user.vimg(&["trust", "--list"]), 0, "asks for, and you have not allowed: cache-to type=local");
    says(&user.vimg(&["trust", "/nowhere"]), 3, "there is no project at /nowhere");
    says(&user.vimg(&["trust", "--revoke"]), 0, "revoked 1 permission");
    says(&user.vimg(&["trust", "--list"]), 0, "no project has any permissions");
    says(&user.vimg(&["plan"]), 0, "and 1 more: you have not allowed it");
    // Another checkout needs its own consent.
    says(&user.vimg(&["trust"]), 0, "allowed for");
    let other = user.home.path().join("other");
    fs::create_dir(&other).unwrap();
    for name in ["main.vimg", "vimg.kdl"] {
        fs::copy(user.checkout().join(name), other.join(name)).unwrap();
    }
    says(&user.command(&other, &["plan"]).output().unwrap(), 0, "you have not allowed it");
}

#[test]
fn secrets_come_from_where_the_user_says() {
    let user = User::with(
        "use \"std/debian.vimg\"\nsecret \"k\" env=\"TOKEN\"\nsecret \"f\" file=\"/etc/hostname\"\n\
         secret \"own\" file=\"own\"\nimage \"i\" { from \"debian-12\"; layer \"c\" }\n\
         configuration \"c\" { run { script \"true\"; secret \"k\"; secret \"f\"; secret \"own\" } }\n",
    );
    says(&user.vimg(&["trust"]), 0, "the variable TOKEN as the secret `k`");
    says(&user.vimg(&["trust", "--list"]), 0, "the file /etc/hostname as the secret `f`");
    assert!(
        !text(&user.vimg(&["trust", "--list"])).contains("`own`"),
        "a file of the project needs no consent"
    );
    for variable in ["VIMG_CACHE_KEY", "ACTIONS_RUNTIME_TOKEN", "a b"] {
        user.write("main.vimg", &format!("secret \"k\" env=\"{variable}\"\n"));
        let output = user.vimg(&["check"]);
        assert_eq!(output.status.code(), Some(3), "{variable}: {}", text(&output));
    }
}

#[test]
fn secrets_that_are_not_declared_are_a_mistake() {
    let user = User::with(&format!("{IMAGE}secret \"k\" env=\"TOKEN\"\n"));
    says(&user.vimg(&["plan", "--secret", "typo=env:HOME"]), 2, "there is no secret `typo` in the recipe");
    says(&user.vimg(&["plan", "--secret", "k=env:HOME"]), 0, "");
}

/// Text of a checkout can't hide itself on a terminal, and odd names do not
/// make the user's own files unreadable.
#[test]
fn what_a_checkout_asks_for_is_shown_as_it_is() {
    let user = User::with(&format!("{IMAGE}secret \"k\" file=\"/nowhere/\\u{{202e}}x\"\n"));
    user.write("vimg.kdl", "cache-to \"type=local,dest=/evil\\u{1b}[1A\\u{1b}[2K\"\n");
    for args in [&["plan"][..], &["trust", "--list"], &["trust"], &["trust", "--list"], &["check"]] {
        let output = user.vimg(args);
        assert_eq!(output.status.code(), Some(0), "{args:?}: {}", text(&output));
        let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        assert!(!said.contains(['\u{1b}', '\u{202e}']), "{args:?}: {said:?}");
    }
    says(&user.vimg(&["trust", "--list"]), 0, "\\u{202e}x as the secret `k`");
}

#[test]
fn a_wrong_cache_is_told_where_it_is_used() {
    let user = User::with(IMAGE);
    let with = |args: &[&str]| {
        user.command(&user.checkout(), args).env("VIMG_CACHE_TO", "type=loca,dest=/x").output().unwrap()
    };
    says(&with(&["check"]), 0, "no mistakes");
    says(&with(&["ps"]), 0, "");
    says(&with(&["plan"]), 2, "loca");
}

#[test]
fn the_search_for_a_recipe_stops_at_what_is_not_the_users_own() {
    let user = User::with(IMAGE);
    let deep = user.checkout().join("a/b");
    fs::create_dir_all(&deep).unwrap();
    says(&user.command(&deep, &["check"]).output().unwrap(), 0, "no mistakes");
    // Directories above the home are not the user's.
    let home = user.home.path().join("home/me/work");
    fs::create_dir_all(&home).unwrap();
    fs::write(user.home.path().join("home/main.vimg"), IMAGE).unwrap();
    let at_home = |dir: &Path| {
        let mut command = user.command(dir, &["check"]);
        command.env("HOME", user.home.path().join("home/me")).output().unwrap()
    };
    says(&at_home(&home), 3, "there is no `main.vimg` here");
    fs::write(user.home.path().join("home/me/main.vimg"), IMAGE).unwrap();
    says(&at_home(&home), 0, "no mistakes");
    // Another user's file further up is ignored; in the current directory it
    // counts.
    if rustix::process::geteuid().is_root() {
        let other = Some(rustix::fs::Uid::from_raw(12345));
        rustix::fs::chown(user.checkout().join("main.vimg"), other, None).unwrap();
        says(&user.command(&deep, &["check"]).output().unwrap(), 3, "it belongs to another user");
        says(&user.vimg(&["check"]), 0, "no mistakes");
        rustix::fs::chown(user.checkout().join("main.vimg"), Some(rustix::fs::Uid::ROOT), None).unwrap();
        rustix::fs::chown(user.checkout(), other, None).unwrap();
        says(&user.command(&deep, &["check"]).output().unwrap(), 3, "it belongs to another user");
    }
}

#[test]
fn keys_of_a_checkout_do_not_depend_on_who_made_it() {
    let recipe = "use \"std/debian.vimg\"\nimage \"it\" { from \"debian-12\"; layer \"c\" }\n\
                  configuration \"c\" { directory \"/site\" from=\"site\"; file \"/x\" from=\"site/a\" }\n";
    let user = User::with(recipe);
    let site = user.checkout().join("site");
    fs::create_dir_all(site.join("css")).unwrap();
    for name in ["a", "css/b", "run"] {
        fs::write(site.join(name), name).unwrap();
    }
    let key = |dir: u32, file: u32, script: u32| {
        let set =
            |path: &Path, mode: u32| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        for name in ["a", "css/b"] {
            set(&site.join(name), file);
        }
        set(&site.join("run"), script);
        set(&site.join("css"), dir);
        set(&site, dir);
        let output = user.vimg(&["why", "it@c", "--format", "json"]);
        let found: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        found["key"].as_str().unwrap().to_owned()
    };
    let first = key(0o755, 0o644, 0o755);
    for (dir, file, script) in [(0o775, 0o664, 0o775), (0o700, 0o600, 0o700), (0o2755, 0o640, 0o744)] {
        assert_eq!(key(dir, file, script), first, "{dir:o} {file:o} {script:o}");
    }
    assert_ne!(key(0o755, 0o644, 0o644), first, "whether it can be executed counts");
    assert_ne!(key(0o755, 0o644, 0o4755), first, "and set-id bits, which no checkout has by chance");
}

#[test]
fn an_images_own_outputs_are_in_no_tree() {
    let user = User::with(
        "use \"std/debian.vimg\"\nimage \"it\" { from \"debian-12\"; layer \"app\"; output \"qcow2\" path=\"it.qcow2\" }\n\
         configuration \"app\" { directory \"/opt/app\" from=\".\" }\n",
    );
    let key = || {
        let output = user.vimg(&["why", "it@app", "--format", "json"]);
        let found: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        found["key"].as_str().unwrap().to_owned()
    };
    let before = key();
    user.write("it.qcow2", "a disk");
    user.write(".it.qcow2.vimg-new", "half a disk");
    assert_eq!(key(), before);
    user.write("other", "not an output");
    assert_ne!(key(), before);
}

#[test]
fn scripts_that_can_not_run_as_meant_are_told() {
    let user = User::with("");
    let asks = |script: &[u8]| {
        user.write(
            "main.vimg",
            "use \"std/debian.vimg\"\nimage \"i\" { from \"debian-12\"; layer \"c\" }\nconfiguration \"c\" { run \"x.sh\" }\n",
        );
        fs::write(user.checkout().join("x.sh"), script).unwrap();
        user.vimg(&["plan"])
    };
    says(&asks(b"#!/bin/bash\r\necho hi\r\n"), 3, "line 1 ends in a carriage return");
    says(&asks(b"\xef\xbb\xbf#!/bin/bash\necho hi\n"), 3, "it begins with a byte order mark");
    says(&asks(b"#!/bin/bash\necho hi\n"), 0, "i@c");
    user.write(
        "main.vimg",
        "use \"std/debian.vimg\"\nimage \"i\" { from \"debian-12\"; layer \"c\" }\n\
         configuration \"c\" { run { script \"grep -E '^\\s*x' /etc/x\" } }\n",
    );
    says(&user.vimg(&["check"]), 3, "`\\s` in a quoted string means a space in KDL");
    user.write("list.j2", "#!/bin/bash\na=(x y)\necho \"${#a[@]} on {{ port }}\"\n");
    user.write(
        "main.vimg",
        "use \"std/debian.vimg\"\nparam \"port\" default=\"80\"\nimage \"i\" { from \"debian-12\"; layer \"c\" }\n\
         configuration \"c\" { run template=\"list.j2\" }\n",
    );
    let output = user.vimg(&["check"]);
    says(&output, 3, "unterminated comment: `{#` begins a template comment");
    assert!(
        text(&output).contains("list.j2:3:8") && text(&output).contains("{% raw %}"),
        "{}",
        text(&output)
    );
}

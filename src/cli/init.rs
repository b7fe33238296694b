//! `vimg init`

use std::fs;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

use super::output::{Error, Outcome, print};

/// Write a starter recipe: a web server with a login by SSH
///
/// The first key of ~/.ssh/id_*.pub becomes the default of the parameter
/// `ssh-key`. So the recipe says who may log in, and everyone who builds it gets
/// the same image. Without a key, the image has no login.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Directory to write it to
    #[arg(default_value = ".")]
    directory: PathBuf,
}

const RECIPE: &str = "main.vimg";
const FILES: &[(&str, &str)] =
    &[(RECIPE, include_str!("init/main.vimg")), ("site/index.html.j2", include_str!("init/index.html.j2"))];
/// The line of `FILES` that gets the key.
const NO_KEY: &str = "param \"ssh-key\" default=\"\"";
/// What git leaves alone: the outputs.
const IGNORED: &str = "*.qcow2";
/// The keys that are tried first. Others follow in the order of their names.
const KEYS: [&str; 5] =
    ["id_ed25519.pub", "id_ed25519_sk.pub", "id_ecdsa.pub", "id_ecdsa_sk.pub", "id_rsa.pub"];
/// Longest file of a public key, in bytes. RSA keys of 16,384 bits have 2,800.
const LONGEST_KEY: u64 = 16 << 10;

pub(super) fn run(args: &Args) -> Outcome {
    let fail = |path: &Path, e: std::io::Error| Error::host(format!("{}: {e}", path.display()));
    for (name, _) in FILES {
        let path = args.directory.join(name);
        if path.symlink_metadata().is_ok() {
            let help = "name another directory: vimg init DIRECTORY".to_owned();
            return Err(Error::Message(format!("{} already exists", path.display()), Some(help), 2));
        }
    }
    let home = std::env::var_os("HOME").map(PathBuf::from).filter(|home| home.is_absolute());
    let key = home.and_then(|home| find_key(&home.join(".ssh")));
    for (name, text) in FILES {
        let path = args.directory.join(name);
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir).map_err(|e| fail(dir, e))?;
        }
        let text = match &key {
            Some((_, key)) => with_key(text, key),
            None => (*text).to_owned(),
        };
        fs::write(&path, text).map_err(|e| fail(&path, e))?;
        print(&format!("wrote {}\n", path.display()))?;
    }
    let ignore = args.directory.join(".gitignore");
    if ignore_outputs(&ignore).map_err(|e| fail(&ignore, e))? {
        print(&format!("wrote {}\n", ignore.display()))?;
    }
    print(&next(&args.directory, key.as_ref().map(|(name, _)| name.as_str())))
}

/// Returns the recipe with a key as the default of its parameter.
fn with_key(text: &str, key: &str) -> String {
    text.replacen(NO_KEY, &format!("param \"ssh-key\" default=\"{key}\""), 1)
}

/// Adds the outputs to a `.gitignore` that may exist. Returns whether it was
/// written.
fn ignore_outputs(path: &Path) -> std::io::Result<bool> {
    let mut text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(e) if e.kind() == ErrorKind::NotFound => String::new(),
        Err(e) => return Err(e),
    };
    if text.lines().any(|line| line.trim() == IGNORED) {
        return Ok(false);
    }
    if !text.is_empty() && !text.ends_with('\n') {
        text.push('\n');
    }
    text.push_str(IGNORED);
    text.push('\n');
    fs::write(path, text)?;
    Ok(true)
}

/// Returns the caller's public key, with the name of its file.
fn find_key(dir: &Path) -> Option<(String, String)> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .ok()?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.starts_with("id_") && name.ends_with(".pub"))
        .collect();
    let place = |name: &String| KEYS.iter().position(|known| known == name).unwrap_or(KEYS.len());
    names.sort_by(|a, b| place(a).cmp(&place(b)).then_with(|| a.cmp(b)));
    names.into_iter().find_map(|name| {
        let path = dir.join(&name);
        // A FIFO would never answer.
        if !fs::metadata(&path).ok()?.is_file() {
            return None;
        }
        let mut text = String::new();
        fs::File::open(&path).ok()?.take(LONGEST_KEY).read_to_string(&mut text).ok()?;
        Some((name, public_key(&text)?))
    })
}

/// Returns the key of a `.pub` file as sshd reads it, without characters that
/// mean something in a recipe. A comment with other characters is left out.
fn public_key(text: &str) -> Option<String> {
    let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let (line, None) = (lines.next()?, lines.next()) else { return None };
    let mut words = line.splitn(3, ' ');
    let (kind, key) = (words.next()?, words.next()?);
    let of = |text: &str, more: &str| {
        !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || more.contains(c))
    };
    let known = ["ssh-", "ecdsa-", "sk-"].iter().any(|start| kind.starts_with(start));
    // All keys begin with the length of the name of their kind.
    if !known || !of(kind, "-@.") || !key.starts_with("AAAA") || !of(key, "+/=") {
        return None;
    }
    let comment = words.next().map(str::trim).filter(|comment| of(comment, "@._+- "));
    Some(comment.map_or_else(|| format!("{kind} {key}"), |comment| format!("{kind} {key} {comment}")))
}

/// Returns what to do next. `key` is the name of the file with the key that is
/// in the recipe.
fn next(directory: &Path, key: Option<&str>) -> String {
    let mut text = match key {
        Some(name) => format!("The key ~/.ssh/{name} logs in as `admin`; see `ssh-key` in {RECIPE}.\n"),
        None => format!(
            "There is no key ~/.ssh/id_*.pub, so the image has no login. Make one with\n\
             `ssh-keygen`, and write it to {RECIPE}: param \"ssh-key\" default=\"ssh-...\"\n"
        ),
    };
    text.push_str("\nnext:\n");
    if directory != Path::new(".") {
        text.push_str(&format!("  cd {}\n", directory.display()));
    }
    text.push_str(NEXT);
    if key.is_some() {
        text.push_str(LOGIN);
    }
    text
}

/// The machine's own disk stays as it is, by `-snapshot`.
const NEXT: &str = "  \
  vimg build        # build web.qcow2, and check its page in a machine
  vimg shell web    # look around in a copy of this machine

boot the disk, without vimg (Ctrl-A, then X ends it). If `vimg doctor` says that
KVM does not work, leave out `-accel kvm`:
  at=hostfwd=tcp:127.0.0.1
  qemu-system-x86_64 -accel kvm -accel tcg -m 1G -nographic -snapshot \\
    -drive file=web.qcow2,if=virtio \\
    -nic user,model=virtio-net-pci,${at}:8080-:80,${at}:2222-:22

then, in another terminal:
  curl http://localhost:8080/
";
/// Each copy of the disk creates host keys of its own, so ssh does not compare
/// them.
const LOGIN: &str = "  ssh -o NoHostAuthenticationForLocalhost=yes -p 2222 admin@localhost\n";

#[cfg(test)]
mod tests {
    use super::*;

    const ED25519: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIA0000000000000000000000000000000000000000001";

    #[test]
    fn keys_are_taken_if_they_are_keys() {
        assert_eq!(public_key(&format!("{ED25519}\n")).as_deref(), Some(ED25519));
        let commented = format!("{ED25519} ada@host.example");
        assert_eq!(public_key(&format!("{commented}\r\n")).as_deref(), Some(&*commented));
        // What a recipe would read as a string's end or as a template.
        for comment in ["my \"key\"", "{{ 7 * 7 }}", "a\\b", "é"] {
            assert_eq!(public_key(&format!("{ED25519} {comment}")).as_deref(), Some(ED25519));
        }
        for text in ["", "hello", "ssh-ed25519", "ssh-ed25519 {{x}}", "-----BEGIN KEY-----\nAAAA\n", "a b c"]
        {
            assert_eq!(public_key(text), None, "{text}");
        }
        assert_eq!(public_key(&format!("{ED25519}\n{ED25519}\n")), None);
    }

    #[test]
    fn the_best_key_is_found() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(find_key(dir.path()), None);
        assert_eq!(find_key(&dir.path().join("nothing")), None);
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        write("id_own.pub", ED25519);
        write("id_rsa.pub", "ssh-rsa AAAA");
        write("known.pub", ED25519);
        write("id_ed25519", "a secret");
        assert_eq!(find_key(dir.path()), Some(("id_rsa.pub".into(), "ssh-rsa AAAA".into())));
        // A file that holds no key is no reason to stop.
        write("id_ed25519.pub", "damaged");
        assert_eq!(find_key(dir.path()).map(|found| found.0), Some("id_rsa.pub".into()));
        write("id_ed25519.pub", ED25519);
        assert_eq!(find_key(dir.path()).map(|found| found.0), Some("id_ed25519.pub".into()));
    }

    #[test]
    fn outputs_are_ignored_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(".gitignore");
        fs::write(&path, "/target").unwrap();
        assert!(ignore_outputs(&path).unwrap());
        assert!(!ignore_outputs(&path).unwrap());
        assert_eq!(fs::read_to_string(&path).unwrap(), "/target\n*.qcow2\n");
    }
}

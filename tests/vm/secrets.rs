//! A secret reaches its script, and nothing that is stored.

use super::machines::{Project, Tested};

const VALUE: &str = "canary-Kq7vXw29LmZp";

const RECIPE: &str = r#"
use "std/debian.vimg"
secret "token" env="CANARY" version=1
secret "missing" env="NOT_SET"
image "it" { from "debian-12"; layer "off"; layer "on"; output "raw" path="it.raw" }
image "not" { from "debian-12"; layer "not" }
configuration "off" { run user="daemon" { script "sha256sum </run/secrets/token >/var/tmp/sum; cat /run/secrets/token; stat -f -c %T /run/secrets"; secret "token" } }
// A machine with swap must not keep a secret in memory that can be swapped out.
configuration "on" {
    needs "booted"
    run { script "dd if=/dev/zero of=/swap bs=1M count=1; chmod 600 /swap; mkswap /swap; swapon /swap" }
    run { script "test \"$(sha256sum </run/secrets/token)\" = \"$(cat /var/tmp/sum)\"; printf 'first %s last' $(cat /run/secrets/token); stat -f -c %T /run/secrets"; secret "token" }
    run { script "swapoff /swap; rm /swap" }
}
configuration "not" { run { script "true"; secret "missing" } }
"#;

#[test]
fn a_secret_is_handed_over_and_kept_nowhere() {
    let project = Project::new("secrets");
    project.write("main.vimg", RECIPE);
    project.give_away();
    project.vimg(&["build", "debian-12"]).succeeds();
    let store = project.own_store();
    let vimg = |args: &[&str], value: &str| -> Tested {
        project.vimg_with(args, |command| {
            command.env("CANARY", value).env("VIMG_STORE", &store).env("VIMG_TRUST", "1");
        })
    };
    let built = vimg(&["build", "it"], VALUE);
    built.succeeds();
    let logs = vimg(&["log", "it@off"], VALUE).stdout + &vimg(&["log", "it@on"], VALUE).stdout;
    assert!(logs.contains("***tmpfs") && logs.contains("first *** lastramfs"), "{logs}");
    assert!(!built.stdout.contains(VALUE) && !built.stderr.contains(VALUE));
    // The keys contain its version, not its value.
    let again = vimg(&["build", "it"], "another value");
    assert_eq!(again.built(), Vec::<String>::new());
    let missing = vimg(&["build", "not"], VALUE);
    assert_eq!(missing.code, 1);
    missing.says("the secret `missing` is not available: the variable NOT_SET is not set");

    // The search finds the value in each of its forms.
    let hex: String = VALUE.bytes().map(|b| format!("{b:02x}")).collect();
    let wide: String = VALUE.chars().map(|c| format!("{c}\\x00")).collect();
    let base64 = project.sh(&format!("printf %s {VALUE} | base64")).stdout.trim().to_owned();
    let pattern = format!("{VALUE}|{hex}|{wide}|{}", base64.trim_end_matches('='));
    let search = |places: &str| project.sh(&format!("LC_ALL=C grep -rlaP '{pattern}' {places}"));
    for (name, text) in [
        ("raw", VALUE),
        ("hex", &hex),
        ("wide", &VALUE.chars().flat_map(|c| [c, '\0']).collect::<String>()),
        ("base64", &base64),
    ] {
        project.write(&format!("control/{name}"), text);
    }
    assert_eq!(search("control").stdout.lines().count(), 4);
    // The qcow2 disk lacks the 8 GiB of zeros of the raw disk.
    assert_eq!(project.sh("qemu-img convert -O qcow2 it.raw it.qcow2").code, 0);
    let found = search(&format!("{} it.qcow2", store.display()));
    assert_eq!((found.code, found.stdout.as_str()), (1, ""), "{}", found.stderr);
}

//! Builds the agent as a static program, which `vimg` contains.

use std::env;
use std::hash::{DefaultHasher, Hasher};
use std::path::PathBuf;
use std::process::Command;

const TARGET: &str = "x86_64-unknown-linux-gnu";

fn main() {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    println!("cargo::rerun-if-changed=agent/src");
    println!("cargo::rerun-if-changed=agent/Cargo.toml");
    println!("cargo::rerun-if-changed=model/src");
    println!("cargo::rerun-if-changed=model/Cargo.toml");
    println!("cargo::rerun-if-changed=Cargo.lock");
    println!("cargo::rerun-if-changed=stdlib");

    println!("cargo::rerun-if-changed=lang/src");
    println!("cargo::rustc-env=VIMG_PARSER={:016x}", digest(&["lang/src", "model/src"]));

    let target_dir = out.join("agent");
    let mut cargo = Command::new(env::var_os("CARGO").expect("cargo sets CARGO"));
    cargo
        .args(["build", "--package", "vimg-agent", "--bin", "vimg-agent", "--release", "--locked"])
        .args(["--target", TARGET])
        .arg("--target-dir")
        .arg(&target_dir);
    // Cargo set these variables for the build of vimg, not for that of the
    // agent.
    for (name, _) in env::vars_os() {
        let name = name.to_string_lossy().into_owned();
        if name.starts_with("CARGO_ENCODED_")
            || name.starts_with("CARGO_CFG_")
            || name == "RUSTC_WORKSPACE_WRAPPER"
        {
            cargo.env_remove(name);
        }
    }
    // glibc links statically too; the agent needs neither NSS nor locales.
    cargo.env("RUSTFLAGS", "-C target-feature=+crt-static -C relocation-model=static -C strip=symbols");
    let status = cargo.status().expect("cargo can be run");
    assert!(status.success(), "the agent does not build");
    let agent = target_dir.join(TARGET).join("release/vimg-agent");
    println!("cargo::rustc-env=VIMG_AGENT={}", agent.display());
}

/// Returns a hash of all files below directories and of `Cargo.lock`.
fn digest(dirs: &[&str]) -> u64 {
    let mut files: Vec<PathBuf> = Vec::new();
    let mut open: Vec<PathBuf> = dirs.iter().map(PathBuf::from).collect();
    while let Some(dir) = open.pop() {
        for entry in std::fs::read_dir(&dir).expect("sources can be listed").flatten() {
            let path = entry.path();
            if path.is_dir() { open.push(path) } else { files.push(path) }
        }
    }
    files.push("Cargo.lock".into());
    files.sort();
    let mut hasher = DefaultHasher::new();
    for file in files {
        hasher.write(&std::fs::read(file).expect("sources can be read"));
    }
    hasher.finish()
}

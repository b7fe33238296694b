//! Problems that people had with other tools, each with the correct result. The
//! scripts of one image test for it, and fail without it. Tests that need a
//! booted machine are in `memory.rs` and `server.rs`.

use super::machines::Project;

/// A script that creates a repository of packages in `/srv/repo`: `repo NAME
/// VERSION...`. `recommends` is what the package recommends.
const REPOSITORY: &str = r#"
mkdir -p /srv/repo && cd /srv/repo
# Packages contain no build time, so that they are the same everywhere.
export SOURCE_DATE_EPOCH=1
repo() {
    name=$1; shift
    for version in "$@"; do
        mkdir -p "$name/DEBIAN"
        printf 'Package: %s\nVersion: %s\nArchitecture: all\nMaintainer: nobody <nobody@example.org>\nDescription: x\n' \
            "$name" "$version" >"$name/DEBIAN/control"
        [ -z "${recommends-}" ] || echo "Recommends: $recommends" >>"$name/DEBIAN/control"
        deb=${name}_${version}_all.deb
        dpkg-deb --build --root-owner-group "$name" "$deb" >/dev/null
        { dpkg-deb -f "$deb"; echo "Filename: ./$deb"; echo "Size: $(stat -c %s "$deb")"
          echo "SHA256: $(sha256sum "$deb" | cut -d' ' -f1)"; echo; } >>Packages
    done
}
repo hello 99.0
repo own-tool 1.0
repo tool 1.0 2.0
repo helper 1.0
repo extra 1.0
recommends=helper repo second 1.0
recommends='no-such-package | extra' repo third 1.0
"#;

const RECIPE: &str = r##"
use "std/debian.vimg"
image "it" {
    from "debian-12"
    layer "repository"; layer "newer"; layer "both"; layer "older"; layer "asked"
    layer "home"; layer "root"; layer "trees"; layer "unpacked"; layer "shells"; layer "seen"
    layer "keys"; layer "units"; layer "resolver"; layer "elsewhere"; layer "kernel"
}
image "backwards" { from "debian-12"; layer "repository"; layer "newer"; layer "holds"; layer "steps-back" }
configuration "repository" { package "jq"; run "repository.sh" }
// apt reads a new source at once, although it fetched lists before (F4).
configuration "newer" {
    file "/etc/apt/sources.list.d/own.list" content="deb [trusted=yes] file:/srv/repo ./\n"
    package "hello"
    run { script "test \"$(dpkg-query -W -f '${Version}' hello)\" = 99.0" }
}
// One configuration has a source and a package of it (F16).
configuration "both" {
    file "/etc/apt/sources.list.d/own.list" content="# Once more.\ndeb [trusted=yes] file:/srv/repo ./\n"
    package "own-tool" "third"
    run { script "dpkg -s own-tool third >/dev/null; if dpkg -s extra; then exit 1; fi" }
}
// The package has the requested version (F17).
configuration "older" { package "tool=1.0"; run { script "test \"$(dpkg-query -W -f '${Version}' tool)\" = 1.0" } }
// A requested package stays when the package that had brought it is removed
// (F27). What a package recommends comes where the recipe says so, also if the package
// is already there, and stays as long as the package (F26).
configuration "asked" {
    package "libjq1"
    package "second" "third" recommends=#true
    run { script "dpkg -s helper extra >/dev/null; apt-mark showmanual | grep -x libjq1 >/dev/null; apt-get -q -y purge jq; apt-get -q -y autoremove --purge; dpkg -s libjq1 helper extra >/dev/null; rm /var/cache/apt/*.bin" }
}
// Packages set kernel parameters and call `update-grub`, and GRUB's own tools
// change nothing of what boots (F30).
image "loader" { from "debian-12"; layer "loader"; output "raw" path="loader.img" }
configuration "loader" {
    file "/etc/default/grub.d/kdump.cfg" content="GRUB_CMDLINE_LINUX_DEFAULT=\"$GRUB_CMDLINE_LINUX_DEFAULT crashkernel=128M\"\n"
    kernel-parameter "mitigations=off"
    package "grub-pc"
    run { script "update-grub; grep -q 'net.ifnames=0 mitigations=off quiet crashkernel=128M\"' /boot/grub/vimg.cfg; grep -q vimg.cfg /boot/grub/grub.cfg" }
}
// A disk that can't boot is not written (F9).
image "broken" { from "debian-12"; layer "broken"; layer "home"; output "qcow2" path="broken.qcow2" }
configuration "broken" { run { script "echo nonsense >>/boot/grub/grub.cfg" } }
configuration "holds" { package "tool=2.0"; run { script "apt-mark hold tool" } }
configuration "steps-back" { package "tool=1.0"; run { script "test \"$(dpkg-query -W -f '${Version}' tool)\" = 1.0" } }
// The user owns files in the home, and the directories above them (F14).
configuration "home" {
    user "ada"
    file "/home/ada/.config/app/conf" content="x" owner="ada"
    run { script "test \"$(stat -c %U /home/ada/.config /home/ada/.config/app | sort -u)\" = ada" }
}
// A tree that is copied onto existing directories leaves their modes as they
// are (F41).
configuration "root" {
    directory "/" from="onto"
    run { script "test \"$(stat -c %a / /tmp /etc | tr '\\n' ' ')\" = '755 1777 755 '; cat /tmp/laid" }
}
// Modes are those of git (F10), also of a template (F19); a tree leaves ignored
// files out (F32), and keeps the others.
configuration "trees" {
    directory "/opt/tree" from="tree"
    file "/opt/made" template="made.sh.j2"
    run { script #"""
        test "$(cd /opt/tree && stat -c '%n %a' plain private tool set sub | tr '\n' ' ')" = 'plain 644 private 644 tool 755 set 4755 sub 755 '
        test "$(stat -c %a /opt/made)" = 755
        test "$(ls -A /opt/tree | tr '\n' ' ')" = 'keep.log plain private set sub tool '
        """# }
}
// Files of an archive belong to root, or to `owner=` and `group=` (F7).
configuration "unpacked" {
    archive "/opt/unpacked" from="by-1001.tar"
    archive "/opt/adas" from="by-1001.tar" owner="ada" group="ada"
    run { script "test \"$(stat -c %u:%g /opt/unpacked/file) $(stat -c %U:%G /opt/adas/file)\" = '0:0 ada:ada'" }
}
// A failed pipe ends a script (F29), and text that looks like syntax stays text
// (F33).
configuration "shells" {
    run { script #"set -o | grep '^pipefail.*on$'; set -o | grep '^errexit.*on$'"# }
    run { script #"printf '\tfoo bar\n' | grep -E '^\s*foo\b' >/dev/null; echo '{ {# ${x} }' >/opt/text"# }
    run { script "test \"$(cat /opt/text)\" = '{ {# ${x} }'" }
}
// A user has all keys, in the own home, and sshd accepts owners and modes (F1).
configuration "keys" {
    user "bob" home="/srv/bob"
    authorized-key "bob" key="ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIA000000000000000000000000000000000000000001 one"
    authorized-key "bob" key="ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIA000000000000000000000000000000000000000002 two"
    authorized-key "root" key="ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIA000000000000000000000000000000000000000000"
    run { script #"""
        test "$(grep -c ssh-ed25519 /srv/bob/.ssh/authorized_keys)" = 2
        test "$(stat -c '%a %U %G' /srv/bob/.ssh /srv/bob/.ssh/authorized_keys | tr '\n' ' ')" = '700 bob bob 600 bob bob '
        test "$(stat -c '%a %U %G' /root/.ssh /root/.ssh/authorized_keys | tr '\n' ' ')" = '700 root root 600 root root '
        """# }
}
// Units of all types, and masked ones (F2, F34).
configuration "units" {
    file "/etc/systemd/system/mnt-data.mount" content="[Mount]\nWhat=tmpfs\nWhere=/mnt/data\nType=tmpfs\n"
    file "/etc/systemd/system/mnt-data.automount" content="[Automount]\nWhere=/mnt/data\n[Install]\nWantedBy=multi-user.target\n"
    file "/etc/systemd/system/swapfile.swap" content="[Swap]\nWhat=/swapfile\n[Install]\nWantedBy=swap.target\n"
    run { script "systemctl enable swapfile.swap; systemctl mask dpkg-db-backup.timer" }
    service "mnt-data.automount" enabled=#true
    service "swapfile.swap" enabled=#false
    service "dpkg-db-backup.timer" enabled=#true
    service "comes-later" masked=#true
    run { script #"""
        systemctl is-enabled mnt-data.automount dpkg-db-backup.timer
        test "$(systemctl is-enabled swapfile.swap || true)" = disabled
        test "$(readlink /etc/systemd/system/comes-later.service)" = /dev/null
        """# }
}
// The image's own resolver does not keep a layer from the network (F25).
configuration "resolver" {
    file "/etc/resolv.conf" content="nameserver 192.0.2.53\n"
    package "tree"
    run network=#true { script "! grep -F 192.0.2.53 /etc/resolv.conf" }
    run { script "test \"$(cat /etc/resolv.conf)\" = 'nameserver 192.0.2.53'; test ! -e /etc/.vimg-resolv.conf" }
}
configuration "elsewhere" {
    symlink "/etc/resolv.conf" target="/opt/resolv.conf"
    run network=#true { script "! test -L /etc/resolv.conf" }
    run { script "test \"$(readlink /etc/resolv.conf)\" = /opt/resolv.conf" }
}
// Scripts and packages get the name of the image's own kernel (F21).
configuration "kernel" { run { script "test -e /boot/vmlinuz-$(uname -r)" } }
// A script sees nothing of the host (A8): not the user's umask, open files,
// host name or proxies.
configuration "seen" {
    run { script #"""
        test "$(umask)" = 0022
        test "$(ulimit -Sn) $(ulimit -Hn)" = '1024 4096'
        test "$(ls /proc/self/fd | wc -l)" = 4
        test "$(hostname)" = debian
        test -z "${http_proxy-}${HTTP_PROXY-}${https_proxy-}"
        ! getent hosts deb.debian.org
        """# }
}
"##;

fn project() -> Project {
    let project = Project::new("field");
    project.write("main.vimg", RECIPE);
    project.write("repository.sh", &format!("#!/bin/bash\nset -eu\n{REPOSITORY}"));
    project.write("onto/tmp/laid", "laid\n");
    project.write("onto/etc/laid", "laid\n");
    for name in ["plain", "private", "tool", "set", "a.log", "keep.log", "sub/x"] {
        project.write(&format!("tree/{name}"), name);
    }
    project.write("tree/.vimgignore", "*.log\n!keep.log\n");
    project.write("made.sh.j2", "#!/bin/sh\necho {{ \"made\" }}\n");
    // The modes are set after this, because a new owner clears the set-id bits.
    project.give_away();
    let script = "cd tree && mkfifo pipe && chmod 600 private && chmod 700 tool && chmod 4755 set \
        && chmod 770 sub && cd .. && chmod 700 onto onto/tmp made.sh.j2 && touch file \
        && tar --owner=1001 --group=1001 -cf by-1001.tar file";
    let made = std::process::Command::new("bash").args(["-c", script]).current_dir(project.root()).status();
    assert!(made.unwrap().success());
    project
}

#[test]
fn what_went_wrong_in_the_field_goes_right() {
    let project = project();
    project.vimg(&["build", "it"]).succeeds();
    // A named version is installed, even if another version is held.
    project.vimg(&["build", "backwards"]).succeeds();

    project.vimg(&["build", "loader"]).succeeds();
    let broken = project.vimg(&["build", "broken"]);
    assert_eq!(broken.code, 1, "{}", broken.stderr);
    broken.says("GRUB has no command `nonsense`");
    broken.says("since broken@broken");
    assert!(!project.path("broken.qcow2").exists());

    // The same build in another environment has the same keys, so nothing is
    // built.
    let again =
        project.sh("umask 077; ulimit -n 512; exec 7</; http_proxy=http://127.0.0.1:9 $VIMG build it");
    assert_eq!(again.code, 0, "{}", again.stderr);
    assert!(again.stderr.contains("0 built"), "{}", again.stderr);

    // A container gives the same files, also under the strictest umask.
    let build = ["build", "it"];
    super::offline::a_container_makes_the_same(&project, &build, &["it@trees", "it@unpacked", "it@seen"]);
}

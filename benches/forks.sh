#!/usr/bin/env bash
# The effect of memory snapshots, measured in one run: boots and forks, a
# changed byte with all checks, one check and twenty, the cost of a snapshot,
# and, if it is installed, Packer with the same base and the same layers.
# Usage: benches/forks.sh [VIMG]; RUNS=5 for medians of five.
set -euo pipefail
cd "$(dirname "$0")/.."
here=$PWD
vimg=$(realpath "${1:-target/release/vimg}")
runs=${RUNS:-5}
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
export VIMG_STORE=$dir/store VIMG_ACCEL=${VIMG_ACCEL:-tcg}

now() { date +%s.%N; }
# Prints the seconds that a command takes, and its output only if it fails.
took() {
    local start
    start=$(now)
    "$@" >"$dir/log" 2>&1 || { cat "$dir/log" >&2; exit 1; }
    echo "$(now) $start" | awk '{printf "%.2f\n", $1 - $2}'
}
median() { sort -n | awk '{a[NR] = $1} END {printf "%.2f s", a[int((NR + 1) / 2)]}'; }
row() { printf '%-58s %s\n' "$1" "$2"; }
vimg_in() { (cd "$dir/$1" && "$vimg" "${@:2}" --quiet); }
# Edits that change a byte of the last layer's result, and only a comment in its
# script.
edit() { sed -i "s|^echo .*tuned|echo $RANDOM$RANDOM >/srv/www/tuned|" "$dir/$1/tune.sh"; }
comment() { echo "# $RANDOM" >>"$dir/$1/tune.sh"; }

# The example with a last layer that also writes a page, and the same with this
# layer in a booted machine.
cp -r examples/web "$dir/offline"
echo 'echo 0 >/srv/www/tuned' >>"$dir/offline/tune.sh"
cp -r "$dir/offline" "$dir/booted"
sed -i 's/^configuration "tuning" {$/&\n    needs "booted"/' "$dir/booted/main.vimg"
for project in offline booted; do vimg_in $project build; done

# The time from the start of QEMU to the agent's answer, from the events.
ready() { # ARGUMENTS of vimg test
    sed -i "s/contains=\"{{ greeting }}[^\"]*\"/contains=\"{{ greeting }}\" within=\"$((RANDOM + 1))s\"/; s/ within=\"[0-9]*s\" within=\"[0-9]*s\"/ within=\"$((RANDOM + 1))s\"/" \
        "$dir/booted/main.vimg"
    (cd "$dir/booted" && "$vimg" test --format json "$@") |
        perl -MTime::HiRes=time -ne '$start = time if /"phase":"start"/;
            printf "%.2f\n", time - $start if /"phase":"check"/'
}
echo "from the start of a machine to its agent's answer"
for _ in 1 2 3; do ready --no-memory; done | median >"$dir/m"
row "  booted" "$(cat "$dir/m")"
ready >/dev/null
for _ in $(seq "$runs"); do ready; done | median >"$dir/m"
row "  forked" "$(cat "$dir/m")"

echo
echo "one byte in the last layer of examples/web, with two checks"
for project in booted offline; do
    what="$project layer"
    edit $project
    vimg_in $project test
    for _ in $(seq "$runs"); do edit $project; took vimg_in $project build --no-output; done | median >"$dir/m"
    row "  $what" "$(cat "$dir/m")"
    [ $project = offline ] && runs=3 || :
    edit $project
    vimg_in $project test
    for _ in $(seq "$runs"); do edit $project; took vimg_in $project test; done | median >"$dir/m"
    row "  $what and checks" "$(cat "$dir/m")"
    for _ in 1 2 3; do
        echo "<!-- $RANDOM$RANDOM -->" >>"$dir/$project/index.html.j2"
        took vimg_in $project test
    done | median >"$dir/m"
    row "  a page in the layer below the $what, and checks" "$(cat "$dir/m")"
    for n in 1 2; do
        sed -i "s/type=\"int\" default=[0-9]*/type=\"int\" default=$((256 + n))/" "$dir/$project/main.vimg"
        took vimg_in $project test
    done | median >"$dir/m"
    row "  $what, a setting that its boot has read, and checks" "$(cat "$dir/m")"
    for _ in 1 2 3; do edit $project; took vimg_in $project build; done | median >"$dir/m"
    row "  $what, checks, sealed and converted" "$(cat "$dir/m")"
    for _ in $(seq "$runs"); do comment $project; took vimg_in $project build; done | median >"$dir/m"
    row "  a comment in the $what: checks and disk are reused" "$(cat "$dir/m")"
    for _ in 1 2; do edit $project; took vimg_in $project test --no-memory; done | median >"$dir/m"
    row "  $what and checks, without snapshots" "$(cat "$dir/m")"
done

if command -v packer >/dev/null; then
    mkdir "$dir/packer"
    ssh-keygen -q -t ed25519 -N '' -f "$dir/packer/key"
    cat >"$dir/packer/main.vimg" <<END
use "std/debian.vimg"
use "std/openssh.vimg"
image "base" {
    from "debian-12"
    layer "openssh"
    layer "authorized-key" key="$(cat "$dir/packer/key.pub")"
    output "qcow2" path="base.qcow2"
}
END
    vimg_in packer build
    sed 's/{{ port }}/80/g; s,{{ root }},/srv/www,g' stdlib/nginx.conf.j2 >"$dir/packer/default"
    sed 's/{{ greeting }}/It works/; s/{{ port }}/80/' examples/web/index.html.j2 >"$dir/packer/index.html"
    cp -r examples/web/site "$dir/packer/site"
    cp "$dir/offline/tune.sh" "$dir/packer/tune.sh"
    cat >"$dir/packer/web.json" <<'END'
{
  "builders": [{
    "type": "qemu", "accelerator": "tcg", "qemu_binary": "qemu-system-x86_64",
    "iso_url": "base.qcow2", "iso_checksum": "none", "disk_image": true, "format": "qcow2",
    "cpus": 2, "memory": 1024, "headless": true, "net_device": "virtio-net", "disk_interface": "virtio",
    "ssh_username": "root", "ssh_private_key_file": "key", "ssh_timeout": "20m",
    "shutdown_command": "systemctl poweroff", "output_directory": "out"
  }],
  "provisioners": [
    { "type": "shell", "inline": ["apt-get -q=2 update", "DEBIAN_FRONTEND=noninteractive apt-get -q=2 -y --no-install-recommends install nginx-light", "mkdir -p /srv/www"] },
    { "type": "file", "source": "default", "destination": "/etc/nginx/sites-enabled/default" },
    { "type": "file", "source": "site/", "destination": "/srv/www" },
    { "type": "file", "source": "index.html", "destination": "/srv/www/index.html" },
    { "type": "shell", "script": "tune.sh", "environment_vars": ["MIN_LENGTH=256"] }
  ]
}
END
    pack() { (cd "$dir/packer" && PACKER_CACHE_DIR=cache CHECKPOINT_DISABLE=1 packer build -force web.json); }
    for _ in 1 2; do edit packer; took pack; done | median >"$dir/m"
    row "  Packer, the same base and layers" "$(cat "$dir/m")"
fi

echo
echo "checks of one state, whose machine has a snapshot"
mkdir "$dir/many"
many() { # N
    {
        echo 'use "std/debian.vimg"'
        echo 'image "it" {'
        echo '    from "debian-12"'
        for n in $(seq "$1"); do echo "    check \"n$n\" { run \"test -d /run/systemd/system; : $RANDOM$RANDOM\" }"; done
        echo '}'
    } >"$dir/many/main.vimg"
    vimg_in many test
}
many 1
for n in 1 20; do
    for _ in $(seq "$runs"); do took many $n; done | median >"$dir/m"
    row "  $n" "$(cat "$dir/m")"
done

echo
echo "the cost of snapshots: building the booted layer once, and its checks"
fresh() {
    grep -l '"name": "web@tuning"\|"kind": "check"' "$VIMG_STORE"/states/*/record.json | xargs -r dirname | xargs -r rm -rf
    rm -rf "$VIMG_STORE/snapshots"
    took vimg_in booted test "$@"
}
row "  from the layer below, no snapshot at first" "$(fresh) s"
row "  the same without snapshots" "$(fresh --no-memory) s"
fresh >/dev/null
for kept in "$VIMG_STORE"/snapshots/*/; do
    row "  on disk: $([ -e "$kept/disk.qcow2" ] && echo "as booted" || echo "as the layer left it")" "$(du -sh "$kept" | cut -f1)"
done

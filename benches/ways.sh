#!/usr/bin/env bash
# Compares the runners of layers in one run on this machine: an appliance, a
# container, a booted machine, a plain chroot into the mounted disk, and mkosi,
# if it is installed. Needs root. On Debian 12, install mkosi, bubblewrap and
# qemu-utils for everything.
# Usage: benches/ways.sh [VIMG]; RUNS=5 for medians of five.
set -euo pipefail
cd "$(dirname "$0")/.."
here=$PWD
vimg=$(realpath "${1:-target/release/vimg}")
runs=${RUNS:-5}
dir=$(mktemp -d)
mounted=
trap '[ -z "$mounted" ] || umount "$mounted" || :; rm -rf "$dir"' EXIT
export VIMG_STORE=$dir/store VIMG_ACCEL=tcg

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

# The example, and the same with every layer in a booted machine.
cp -r examples/web "$dir/web"
cp -r examples/web "$dir/booted"
sed 's/^configuration .*{$/&\n    needs "booted"/' stdlib/nginx.vimg >"$dir/booted/nginx.vimg"
cp stdlib/nginx.conf.j2 "$dir/booted/"
sed -i 's/^configuration .*{$/&\n    needs "booted"/; s,"std/nginx.vimg","nginx.vimg",' "$dir/booted/main.vimg"

build() { (cd "$dir/$1" && "$vimg" build --quiet --no-output "${@:2}"); }
forget() {
    # Delete all states except bases.
    grep -L '"kind": "base"' "$VIMG_STORE"/states/*/record.json | xargs -r dirname | xargs -r rm -rf
}

row "from nothing to a qcow2: vimg" "$(cd "$dir/web" && took "$vimg" build --quiet --provider container) s"
if command -v mkosi >/dev/null; then
    "$here/benches/mkosi.sh" "$dir/mkosi" "$here/examples/web"
    mk() { (cd "$dir/mkosi" && mkosi -f "$@" build); }
    row "from nothing to a qcow2: mkosi" "$(took mk) s"
    row "  and again, to fill its incremental cache" "$(took mk -i) s"
fi

echo
echo "all layers on a finished base"
build web --provider qemu debian-12
forget
build web --provider qemu # makes the appliance's snapshot, and warms the mirror's package lists
for way in qemu container; do
    for _ in $(seq 3); do forget; took build web --provider $way; done | median >"$dir/m"
    row "  vimg, $way" "$(cat "$dir/m")"
done
forget
row "  vimg, booted" "$(took build booted --no-memory) s"

base=$(grep -l '"kind": "base"' "$VIMG_STORE"/states/*/record.json | head -n 1 | xargs dirname)
qemu-img convert -O raw "$base/disk.qcow2" "$dir/base.raw"
mkdir "$dir/root"
enter() {
    # The offset of the root filesystem: src/provider/gpt.rs.
    mount -o "loop,offset=$(((2048 + 131072) * 512))" "$1" "$dir/root"
    mounted=$dir/root
}
leave() { umount "$dir/root"; mounted=; }
plain() {
    enter "$dir/chroot.raw"
    mount --bind /dev "$dir/root/dev"
    mount -t proc proc "$dir/root/proc"
    mkdir -p "$dir/root/run/systemd/resolve"
    cp /etc/resolv.conf "$dir/root/run/systemd/resolve/stub-resolv.conf"
    printf '#!/bin/sh\nexit 101\n' >"$dir/root/usr/sbin/policy-rc.d"
    chmod 755 "$dir/root/usr/sbin/policy-rc.d"
    export DEBIAN_FRONTEND=noninteractive
    chroot "$dir/root" apt-get -q=2 update
    chroot "$dir/root" apt-get -q=2 -y --no-install-recommends -o Dpkg::Options::=--force-unsafe-io install nginx-light
    chroot "$dir/root" apt-get clean
    rm "$dir/root/usr/sbin/policy-rc.d"
    cp -r "$here/examples/web/site" "$dir/root/srv/www"
    cp "$here/examples/web/tune.sh" "$dir/root/tmp/tune.sh"
    chroot "$dir/root" env MIN_LENGTH=256 sh /tmp/tune.sh
    echo 'net.core.somaxconn = 4096' >"$dir/root/etc/sysctl.d/90-vimg.conf"
    umount "$dir/root/proc" "$dir/root/dev"
    leave
}
for _ in $(seq 3); do cp --sparse=always "$dir/base.raw" "$dir/chroot.raw"; took plain; done | median >"$dir/m"
row "  plain chroot" "$(cat "$dir/m")"

change() { # what, directory, file, command...
    local what=$1 file=$2
    shift 2
    for n in $(seq "$runs"); do
        echo "# $n" >>"$file"
        took "$@"
    done | median >"$dir/m"
    row "  $what" "$(cat "$dir/m")"
}
script() { # does the work of the last layer in the mounted disk
    enter "$dir/chroot.raw"
    cp "$dir/web/tune.sh" "$dir/root/tmp/tune.sh"
    chroot "$dir/root" env MIN_LENGTH=256 sh /tmp/tune.sh
    leave
}
page() { # does the work of the middle layer and the last one
    enter "$dir/chroot.raw"
    cp -r "$dir/web/site/." "$dir/root/srv/www"
    chroot "$dir/root" env MIN_LENGTH=256 sh /tmp/tune.sh
    leave
}
for layer in last middle; do
    [ $layer = last ] && file=tune.sh || file=site/404.html
    echo
    echo "one byte in the $layer layer, no disk converted"
    build web --provider qemu
    change "vimg, appliance" "$dir/web/$file" build web --provider qemu
    forget
    build web --provider container
    change "vimg, container" "$dir/web/$file" build web --provider container
    build booted
    runs=2 change "vimg, booted each time" "$dir/booted/$file" build booted --no-memory
    build booted
    change "vimg, forked from a snapshot" "$dir/booted/$file" build booted
    if command -v mkosi >/dev/null; then
        [ $layer = last ] && mfile=mkosi.postinst || mfile=mkosi.extra/srv/www/404.html
        runs=3 change "mkosi -i" "$dir/mkosi/$mfile" mk -i
    fi
    [ $layer = last ] && work=script || work=page
    change "plain chroot" "$dir/web/$file" $work
done

echo
echo "one-file layers on a finished base, no disk converted"
mkdir "$dir/ten"
ten() { # N
    {
        echo 'use "std/debian.vimg"'
        echo 'image "it" {'
        echo '    from "debian-12"'
        for n in $(seq "$1"); do echo "    layer \"mark\" n=$n"; done
        echo '}'
        echo 'configuration "mark" {'
        echo '    input "n" type="int"'
        echo "    file \"/mark-{{ n }}\" content=\"$(now)\""
        echo '}'
    } >"$dir/ten/main.vimg"
    build ten --provider "$2"
}
for way in qemu container; do
    for n in 1 10; do
        for _ in $(seq "$runs"); do took ten $n $way; done | median >"$dir/m"
        row "  $n, $way" "$(cat "$dir/m")"
    done
done

#!/usr/bin/env bash
# The cost of N booted layers in a row, with memory snapshots and without. Each
# layer runs one trivial script, so the time is that of starting machines. Each
# layer of the first rows adds a file, and each layer of the others changes an
# existing file: only then can vimg retarget a snapshot. Each build starts from
# its own copy of a store that has the base and no snapshot.
# Usage: benches/booted.sh [VIMG]; LAYERS="1 2 4 8" by default.
set -euo pipefail
vimg=$(realpath "${1:-target/release/vimg}")
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
export VIMG_STORE=$dir/store VIMG_ACCEL=${VIMG_ACCEL:-tcg}
cd "$dir"

recipe() { # COUNT FILE
    echo 'use "std/debian.vimg"'
    echo 'image "it" { from "debian-12"'
    for n in $(seq "$1"); do echo "layer \"l$n\""; done
    echo '}'
    for n in $(seq "$1"); do
        echo "configuration \"l$n\" { needs \"booted\"; run { script \"echo $n >${2//N/$n}\" } }"
    done
}
# Prints the time from start to exit, and how many machines booted.
took() {
    rm -rf store
    cp -a --reflink=auto base store
    local start
    start=$(date +%s.%N)
    "$@" >log 2>&1 || { cat log >&2; exit 1; }
    echo "$(date +%s.%N) $start" | awk '{printf "%.1f s, ", $1 - $2}'
    tail -n 1 log | grep -oE '[0-9]+ boots?' || echo 'no boot'
}

echo 'use "std/debian.vimg"' >main.vimg
"$vimg" build debian-12 --quiet
mv store base
for file in /mark-N /etc/motd; do
    printf '%-24s %-20s %s\n' "layers write $file" "with snapshots" "without"
    for count in ${LAYERS:-1 2 4 8}; do
        recipe "$count" "$file" >main.vimg
        with=$(took "$vimg" build)
        printf '%-24s %-20s %s\n' "$count" "$with" "$(took "$vimg" build --no-memory)"
    done
done

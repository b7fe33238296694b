#!/usr/bin/env bash
# The cost of N booted layers in a row, with memory snapshots and without. Each
# layer runs one trivial script, so the time is that of starting machines.
# Usage: benches/booted.sh [VIMG]; LAYERS="1 2 4 8" by default.
set -euo pipefail
vimg=$(realpath "${1:-target/release/vimg}")
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
export VIMG_STORE=$dir/store VIMG_ACCEL=${VIMG_ACCEL:-tcg}
cd "$dir"

recipe() { # COUNT WORD
    echo 'use "std/debian.vimg"'
    echo 'image "it" { from "debian-12"'
    for n in $(seq "$1"); do echo "layer \"l$n\""; done
    echo '}'
    for n in $(seq "$1"); do
        echo "configuration \"l$n\" { needs \"booted\"; run { script \"echo $2 $n >/mark-$n\" } }"
    done
}
took() {
    local start
    start=$(date +%s.%N)
    "$@" >log 2>&1 || { cat log >&2; exit 1; }
    echo "$(date +%s.%N) $start" | awk '{printf "%.1f s", $1 - $2}'
}
boots() { tail -n 1 log | sed 's/.*(\(.*\))/\1/'; }

echo 'use "std/debian.vimg"' >main.vimg
"$vimg" build debian-12 --quiet
printf '%-10s %-32s %s\n' layers "with snapshots" "without"
for count in ${LAYERS:-1 2 4 8}; do
    # Different words: none of these layers exists yet.
    recipe "$count" "with-$count" >main.vimg
    with=$(took "$vimg" build)
    with="$with, $(boots)"
    recipe "$count" "without-$count" >main.vimg
    without=$(took "$vimg" build --no-memory)
    printf '%-10s %-32s %s\n' "$count" "$with" "$without, $(boots)"
done

#!/usr/bin/env bash
# What a change costs: `examples/web` from nothing, again, and after an edit
# of one byte in its last and in its middle layer. Prints seconds.
# Usage: benches/change.sh [VIMG]
set -euo pipefail
cd "$(dirname "$0")/.."
vimg=$(realpath "${1:-target/release/vimg}")
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cp -r examples/web "$dir/web"
cd "$dir/web"
export VIMG_STORE=$dir/store

took() {
    local what=$1 start end
    shift
    start=$(date +%s.%N)
    "$@" >"$dir/log" 2>&1 || { cat "$dir/log" >&2; exit 1; }
    end=$(date +%s.%N)
    printf '%-44s %8.2f s   %s\n' "$what" "$(echo "$end $start" | awk '{print $1 - $2}')" "$(grep 'built,' "$dir/log" || :)"
}
took "from nothing, with output" "$vimg" build
took "again" "$vimg" build
echo >>tune.sh
took "one byte in the last layer, no output" "$vimg" build --no-output
echo >>site/404.html
took "one byte in the middle layer, no output" "$vimg" build --no-output
took "and its output" "$vimg" build

#!/usr/bin/env bash
# What a cache saves: compares building examples/web with fetching it, and
# transferring states with copying the same bytes. The cache is moto, an S3
# server, on this machine. As root, layers run in a container.
# Usage: benches/cache.sh [VIMG]
set -euo pipefail
cd "$(dirname "$0")/.."
vimg=$(realpath "${1:-target/release/vimg}")
moto=$(realpath -q target/python/bin/moto_server || command -v moto_server)
dir=$(mktemp -d)
port=${PORT:-8095}
"$moto" -H 127.0.0.1 -p "$port" >"$dir/moto" 2>&1 &
server=$!
trap 'kill $server; rm -rf "$dir"' EXIT
until curl -sf -X PUT "http://127.0.0.1:$port/cache" >/dev/null; do sleep 0.2; done
export VIMG_ACCEL=${VIMG_ACCEL:-tcg} XDG_CONFIG_HOME=$dir/config
"$vimg" cache keygen >/dev/null 2>&1
spec=type=s3,bucket=cache,endpoint_url=http://127.0.0.1:$port,use_path_style=true,access_key_id=k,secret_access_key=s
mkdir "$dir/a" "$dir/b" && cp -r examples/web "$dir/a/web" && cp -r examples/web "$dir/b/web"

row() { printf '%-62s %s\n' "$1" "$2"; }
timed() { local start end; start=$(date +%s.%N); "$@" >"$dir/out" 2>&1 || { cat "$dir/out"; exit 1; }; end=$(date +%s.%N); echo "$end - $start" | bc; }
summary() { grep '^cache' "$dir/out" | tail -n 1 | sed 's/.*; //'; }
ratio() { echo "scale=2; $1 / $2" | bc; }

cd "$dir/a/web"
build=$(timed "$vimg" --store "$dir/one" build)
row "build from nothing" "$build s"
send=$(timed "$vimg" --store "$dir/one" cache push --cache-to "$spec,mode=max")
row "send all of it, $(summary)" "$send s"
row "send it again, $(timed "$vimg" --store "$dir/one" cache push --cache-to "$spec,mode=max" >/dev/null; summary)" ""
cd "$dir/b/web"
take=$(timed "$vimg" --store "$dir/two" build --cache-from "$spec")
row "build on another runner, $(summary)" "$take s"
row "  building / fetching" "$(ratio "$build" "$take")"
states=$(timed "$vimg" --store "$dir/three" build --no-output --cache-from "$spec")
row "fetch all states to build on, $(summary)" "$states s"
row "  building / fetching" "$(ratio "$build" "$states")"
# The same bytes, as files.
copied() { mkdir "$dir/copy" && cp -r --sparse=always "$dir/three/states" "$dir/three/blobs" "$dir/copy" && sync -f "$dir"; }
copy=$(timed copied)
row "copy their files with cp, and sync" "$copy s"
row "  fetching / copying" "$(ratio "$states" "$copy")"
echo '/* one line */' >>site/robots.txt
edit=$(timed "$vimg" --store "$dir/two" build --cache-from "$spec" --cache-to "$spec")
row "edit one line of a page on that runner, with checks and disk" "$edit s"
row "  cache traffic: $(summary)" ""

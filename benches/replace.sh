#!/usr/bin/env bash
# Replaces one web server by another in a running machine: how long `apply`
# takes, how long a client gets no answer, and how long the two daemons take to
# stop and to start. Then the same for a changed setting of one of them.
# Usage: benches/replace.sh [VIMG]
set -euo pipefail
cd "$(dirname "$0")/.."
vimg=$(realpath "${1:-target/release/vimg}")
dir=$(mktemp -d)
export VIMG_STORE=$dir/store VIMG_ACCEL=${VIMG_ACCEL:-tcg}
port=${PORT:-8089}
cp -r examples/replace/. "$dir"
cd "$dir"
finish() {
    "$vimg" down --force --remove staging --quiet >/dev/null 2>&1 || :
    [ -z "${poll:-}" ] || kill "$poll" 2>/dev/null || :
    rm -rf "$dir"
}
trap finish EXIT
sed -i "s/host=8080/host=$port/" main.vimg

row() { printf '%-58s %s\n' "$1" "$2"; }
inside() { "$vimg" exec staging -- sh -c "$1"; }
# Prints the longest time without an answer, in seconds. Each line of its input
# has a time, and whether there was an answer.
outage() {
    awk '$2 == 1 { if (failed && last && $1 - last > most) most = $1 - last; last = $1; failed = 0 } $2 == 0 { failed = 1 }
        END { printf "%.2f s", most }' poll
}
# Sends more than twenty requests a second until it is killed.
ask() {
    perl -MTime::HiRes=time,sleep -MIO::Socket::INET -e '
        $| = 1;
        while (1) {
            my $at = time;
            my $s = IO::Socket::INET->new(PeerAddr => "127.0.0.1", PeerPort => $ARGV[0], Timeout => 2);
            my $answer;
            if ($s) {
                print $s "GET / HTTP/1.0\r\n\r\n";
                my $ready = ""; vec($ready, fileno($s), 1) = 1;
                $answer = <$s> if select($ready, undef, undef, 0.2);
            }
            printf "%.3f %d\n", $at, defined $answer && $answer =~ /^HTTP/ ? 1 : 0;
            sleep 0.02;
        }' "$port" >poll &
    poll=$!
}
measure() { # WHAT
    ask
    sleep 2
    start=$(date +%s.%N)
    "$vimg" apply staging --quiet >log 2>&1 || { cat log >&2; exit 1; }
    end=$(date +%s.%N)
    sleep 2
    kill "$poll"
    wait "$poll" 2>/dev/null || :
    row "$1: apply" "$(echo "$end $start" | awk '{printf "%.2f s", $1 - $2}')"
    row "  no answer for" "$(outage)"
}
seconds='t() { s=$(date +%s.%N); "$@"; e=$(date +%s.%N); echo "$e $s" | awk "{printf \"%.2f s\", \$1 - \$2}"; }'

"$vimg" build --no-output --quiet
"$vimg" up staging --quiet
until perl -MIO::Socket::INET -e 'my $s = IO::Socket::INET->new(PeerAddr => "127.0.0.1", PeerPort => $ARGV[0]) or exit 1;
    print $s "GET / HTTP/1.0\r\n\r\n"; exit(defined(<$s>) ? 0 : 1)' "$port"; do sleep 0.2; done
row "nginx stops in" "$(inside "$seconds; t systemctl stop nginx; systemctl start nginx")"
sed -i 's,// replace,replace,' main.vimg
measure "nginx -> lighttpd"
row "  from nginx's stop to lighttpd's start (journal)" "$(inside '
    journal() { journalctl --unit "$1" --output short-unix | grep "$2" | tail -n 1 | cut -d " " -f 1; }
    echo "$(journal lighttpd Started) $(journal nginx Stopping)"' | awk '{printf "%.2f s", $1 - $2}')"
row "lighttpd starts in" "$(inside "systemctl stop lighttpd; $seconds; t systemctl start lighttpd")"
sed -i 's,layer "nginx" port=80,layer "nginx" port=80 root="/srv/other",' main.vimg
measure "a setting of lighttpd"

#!/bin/sh
# Creates a project for mkosi 14 (Debian 12) with the same packages and files as
# examples/web, to compare mkosi with vimg. Its image boots by UEFI only.
# Usage: benches/mkosi.sh DIR EXAMPLE; DIR must not exist, or be such a project.
# ROOTSIZE in the environment is the size of the root filesystem (mkosi: 3G).
set -eu
[ $# = 2 ] || { echo "usage: $0 DIR EXAMPLE" >&2; exit 2; }
example=$(cd "$2" && pwd)
if [ -e "$1" ] && [ ! -e "$1/mkosi.conf" ]; then echo "$1 exists" >&2; exit 2; fi
rm -rf "$1"
mkdir -p "$1"
cd "$1"
dir=$(pwd)
mkdir mkosi.cache mkosi.output mkosi.workspace tools

cat >mkosi.conf <<EOF
[Distribution]
Distribution=debian
Release=bookworm

[Output]
Format=gpt_ext4
Bootable=yes
QCow2=yes
OutputDirectory=mkosi.output
Output=web.qcow2
Hostname=debian
KernelCommandLine=console=tty0 console=ttyS0,115200 net.ifnames=0
# Only with -i: the initrd is built once, with the cached image.
CacheInitrd=yes

[Content]
Cache=mkosi.cache
Environment=MIN_LENGTH=256
Packages=linux-image-cloud-amd64
    systemd-sysv
    systemd-resolved
    udev
    dbus
    kmod
    e2fsprogs
    zstd
    xz-utils
    iproute2
    ca-certificates
    netbase
    passwd
    login
    procps
    nginx-light

[Partitions]
RootSize=${ROOTSIZE:-3G}

[Host]
EOF
# For a host without systemd.
[ -d /run/systemd/system ] || echo NspawnKeepUnit=yes >>mkosi.conf
# Wrappers, for a kernel without vfat.
grep -qw vfat /proc/filesystems || modprobe -q vfat 2>/dev/null || echo "ExtraSearchPaths=$dir/tools" >>mkosi.conf

# Copied into the tree after the packages.
mkdir -p mkosi.extra/srv mkosi.extra/etc/sysctl.d mkosi.extra/etc/systemd/network mkosi.extra/etc/nginx/sites-available
cp -r "$example/site" mkosi.extra/srv/www
sed -e 's/{{ greeting }}/It works/g' -e 's/{{ port }}/80/g' "$example/index.html.j2" >mkosi.extra/srv/www/index.html
cat >mkosi.extra/etc/nginx/sites-available/default <<'EOF'
server {
    listen 80 default_server;
    listen [::]:80 default_server;
    root /srv/www;
    index index.html;
    server_name _;

    location / {
        try_files $uri $uri/ =404;
    }
}
EOF
echo 'net.core.somaxconn = 4096' >mkosi.extra/etc/sysctl.d/90-net.core.somaxconn.conf
cat >mkosi.extra/etc/systemd/network/80-dhcp.network <<'EOF'
[Match]
Type=ether
Kind=!*
[Network]
DHCP=yes
[DHCPv4]
ClientIdentifier=mac
EOF

# Runs in the image, in systemd-nspawn, for each build.
cat >mkosi.postinst <<'EOF'
#!/bin/sh
set -eu
cat >/etc/nginx/conf.d/compress.conf <<EOC
gzip_types text/css image/svg+xml application/xml;
gzip_min_length ${MIN_LENGTH};
EOC
nginx -t
systemctl -q enable systemd-networkd systemd-resolved nginx
systemctl -q mask systemd-networkd-wait-online.service apt-daily.timer apt-daily-upgrade.timer \
    e2scrub_all.timer e2scrub_reap.service fstrim.timer
EOF
chmod +x mkosi.postinst

# The wrappers: mkosi mounts the ESP, which needs vfat in the running kernel.
# Without vfat, mtools copies the files of the ESP to a directory, which is bind
# mounted. On umount, mtools copies them back if something has changed.
cat >tools/mount <<'EOF'
#!/bin/bash
where=${!#} dev=
for a; do
    case $a in /dev/loop*) dev=$a ;; esac
done
if [ -z "$dev" ] || [ "$(blkid -p -o value -s TYPE "$dev")" != vfat ]; then exec /usr/bin/mount "$@"; fi
set -eu
shopt -s nullglob
export MTOOLS_SKIP_CHECK=1
for a; do
    case $a in /dev/*) ;; /*) where=$a ;; esac
done
d=$(dirname "$0")/../mkosi.workspace/esp-$(echo -n "$where" | md5sum | cut -c1-16)
mkdir "$d" "$d/tree"
echo "$dev" >"$d/dev"
if mdir -b -i "$dev" ::/ 2>/dev/null | grep -q .; then mcopy -s -Q -n -m -i "$dev" '::/*' "$d/tree/"; fi
touch "$d/stamp"
exec /usr/bin/mount --no-mtab --bind "$d/tree" "$where"
EOF
cat >tools/umount <<'EOF'
#!/bin/bash
set -eu
where=${!#}
/usr/bin/umount "$@"
d=$(dirname "$0")/../mkosi.workspace/esp-$(echo -n "$where" | md5sum | cut -c1-16)
if [ -d "$d" ]; then
    export MTOOLS_SKIP_CHECK=1
    if [ -n "$(find "$d/tree" -cnewer "$d/stamp" -print -quit)" ]; then
        dev=$(cat "$d/dev")
        mkfs.fat -nEFI -F32 "$dev" >/dev/null
        mcopy -s -Q -m -i "$dev" "$d/tree"/* ::/
    fi
    rm -rf "$d"
fi
EOF
# bootctl expects a FAT filesystem.
cat >tools/systemd-nspawn <<'EOF'
#!/bin/sh
exec /usr/bin/systemd-nspawn --setenv=SYSTEMD_RELAX_ESP_CHECKS=1 "$@"
EOF
chmod +x tools/*

# Runs outside of the chroot $1, inside of mmdebstrap's user namespace. Files
# leave through descriptors 100 and up, which vimg opened: the mapped root may
# not be able to walk to where they are.
set -eu
R=$1
PATH=$PATH:/usr/sbin:/sbin
chmod 755 "$R/usr/lib/vimg/agent" "$R/usr/lib/vimg/update-grub"

echo debian >"$R/etc/hostname"
printf '127.0.0.1\tlocalhost\n127.0.1.1\tdebian\n::1\tlocalhost ip6-localhost ip6-loopback\n' >"$R/etc/hosts"
printf 'UUID=%s / ext4 rw,errors=remount-ro,discard,x-systemd.growfs 0 0\n' "$VIMG_ROOT_UUID" >"$R/etc/fstab"
# A written disk may be put on a larger one: the partition and the filesystem
# grow when it boots. The type is the one of the partition table below.
mkdir -p "$R/etc/repart.d"
printf '[Partition]\nType=linux-generic\n' >"$R/etc/repart.d/50-root.conf"
# DHCP on each Ethernet card that nothing else configures: networkd takes the
# first file that matches, by its name, and ifupdown and NetworkManager have
# their own.
printf '[Match]\nType=ether\nKind=!*\nProperty=VIMG_DHCP=1\n[Network]\nDHCP=yes\n[DHCPv4]\nClientIdentifier=mac\n' \
    >"$R/etc/systemd/network/zz-vimg-dhcp.network"
cat >"$R/etc/udev/rules.d/80-vimg-dhcp.rules" <<'EOU'
SUBSYSTEM!="net", GOTO="vimg_end"
TEST=="/usr/sbin/NetworkManager", GOTO="vimg_end"
PROGRAM=="/bin/grep -rqsE '^[[:space:]]*iface[[:space:]]+%k[[:space:]]' /etc/network/interfaces /etc/network/interfaces.d", GOTO="vimg_end"
ENV{VIMG_DHCP}="1"
LABEL="vimg_end"
EOU
chroot "$R" systemctl -q enable systemd-networkd systemd-resolved vimg-agent.service vimg-hooks.service

# Modules that our initramfs loads, in order, in a directory for what they
# are for. A kernel may have some of them built in.
kernel=$(ls "$R/lib/modules" | sort -V | tail -n 1)
modules() {
    to=$R/tmp/early/modules/$1
    shift
    mkdir -p "$to"
    for module; do
        chroot "$R" modprobe --set-version "$kernel" --show-depends "$module" | while read -r verb path rest; do
            [ "$verb" = insmod ] || continue
            name=$(basename "$path")
            name=${name%%.ko*}
            ls "$to" | grep -q -- "-$name\.ko\$" && continue
            file=$to/$(ls "$to" | wc -l | xargs printf '%02d')-$name.ko
            case $path in
            *.xz) chroot "$R" xz -dc "$path" >"$file" ;;
            *.zst) chroot "$R" zstd -qdc "$path" >"$file" ;;
            *) cat "$R$path" >"$file" ;;
            esac
        done
    done
}
archive() {
    chroot "$R" sh -c 'cd /tmp/early && find . | sort | cpio -o -H newc --quiet'
}
# For a direct boot.
modules disk virtio_pci virtio_blk
archive >/proc/self/fd/102
# For an appliance.
modules console virtio_pci virtio_console
modules network virtio_pci virtio_net
modules xfs xfs
modules btrfs btrfs
modules vfat nls_cp437 nls_ascii nls_iso8859-1 vfat
archive >/proc/self/fd/106
rm -rf "$R/tmp/early"

# Boot loaders for BIOS and UEFI. grub-install would want block devices.
printf 'search.fs_uuid %s root\nset prefix=($root)/boot/grub\n' "$VIMG_ROOT_UUID" >"$R/tmp/early.cfg"
cat >"$R/boot/grub/grub.cfg" <<EOG
set timeout=0
set default=0
source /boot/grub/vimg.cfg
menuentry "Debian" {
  search.fs_uuid $VIMG_ROOT_UUID root
  linux /vmlinuz root=UUID=$VIMG_ROOT_UUID ro \$parameters
  initrd /initrd.img
}
EOG
modules="part_gpt part_msdos ext2 search search_fs_uuid search_label normal linux configfile echo test ls cat halt reboot minicmd sleep true"
chroot "$R" grub-mkimage -O i386-pc -p /boot/grub -c /tmp/early.cfg -o /tmp/core.img biosdisk $modules
chroot "$R" grub-mkimage -O x86_64-efi -p /boot/grub -c /tmp/early.cfg -o /tmp/bootx64.efi fat efi_gop $modules
cat "$R/tmp/core.img" >/proc/self/fd/103
cat "$R/usr/lib/grub/i386-pc/boot.img" >/proc/self/fd/104
cat "$R/tmp/bootx64.efi" >/proc/self/fd/105
rm -f "$R/tmp/early.cfg" "$R/tmp/core.img" "$R/tmp/bootx64.efi"
grub="grub2-common grub-common grub-pc-bin grub-efi-amd64-bin"
chroot "$R" apt-get -y -q purge $grub --autoremove >/dev/null 2>&1 || chroot "$R" dpkg --purge $grub
[ -e "$R/boot/grub/grub.cfg" ]
# Packages and kernels call vimg's update-grub, also if GRUB's is installed.
chroot "$R" dpkg-divert --quiet --local --no-rename --divert /usr/sbin/update-grub.grub --add /usr/sbin/update-grub
ln -s ../lib/vimg/update-grub "$R/usr/sbin/update-grub"
mkdir -p "$R/etc/default/grub.d"
printf '%s\n' '# Kernel parameters of the base.' \
    'GRUB_CMDLINE_LINUX="console=tty0 console=ttyS0,115200 net.ifnames=0 $GRUB_CMDLINE_LINUX"' \
    >"$R/etc/default/grub.d/10-vimg.cfg"
chroot "$R" update-grub
cat "$R/vmlinuz" >/proc/self/fd/101

# mmdebstrap cleans up after its hooks; the disk is made in this one.
rm -rf "$R"/var/lib/apt/lists/* "$R"/var/cache/apt/*.bin "$R"/var/cache/apt/archives/*.deb \
    "$R"/var/log/apt/* "$R"/var/log/dpkg.log "$R"/var/log/alternatives.log \
    "$R"/var/cache/ldconfig/aux-cache "$R"/var/cache/debconf/*-old "$R"/var/lib/dpkg/*-old
mkdir -p "$R/var/lib/apt/lists/partial"
rm -f "$R/var/lib/dbus/machine-id"
: >"$R/etc/machine-id"
rm -f "$R/etc/resolv.conf"
ln -s ../run/systemd/resolve/stub-resolv.conf "$R/etc/resolv.conf"
rm -f "$R/etc/apt/apt.conf.d/00mmdebstrap" "$R/etc/apt/apt.conf.d/99mmdebstrap" \
    "$R/etc/dpkg/dpkg.cfg.d/99mmdebstrap" "$R/usr/sbin/policy-rc.d"
if [ -e "$R/sbin/start-stop-daemon.REAL" ]; then
    mv -f "$R/sbin/start-stop-daemon.REAL" "$R/sbin/start-stop-daemon"
fi
# Lists stay in the states of an image, so they are kept compressed.
printf 'Acquire::GzipIndexes "true";\nAcquire::Languages "none";\n' >"$R/etc/apt/apt.conf.d/50vimg"
# Otherwise the first boot would do this.
if [ -x "$R/usr/lib/systemd/systemd-update-done" ]; then chroot "$R" /usr/lib/systemd/systemd-update-done; fi
unshare -m sh -euc "$VIMG_MKFS" mkfs "$R"
# mmdebstrap wants to remove it itself.
: >"$R/etc/apt/apt.conf.d/00mmdebstrap"

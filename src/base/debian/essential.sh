set -eu
R=$1
mkdir -p "$R/etc/initramfs-tools/conf.d" "$R/etc/systemd/network" "$R/boot/grub"
printf 'MODULES=most\nCOMPRESS=zstd\n' >"$R/etc/initramfs-tools/conf.d/vimg"
# Debian then keeps /vmlinuz and /initrd.img on the newest kernel, which is
# what grub.cfg boots: a kernel update needs no update-grub.
printf 'do_symlinks=yes\ndo_bootloader=no\n' >"$R/etc/kernel-img.conf"
